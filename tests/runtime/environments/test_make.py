import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from meam_policy import (
    ConfigError,
    EnvironmentSpec,
    MissingExtraError,
    NotFoundError,
    SpaceError,
    make_environment,
    register_environments,
)
from meam_policy.environments.make import import_packages, named_failures


def ogbench_environment(name):
    pytest.importorskip("ogbench")
    return make_environment(name)


@pytest.mark.parametrize("name", ["this:Pendulum-v1", "antigravity:x", "os:system", "meam_trap:Env-v0", ":"])
def test_id_that_would_import_a_module_is_refused_without_importing_it(tmp_path, monkeypatch, name):
    (tmp_path / "meam_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with pytest.raises(NotFoundError, match="names a module to import") as caught:
        make_environment(name)
    assert name in str(caught.value)
    assert not {"this", "antigravity", "meam_trap"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("meam/Pocket-v0", "meam/Pockets-v0"), ("Pendulum-v", "Pendulum-v1"), ("HalfCheeta-v5", "HalfCheetah-v5")],
)
def test_misspelt_id_is_not_found_with_what_was_meant(typo, meant):
    with pytest.raises(NotFoundError) as caught:
        make_environment(typo)
    assert f'"{typo}"' in str(caught.value)
    assert "Did you mean" in str(caught.value)
    assert meant in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["", "zzzzzzzzzzzzz", "Nothing/Like-v99"])
def test_unknown_id_is_not_found(name):
    with pytest.raises(NotFoundError, match="There is no environment"):
        make_environment(name)


@pytest.mark.parametrize(
    "name", ["pointmaze-nowhere-v0", "antmaze-nowhere-navigate-v0", "cube", "pointmaze-medium-navigate-x"]
)
def test_unknown_ogbench_name_is_not_found(name):
    pytest.importorskip("ogbench")
    with pytest.raises(NotFoundError, match=f'no environment "{name}"'):
        make_environment(name)


def test_registering_twice_changes_nothing():
    before = gymnasium.registry["meam/Pockets-v0"]
    register_environments()
    assert gymnasium.registry["meam/Pockets-v0"] is before


def test_gymnasium_environment_is_the_one_of_gymnasium_make():
    env = make_environment("Pendulum-v1", g=1.5)
    assert env.spec is not None
    assert env.spec.id == "Pendulum-v1"
    assert env.spec.kwargs["g"] == 1.5


@pytest.mark.parametrize(
    ("data_set", "environment"),
    [
        ("pointmaze-medium-navigate-v0", "pointmaze-medium-v0"),
        ("pointmaze-medium-navigate-singletask-v0", "pointmaze-medium-singletask-v0"),
        ("pointmaze-medium-navigate-singletask-task3-v0", "pointmaze-medium-singletask-task3-v0"),
        ("pointmaze-medium-v0", "pointmaze-medium-v0"),
    ],
)
def test_name_of_a_data_set_makes_the_environment_it_was_recorded_in(data_set, environment):
    env = ogbench_environment(data_set)
    assert env.spec is not None
    assert env.spec.id == environment
    env.close()


def run(env, seed):
    observation, _ = env.reset(seed=seed)
    path = [observation]
    for action in np.random.default_rng(0).uniform(-1, 1, (10, 2)):
        path.append(env.step(action.astype(np.float32))[0])
    return np.array(path)


def test_reset_of_a_maze_with_a_seed_is_reproducible():
    env = ogbench_environment("pointmaze-medium-navigate-singletask-v0")
    first = run(env, 3)
    other = run(env, 4)
    np.testing.assert_array_equal(run(env, 3), first)
    assert not np.array_equal(first[0], other[0])
    fresh = ogbench_environment("pointmaze-medium-navigate-singletask-v0")
    np.testing.assert_array_equal(run(fresh, 3), first)
    env.close()
    fresh.close()


@pytest.mark.parametrize("seed", [0, 2**32 + 1])
def test_reset_of_a_maze_leaves_numpys_global_generator_alone(seed):
    env = ogbench_environment("pointmaze-medium-navigate-singletask-v0")
    np.random.seed(11)  # noqa: NPY002
    expected = np.random.random(3)  # noqa: NPY002
    np.random.seed(11)  # noqa: NPY002
    env.reset(seed=seed)
    np.testing.assert_array_equal(np.random.random(3), expected)  # noqa: NPY002
    env.close()


def test_reset_of_a_maze_ignores_the_state_of_the_global_generator():
    env = ogbench_environment("pointmaze-medium-navigate-singletask-v0")
    starts = []
    for state in (0, 1):
        np.random.seed(state)  # noqa: NPY002
        starts.append(env.reset(seed=5)[0])
    np.testing.assert_array_equal(*starts)
    env.close()


def test_reset_of_a_maze_without_a_seed_goes_on():
    env = ogbench_environment("pointmaze-medium-navigate-singletask-v0")
    env.reset(seed=0)
    assert not np.array_equal(env.reset()[0], env.reset()[0])
    env.close()


def test_an_environment_whose_simulator_is_gone_is_explained():
    with pytest.raises(MissingExtraError, match=r"Ant-v2 needs something that is not installed"):
        make_environment("Ant-v2")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [{}, {"MUJOCO_GL": "egl"}, {"DISPLAY": ":7"}])
def test_drawing_stays_as_the_process_has_chosen_it(chosen):
    pytest.importorskip("dm_control")
    code = (
        "import os, sys; from meam_policy.environments.headless import disable_dm_control_drawing as disable; "
        "disable(); print('dm_control' in sys.modules, 'mujoco' in sys.modules, os.environ.get('MUJOCO_GL'))"
    )
    drawing = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")
    environment = {name: value for name, value in os.environ.items() if name not in drawing} | chosen
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    headless = not chosen and sys.platform == "linux"
    assert done.stdout.split() == [str(headless), "False", str(chosen.get("MUJOCO_GL"))]


def test_packages_that_register_environments_are_imported_by_name(tmp_path, monkeypatch):
    (tmp_path / "fieldbots.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('FieldBot-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=40)\n"
    )
    (tmp_path / "broken_bots.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(NotFoundError, match=r"--import PACKAGE"):
        make_environment("FieldBot-v0")
    import_packages(["fieldbots"])
    make_environment("FieldBot-v0").close()
    for name in ("broken_bots", "no_such_bots"):
        with pytest.raises(
            MissingExtraError, match=rf"package '{name}', which is to be imported.*(Zero|ModuleNotFound)"
        ):
            import_packages([name])


def test_an_environment_with_arguments_that_fails_while_it_runs_is_named():
    environment = EnvironmentSpec("Pendulum-v1", {"g": 2.0})
    with (
        pytest.raises(
            ConfigError, match=r"Pendulum-v1 with g=2.0 failed while it ran: ZeroDivisionError: .*--env-kwargs"
        ),
        named_failures(environment),
    ):
        raise ZeroDivisionError("by the pole")
    for plain in (None, EnvironmentSpec("Pendulum-v1")):  # there is nothing to name that the user could change
        with pytest.raises(ZeroDivisionError), named_failures(plain):
            raise ZeroDivisionError
    with pytest.raises(SpaceError), named_failures(environment):
        raise SpaceError("ours")
