import sys

import gymnasium
import pytest

from meam_policy import ConfigError, EnvironmentSpec, MissingExtraError
from meam_policy.cli import run
from meam_policy.commands.environment_options import chosen_environment, environment_arguments, typed_environment


def test_arguments_are_a_json_object_and_the_time_limit_one_of_them():
    assert environment_arguments('{"g": 2, "maze": [[1, 0]]}', 50) == {
        "g": 2,
        "maze": [[1, 0]],
        "max_episode_steps": 50,
    }
    assert environment_arguments(None, None) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{g: 2}", "which is not JSON"),
        ("", "which is not JSON"),
        ("[" * 100_000, "which is not JSON"),
        ("[1]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ('{"max_episode_steps": 3}', "The time limit is --max-episode-steps"),
        ('{"render_mode": "human"}', "render_mode"),
        ('{"g": NaN}', "finite"),
    ],
)
def test_other_text_is_refused(text, message):
    with pytest.raises(ConfigError, match=f"--env-kwargs is .*{message}"):
        environment_arguments(text, None)


@pytest.mark.parametrize("steps", [0, -1, 10**12])
def test_a_time_limit_out_of_range_is_refused(steps):
    with pytest.raises(ConfigError, match=f"--max-episode-steps is {steps}; expected 1 to"):
        environment_arguments(None, steps)


@pytest.fixture
def swing_package(tmp_path, monkeypatch):
    """A package that registers an environment when it is imported."""
    text = "gymnasium.register('MeamPark-v0', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=40)"
    (tmp_path / "meam_park.py").write_text(f"import gymnasium\n{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "meam_park"
    gymnasium.registry.pop("MeamPark-v0", None)
    sys.modules.pop("meam_park", None)


def test_the_module_of_a_typed_id_is_imported(swing_package):
    assert typed_environment("meam_park:MeamPark-v0", ()) == ("MeamPark-v0", ("meam_park",))
    assert "MeamPark-v0" in gymnasium.registry
    assert typed_environment(None, ("meam_park",)) == (None, ("meam_park",))


@pytest.mark.parametrize("name", ["meam_nowhere:X-v0", ":", ":X-v0"])
def test_a_module_that_cannot_be_imported_is_named(name):
    with pytest.raises(MissingExtraError, match="cannot be"):
        typed_environment(name, ())


def test_a_named_environment_is_made_as_registered_and_the_other_one_is_told(make_policy, capsys):
    recorded = EnvironmentSpec("Pendulum-v1", {"g": 2.0}, evaluation=EnvironmentSpec("Pendulum-v1", {"g": 3.0}))
    spec = make_policy(environment_id="Pendulum-v1", environment=recorded).load().spec
    assert chosen_environment(None, spec) == recorded.evaluation
    assert capsys.readouterr().err == ""
    assert chosen_environment("Pendulum-v1", spec) == EnvironmentSpec("Pendulum-v1")
    assert "The policy's is Pendulum-v1 with g=3.0" in capsys.readouterr().err
    assert chosen_environment("Ant-v5", spec) == EnvironmentSpec("Ant-v5")
    with pytest.raises(ConfigError, match="pass --env-id"):
        chosen_environment(None, make_policy().load().spec)


def test_eval_refuses_what_a_hostile_policy_names_and_runs_nothing(make_policy, tmp_path, monkeypatch, capsys):
    (tmp_path / "meam_trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    wrapped = EnvironmentSpec.from_json(
        {
            "id": "Pendulum-v1",
            "kwargs": {},
            "max_episode_steps": None,
            "wrappers": [{"name": "meam_trap:Wrap", "kwargs": {}}],
            "evaluation": None,
        }
    )
    for spec, said in ((wrapped, "meam_trap:Wrap"), (EnvironmentSpec("meam_trap:Env-v0"), "names a module to import")):
        folder = make_policy(environment_id=spec.id, environment=spec).folder
        assert run(["eval", str(folder), "--episodes", "1"]) == 2
        assert said in capsys.readouterr().err
    assert "meam_trap" not in sys.modules
