"""The environment that a data set records is kept, and made for evaluation."""

import contextlib
import io
import json
import re
import warnings
from dataclasses import replace
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from minari.data_collector.episode_buffer import EpisodeBuffer

from meam_export import export_policy
from meam_policy import CheckpointError, ConfigError, DatasetError, MeamPolicy, PolicySpec, rollout
from meam_policy.cli import run
from meam_policy.spec import EnvironmentSpec, EnvironmentWrapper
from meam_training import OfflineDataset, TrainConfig, train
from meam_training.data.opening import DataArguments, open_dataset


def record_swing(env, name="tests/swing-v0", **more):
    rows: Any = {"actions": np.zeros((3, 1)), "rewards": [0.0] * 3, "observations": np.zeros((4, 3))}
    flags: Any = {"terminations": [False] * 3, "truncations": [False, False, True]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(name, buffer=[EpisodeBuffer(**rows, **flags)], env=env, **more)
    return name


def swing(**settings):
    return gymnasium.make("Pendulum-v1", **settings)


@pytest.mark.parametrize(
    ("env", "recorded"),
    [
        (lambda: swing(g=2.0), EnvironmentSpec("Pendulum-v1", {"g": 2.0})),
        (lambda: swing(max_episode_steps=50), EnvironmentSpec("Pendulum-v1", {}, 50)),
        (
            lambda: gymnasium.wrappers.ClipAction(swing()),
            EnvironmentSpec("Pendulum-v1", wrappers=(EnvironmentWrapper("ClipAction"),)),
        ),
        (swing, EnvironmentSpec("Pendulum-v1")),
        (lambda: swing(render_mode="rgb_array"), EnvironmentSpec("Pendulum-v1")),
    ],
)
def test_what_minari_records_of_an_environment_is_kept(tmp_path, monkeypatch, env, recorded):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = record_swing(env())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Uncached and cached; wrapped in ClipAction, it declares no bounds.
        opened = [
            OfflineDataset.from_minari(name, action_low=-2.0, action_high=2.0) for _ in range(2)
        ]  # from the cache, too
    assert [data.recorded_environment for data in opened] == [recorded, recorded]
    assert [data.environment_id for data in opened] == ["Pendulum-v1"] * 2


def test_another_environment_for_evaluation_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = OfflineDataset.from_minari(record_swing(swing(g=2.0), eval_env=swing(max_episode_steps=50)))
    evaluation = EnvironmentSpec("Pendulum-v1", {}, 50)
    assert data.recorded_environment == EnvironmentSpec("Pendulum-v1", {"g": 2.0}, evaluation=evaluation)


@pytest.mark.parametrize("wrap", [gymnasium.wrappers.NormalizeReward, gymnasium.wrappers.NormalizeObservation])
def test_only_what_is_not_followed_is_warned_of_whenever_the_data_is_opened(tmp_path, monkeypatch, wrap):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = record_swing(wrap(swing(g=2.0)))
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=f"was recorded with the wrapper {wrap.__name__}, whose running stat"
        ) as it:
            OfflineDataset.from_minari(name)
        assert "g=" not in str(it[0].message)


@pytest.mark.parametrize(
    "change",
    [{"kwargs": {"render_mode": None, "id": 3}}, {"kwargs": [3]}, {"max_episode_steps": "x"}, {"kwargs": {"a b": 1}}],
)
def test_an_environment_recorded_in_a_hostile_form_is_refused(tmp_path, monkeypatch, change):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    file = tmp_path / record_swing(swing()) / "data" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["env_spec"] = json.dumps({**json.loads(metadata["env_spec"]), **change})
    file.write_text(json.dumps(metadata))
    with pytest.raises(DatasetError, match="env_spec, eval_env_spec"):
        OfflineDataset.from_minari(tmp_path / "tests/swing-v0")


def test_joined_data_sets_keep_the_environment_that_they_share(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    one, same, other = (
        OfflineDataset.from_minari(record_swing(swing(g=g), f"tests/swing-v{n}")) for n, g in enumerate((2.0, 2.0, 3.0))
    )
    nameless = replace(one, environment_id=None, environment=None)
    for joined in (OfflineDataset.joined([one, same]), OfflineDataset.joined([nameless, one])):
        assert joined.recorded_environment == EnvironmentSpec("Pendulum-v1", {"g": 2.0})
    with pytest.raises(DatasetError, match=r"The environment differs: Pendulum-v1 with g=2.0 in .*g=3.0 in .*--env-id"):
        OfflineDataset.joined([one, other])
    named = OfflineDataset.joined([one, other], environment_id="Pendulum-v1")
    assert named.recorded_environment == EnvironmentSpec("Pendulum-v1")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({"env_kwargs": '{"m": 3}'}, EnvironmentSpec("Pendulum-v1", {"g": 2.0, "m": 3}, 50)),
        ({"env_kwargs": '{"g": 3}', "max_episode_steps": 7}, EnvironmentSpec("Pendulum-v1", {"g": 3}, 7)),
        ({"env_id": "Pendulum-v1"}, EnvironmentSpec("Pendulum-v1")),
        ({"env_id": "Pendulum-v1", "max_episode_steps": 7}, EnvironmentSpec("Pendulum-v1", {}, 7)),
    ],
)
def test_given_arguments_of_the_environment_take_the_place_of_recorded_ones(tmp_path, monkeypatch, given, made):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = record_swing(swing(g=2.0, max_episode_steps=50))
    assert open_dataset(DataArguments((name,), **given)).recorded_environment == made


def tiny(**changes):
    small: dict[str, Any] = {"steps": 3, "hidden_dims": (16, 16), "batch_size": 3, "chunk_size": 1, "threads": 1}
    return TrainConfig.preset("bc", **{**small, **changes})


@pytest.fixture
def slow_swing(tmp_path, monkeypatch):
    """A data set of Pendulum with g = 2 and 50 steps."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return record_swing(swing(g=2.0, max_episode_steps=50))


def test_a_policy_is_evaluated_online_and_offline_in_the_recorded_environment(slow_swing, tmp_path):
    seen: list[Any] = []
    data = OfflineDataset.from_minari(slow_swing)
    config = tiny(evaluate_every=3, evaluate_episodes=2)
    checkpoint = train(config, data, tmp_path / "run", on_evaluation=lambda step, metrics: seen.append(metrics))
    assert seen[-1]["length_mean"] == 50
    folder = export_policy(checkpoint, tmp_path / "policy")
    spec = PolicySpec.from_json((tmp_path / "policy" / "config.json").read_text())
    assert spec.environment == EnvironmentSpec("Pendulum-v1", {"g": 2.0}, 50)
    policy = MeamPolicy.from_pretrained(folder)
    right = rollout(policy, minari.load_dataset(slow_swing).recover_environment(), 2, 0)
    ours = json.loads(run_meam("eval", str(folder), "--episodes", "2", "--json"))
    assert ours["return_mean"] == pytest.approx(right.return_mean, rel=1e-6)
    several = json.loads(run_meam("eval", str(folder), "--episodes", "2", "--num-envs", "2", "--json"))
    assert several["return_mean"] == pytest.approx(right.return_mean, rel=1e-3)
    plain = json.loads(run_meam("eval", str(folder), "--episodes", "2", "--json", "--env-id", "Pendulum-v1"))
    assert plain["length_mean"] == 200
    other = run_meam(
        "eval", str(folder), "--episodes", "2", "--json", "--env-kwargs", '{"g": 9}', "--max-episode-steps", "7"
    )
    assert json.loads(other)["length_mean"] == 7

    copied = run_meam(
        "collect", "--policy", str(folder), "--transitions", "60", "--dataset-id", "copy/swing-v0", "--json"
    )
    again = OfflineDataset.from_minari(json.loads(copied)["dataset"])
    assert again.recorded_environment == EnvironmentSpec("Pendulum-v1", {"g": 2.0}, 50)
    assert len(again) == 100
    run_meam("eval", str(folder), "--episodes", "2", "--num-envs", "2", "--record", "copy/rolls-v0", "--json")
    assert OfflineDataset.from_minari("copy/rolls-v0").recorded_environment == again.recorded_environment


def run_meam(*words):
    """Run a command; what it prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert run(list(words)) == 0
    return text.getvalue()


def test_a_plain_environment_leaves_the_policys_file_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    checkpoint = train(tiny(), OfflineDataset.from_minari(record_swing(swing())), tmp_path / "run")
    assert checkpoint.spec.environment is None
    assert "environment" not in json.loads(checkpoint.spec.to_json())
    assert checkpoint.spec.recorded_environment == EnvironmentSpec("Pendulum-v1")


def test_a_policy_trained_on_normalised_observations_is_not_judged_on_raw_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = record_swing(gymnasium.wrappers.NormalizeObservation(swing()))
    with pytest.warns(UserWarning, match="NormalizeObservation"):
        data = OfflineDataset.from_minari(name)
    with pytest.raises(ConfigError, match="NormalizeObservation, whose running statistics are not recorded"):
        train(tiny(evaluate_every=3), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    folder = export_policy(train(tiny(), data, tmp_path / "run"), tmp_path / "policy")
    assert run(["eval", str(folder), "--episodes", "1"]) == 2
    assert "NormalizeObservation, whose running statistics are not recorded" in capsys.readouterr().err


def test_a_run_resumes_whatever_is_known_of_its_environment(slow_swing, tmp_path):
    data = OfflineDataset.from_minari(slow_swing)
    train(tiny(), replace(data, environment=None), tmp_path / "run")
    assert train(tiny(steps=4), data, tmp_path / "run", resume=True).spec.environment is not None
    with pytest.raises(CheckpointError):
        train(tiny(steps=5), replace(data, environment_id="x", environment=None), tmp_path / "run", resume=True)


def test_an_environment_that_fails_while_it_runs_is_named_by_all_that_run_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = OfflineDataset.from_minari(record_swing(swing(g=3.0, max_episode_steps=5)))

    def fall(*_):
        raise ZeroDivisionError("by the pole")

    monkeypatch.setattr(PendulumEnv, "step", fall)
    said = r"Pendulum-v1 with g=3\.0, max_episode_steps=5 failed while it ran: ZeroDivisionError: by the pole"
    with pytest.raises(ConfigError, match=said):
        train(tiny(evaluate_every=3), data, tmp_path / "evaluated")
    with pytest.raises(ZeroDivisionError):  # made by hand
        train(tiny(evaluate_every=3), data, tmp_path / "by-hand", env=swing(g=3.0))
    checkpoint = train(tiny(), data, tmp_path / "run")
    with pytest.raises(ConfigError, match=said):
        export_policy(checkpoint, tmp_path / "auto", acting="auto")
    folder = str(export_policy(checkpoint, tmp_path / "policy"))
    commands = [
        ["eval", folder],
        ["collect", "--policy", folder, "--root", str(tmp_path / "data")],
        ["export", str(tmp_path / "run"), "--output-dir", str(tmp_path / "k1"), "--variants", "k1", "--episodes", "1"],
    ]
    for command in commands:
        capsys.readouterr()
        assert run(command) == 2
        assert re.search(f"meam: {said}", capsys.readouterr().err)


def test_commands_that_refuse_a_wrapper_say_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.warns(UserWarning, match=r"Name one as it is registered \(--env-id\)"):
        data = OfflineDataset.from_minari(record_swing(gymnasium.wrappers.NormalizeObservation(swing())))
    folder = str(export_policy(train(tiny(), data, tmp_path / "run"), tmp_path / "policy"))
    for command in (["collect", "--policy", folder, "--root", str(tmp_path / "data")], ["eval", folder]):
        capsys.readouterr()
        assert run(command) == 2
        assert "name it: --env-id Pendulum-v1 (meam collect Pendulum-v1)" in capsys.readouterr().err
    named = ["collect", "Pendulum-v1", "--policy", folder, "--root", str(tmp_path / "data"), "--transitions", "10"]
    assert run(named) == 0
    assert run(["eval", folder, "--env-id", "Pendulum-v1", "--episodes", "1"]) == 0
