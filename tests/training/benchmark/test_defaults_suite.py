"""The comparison in benchmarks/defaults: its data, its equal CPU time, and one tiny run of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from meam_training import TrainConfig

pytest.importorskip("mujoco")

DEFAULTS = Path(__file__).parents[3] / "benchmarks" / "defaults"
sys.path.append(str(DEFAULTS))  # its modules import each other by name, as a script's folder is on the path
tasks, behaviours, bandits = (importlib.import_module(name) for name in ("tasks", "behaviours", "bandits"))


def load_script(name: str) -> Any:
    # By its path: other benchmarks have scripts of the same name.
    spec = importlib.util.spec_from_file_location(f"defaults_{name}", DEFAULTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for a module's names
    spec.loader.exec_module(module)
    return module


suite, report = load_script("run"), load_script("report")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reacher with a thousand transitions and two evaluation episodes, as the only task, and short timing runs."""
    task = replace(tasks.TASKS["reacher"], transitions=1000, episodes=2)
    sizes = {**task.settings, "hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 1, "batch_size": 8}
    only = {"reacher": replace(task, settings=sizes)}
    for module in (suite, report):
        monkeypatch.setattr(module, "TASKS", only)
    monkeypatch.setattr(suite, "FEWEST_UPDATES", 2)
    monkeypatch.setattr(suite, "TIMED_SECONDS", 0.05)
    return only["reacher"]


def job(method: str = "bc", **changes: Any) -> Any:
    return suite.Job("reacher", method, seconds=0.05, **changes)


def test_every_task_is_valid_for_every_method() -> None:
    for name, task in tasks.TASKS.items():
        assert task.name == name
        assert task.purpose in ("development", "test")
        for method in suite.METHODS:
            config = suite.Job(name, method, seed=3).config(100)
            assert (config.method, config.steps, config.seed) == (method, 100, 3)
            given = {key for key, value in task.settings.items() if getattr(config, key) == value}
            # bc has no critics, and no use for a discount.
            assert set(task.settings) - given <= {"critic_hidden_dims", "num_critics", "discount"}


def test_settings_that_no_one_gave_are_the_method_s_defaults() -> None:
    config = suite.Job("reacher", "me-am").config(500)
    assert config == TrainConfig.preset("me-am", tasks.TASKS["reacher"].settings, steps=500, seed=0)
    changed = suite.Job("reacher", "me-am", {"objective": "adjoint"})
    assert changed.config(500) == config.changed(objective="adjoint")
    assert changed.variant == "me-am objective=adjoint"
    assert suite.Job("reacher", "qam", {"pretrain_steps": 0.4}).config(500).pretrain_steps == 200


@pytest.mark.parametrize("setting", ["steps=100", "seed=1", "pretrain_steps=100"])
def test_settings_that_follow_from_others_are_refused(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--output", str(tmp_path), "--set", setting])
    assert "pretrain_steps is a share of the steps" in capsys.readouterr().err


def test_a_task_s_data_are_the_same_every_time(tmp_path: Path, toy: Any) -> None:
    first, second = (toy.dataset(tmp_path / name) for name in "ab")
    assert len(first) == 1000
    assert first.environment_id == "Reacher-v5"
    assert first.fingerprint == second.fingerprint
    assert toy.dataset(tmp_path / "a").fingerprint == first.fingerprint
    other = behaviours.record("Reacher-v5", toy.behaviour, 1000, "defaults/other-v0", tmp_path, seed=1)
    assert suite.OfflineDataset.from_minari(other).fingerprint != first.fingerprint


def test_the_reaching_behaviour_is_better_than_nothing_and_its_best_tenth_much_better(tmp_path: Path, toy: Any) -> None:
    env, still = gymnasium.make("Reacher-v5"), np.zeros(2, np.float32)
    idle = [behaviours.record_steps(env, lambda _: still, seed).rewards.sum() for seed in (1, 2)]
    env.close()
    about = tasks.summarise(toy.dataset(tmp_path))
    assert about["episodes"] == 20
    assert about["best_tenth"] > about["return_mean"] + 5
    assert about["best_tenth"] > max(idle)


def test_random_search_finds_the_linear_policy_that_is_best_in_a_bandit() -> None:
    with gymnasium.make("defaults/Bandit2-v0") as env:
        found = behaviours._random_search(env, 60, 0.05, 1, 0.0, np.random.default_rng(0))

        def mean_return(policy: Any) -> float:
            acting = policy.controller(env, 0.0, np.random.default_rng(1))
            return float(np.mean([behaviours.record_steps(env, acting, seed).rewards.sum() for seed in range(20)]))

        assert len(found) == 60
        assert mean_return(found[0]) < 0.5
        assert mean_return(found[-1]) > 0.9


@pytest.mark.parametrize("dim", [2, 8])
def test_a_bandit_pays_1_for_the_best_action_and_the_known_reward_for_its_opposite(dim: int) -> None:
    with gymnasium.make(f"defaults/Bandit{dim}-v0") as env:
        for sign, expected in ((1, 1.0), (-1, np.exp(-1 / (2 * 0.3**2)))):
            seen, _ = env.reset(seed=4)
            assert np.square(seen).mean() == pytest.approx(1)
            _, reward, terminated, _, _ = env.step(sign * bandits.GOAL_DISTANCE * seen.clip(-2, 2))
            assert terminated
            assert reward == pytest.approx(expected, rel=1e-5)


def test_the_number_of_updates_is_the_cpu_time_over_that_of_an_update(tmp_path: Path, toy: Any) -> None:
    steps = suite.steps_within(job(), tmp_path)
    (file,) = (tmp_path / "timing").iterdir()
    timing = json.loads(file.read_text())
    assert steps == max(2, round(50 / timing["ms_per_update"]))
    file.write_text(json.dumps({**timing, "ms_per_update": 0.5}))
    assert suite.steps_within(job(seed=7), tmp_path) == 100
    assert suite.steps_within(replace(job(), seconds=3.0), tmp_path) == 6000


def test_changed_rewards_are_the_data_s_alone(tmp_path: Path, toy: Any) -> None:
    dataset = toy.dataset(tmp_path)
    changed = job(reward_scale=100.0, reward_offset=-1.0).rewarded(dataset)
    np.testing.assert_allclose(changed.rewards, 100 * dataset.rewards - 1, rtol=1e-6)
    assert changed.actions is dataset.actions
    assert changed.fingerprint != dataset.fingerprint


def test_a_suite_resumes_and_reports(tmp_path: Path, toy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--output", str(tmp_path), "--task", "reacher", "--jobs", "0", "--seconds", "0.02"]
    both = [*command, "--method", "bc", "me-am"]
    assert suite.main(both) == 0
    assert suite.main([*command, "--method", "bc", "--reward-scale", "100"]) == 0
    assert suite.main([*command, "--method", "me-am", "--set", "inverse_temperature=3", "objective=adjoint"]) == 0
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "jobs").iterdir()}
    assert set(files) == {
        "reacher-bc-x1+0-seed0.json",
        "reacher-bc-x100+0-seed0.json",
        "reacher-me-am-inverse_temperature=3-objective=adjoint-x1+0-seed0.json",
        "reacher-me-am-x1+0-seed0.json",
    }
    capsys.readouterr()
    assert suite.main(both) == 0
    assert "2 jobs, 2 of them done before." in capsys.readouterr().out
    assert files == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "jobs").iterdir()}

    result = json.loads((tmp_path / "jobs" / "reacher-me-am-x1+0-seed0.json").read_text())
    assert result["settings"]["steps"] == result["updates"]
    assert result["settings"]["objective"] == TrainConfig.preset("me-am").objective
    assert result["train_cpu_seconds"] > 0
    assert np.isfinite(result["metrics"]["policy_loss"])
    for acting in ("sampled", "zero_noise"):
        assert len(result[acting]["returns"]) == 2
        assert result[acting]["ci_low"] <= result[acting]["return_mean"] <= result[acting]["ci_high"]
    assert result["sampled"]["returns"] != result["zero_noise"]["returns"]
    with pytest.raises(SystemExit, match="differs in seconds, updates, settings"):
        suite.main([*both[:-3], "--method", "bc", "--seconds", "1"])

    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "defaults.md").read_text()
    assert "| task | data, best tenth | bc | me-am | me-am inverse_temperature=3 objective=adjoint | ahead |" in text
    assert "| reacher | 100 r | " in text
    assert (tmp_path / "defaults.png").stat().st_size > 10_000


def test_a_variant_is_ahead_unless_the_difference_may_be_chance() -> None:
    generator = np.random.default_rng(0)
    returns = {name: mean + generator.normal(size=(3, 40)) for name, mean in (("a", 0.0), ("b", 5.0), ("c", 5.01))}
    assert sorted(report.ahead(returns)) == ["b", "c"]
    assert report.ahead({**returns, "c": returns["c"] + 2}) == ["c"]
    # Seeds differ more than episodes do, so more episodes of one seed do not narrow the interval.
    spread = np.repeat([[0.0], [10.0]], 1000, axis=1)
    assert np.quantile(report.bootstrap(spread), [0.025, 0.975]).tolist() == [0, 10]


def test_a_folder_without_results_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "no finished jobs" in capsys.readouterr().err
