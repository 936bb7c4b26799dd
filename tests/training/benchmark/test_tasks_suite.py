"""The evidence suite in benchmarks/tasks: its files, its data, one tiny run of it, and the report's closed forms."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meam_policy import ConfigError, NotFoundError
from meam_training import OfflineDataset, TrainConfig, collect

pytest.importorskip("ogbench")

TASKS = Path(__file__).parents[3] / "benchmarks" / "tasks"
sys.path.append(str(TASKS))  # its modules import each other by name, as a script's folder is on the path
suite_file, recordings, intervals = (importlib.import_module(n) for n in ("suite_file", "recordings", "intervals"))


def load_script(name: str) -> Any:
    # By its path: other benchmarks have scripts of the same name.
    spec = importlib.util.spec_from_file_location(f"tasks_{name}", TASKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for a module's names
    spec.loader.exec_module(module)
    return module


run, report = load_script("run"), load_script("report")

TINY = """
[suite]
updates = 4
seeds = [0]
episodes = 2
[settings]
hidden_dims = [8]
critic_hidden_dims = [8]
num_critics = 2
batch_size = 8
threads = 1
device = "cpu"
evaluate_every = 2
evaluate_episodes = 1
[methods.bc]
preset = "bc"
[methods.me-am]
preset = "me-am"
mixture_weight = 0.1
[domains.pockets]
environment = "meam/Pockets-v0"
tasks = ["rare", "never"]
transitions = 200
chunk_size = 5
discount = 0.97
success_reward = 1.0
[domains.pockets.mode_shares]
rare = { west = 0.5, north = 0.5 }
never = { west = 0.5, east = 0.5 }
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


@pytest.mark.parametrize("name", ["minutes", "cpu", "gpu"])
def test_every_file_has_the_seven_methods_and_one_set_of_settings_for_all_tasks(name: str) -> None:
    suite = suite_file.read_suite(TASKS / f"{name}.toml")
    assert len(suite.methods) == 7
    assert suite.episodes >= 50
    assert len(suite.seeds) >= 3
    free = {"chunk_size", "discount", "seed", "polyak"}
    for method in suite.methods:
        plain = [
            {k: v for k, v in vars(job.config).items() if k not in free}
            for job in suite.jobs()
            if (job.method, job.seed) == (method, 0)
        ]
        assert all(settings == plain[0] for settings in plain)
        assert plain[0]["steps"] == suite.updates
    both, entropy, mixture = (
        first_job(suite, name).config for name in ("me-am-mixture", "me-am-mixture-no-entropy", "me-am")
    )
    assert both.changed(entropy_coef=0.0) == entropy
    assert both.changed(mixture_weight=0.0) == mixture
    assert (both.entropy_coef, both.mixture_weight) == (0.1, 0.1)


def first_job(suite: Any, method: str) -> Any:
    return next(job for job in suite.jobs() if job.method == method)


def test_the_default_of_me_am_is_the_row_without_the_mixture() -> None:
    suite = suite_file.read_suite(TASKS / "gpu.toml")
    job = first_job(suite, "me-am")
    assert set(job.config.own_settings) <= {*suite.settings, "steps", "seed", "chunk_size", "discount"}


def test_methods_vary_fastest_and_seeds_slowest(tiny: Path) -> None:
    suite = replace(suite_file.read_suite(tiny), seeds=(0, 1))
    assert [(job.seed, job.task.label, job.method) for job in suite.jobs()][:5] == [
        (0, "rare", "bc"),
        (0, "rare", "me-am"),
        (0, "never", "bc"),
        (0, "never", "me-am"),
        (1, "rare", "bc"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("updates = 4", "", 'lacks "updates"'),
        ("updates = 4", "updates = 4\nepisode = 2", 'Did you mean "episodes"'),
        ("hidden_dims = [8]\ncr", "hiden_dims = [8]\ncr", "hidden_dims"),
        ("threads = 1", "discount = 0.9", r"in \[settings\]"),
        ('preset = "bc"', 'preset = "cql"', "expected bc, qam"),
        ("mixture_weight = 0.1", "mixture_weight = 1.5", "mixture_weight"),
        ("transitions = 200", "", "either transitions"),
        ('tasks = ["rare", "never"]', 'tasks = ["rare"]', "mode_shares"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tiny: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    tiny.write_text(TINY.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        suite_file.read_suite(tiny)


def test_a_maze_recorded_once_has_every_task_s_own_rewards(tmp_path: Path) -> None:
    task = suite_file.Task("maze", "3", "pointmaze-medium-navigate-singletask-task3-v0", 4000)
    found = recordings.open_data(task, tmp_path, seed=5)
    own = collect(task.environment_id, 4000, seed=5, dataset_id="own/task3-v0", root=tmp_path)
    expected = OfflineDataset.from_minari(own)
    for name in ("observations", "actions", "rewards", "terminations", "episode_ends"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.rewards == 0).any()
    assert found.environment_id == expected.environment_id == task.environment_id
    assert found.recorded_environment == expected.recorded_environment
    assert len(list((tmp_path / "tasks").glob("[!.]*"))) == 1
    other = replace(task, label="1", environment_id=task.environment_id.replace("task3", "task1"))
    assert recordings.record_data(other, tmp_path, 5) == recordings.record_data(task, tmp_path, 5)


def test_sparse_rewards_are_minus_one_unless_all_goals_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 40
    ends = np.arange(n) % 10 == 9
    made = OfflineDataset.from_arrays(
        np.zeros((n, 1)), np.zeros((n, 1)), -(np.arange(n) % 4.0), np.zeros((n, 1)), np.zeros(n), ends
    )
    monkeypatch.setattr(recordings, "record_data", lambda *_: tmp_path)
    monkeypatch.setattr(recordings.OfflineDataset, "from_minari", lambda _: replace(made, environment_id="x"))
    task = suite_file.Task("puzzle", "1", "x", 40, sparse=True)
    assert recordings.open_data(task, tmp_path, 0).rewards.tolist() == [0, -1, -1, -1] * 10


def test_data_that_never_enter_the_pocket_never_succeed(tmp_path: Path) -> None:
    tasks = suite_file.read_suite(TASKS / "minutes.toml").tasks
    for name, lowest, highest in (("pockets-north-5", 0.01, 0.12), ("pockets-north-never", 0.0, 0.0)):
        task = replace(tasks[name], transitions=3000)
        about = recordings.summarise(recordings.open_data(task, tmp_path, 0), task.success_reward)
        assert (about["transitions"], about["episodes"]) == (3000, 150)
        assert lowest <= about["success"] <= highest


def test_files_of_ogbench_are_read_with_each_task_s_rewards(tmp_path: Path) -> None:
    task = suite_file.read_suite(TASKS / "gpu.toml").tasks["antmaze-large-1"]
    with pytest.raises(NotFoundError, match=r"antmaze-large-navigate-v0\.npz"):
        recordings.record_data(task, tmp_path, 0)
    # The documented layout: T rows a trajectory, the last of them terminal, and the simulator's states.
    generator, rows = np.random.default_rng(0), 30
    states = generator.uniform(0, 20, (rows, 15)).astype(np.float32)
    arrays = {
        "observations": generator.normal(size=(rows, 29)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (rows, 8)).astype(np.float32),
        "terminals": (np.arange(rows) % 15 == 14).astype(np.float32),
        "qpos": states,
        "qvel": np.zeros((rows, 14), np.float32),
    }
    np.savez(tmp_path / task.files[0], **arrays)
    found = recordings.open_data(task, tmp_path, 0)
    assert len(found) == 28
    assert found.environment_id == task.environment_id
    assert set(np.unique(found.rewards)) <= {-1.0, 0.0}


def test_a_suite_resumes_refuses_and_reports(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = [str(tiny), "--output", str(output), "--jobs", "0"]
    assert run.main([*command, "--only", "pockets-rare", "--method", "bc"]) == 0
    assert run.main(command) == 0
    said = capsys.readouterr().out
    assert "4 jobs, 1 of them done before." in said
    assert "[4 of 4] pockets-never-me-am-seed0: sampled " in said
    files = {file.name: file.stat().st_mtime_ns for file in (output / "jobs").iterdir()}
    assert run.main(command) == 0
    assert files == {file.name: file.stat().st_mtime_ns for file in (output / "jobs").iterdir()}

    result = json.loads((output / "jobs" / "pockets-rare-me-am-seed0.json").read_text())
    assert result["settings"] == json.loads(TrainConfig.to_json(config_of(tiny, "me-am")))
    assert [row["step"] for row in result["curve"]] == [2, 4]
    assert result["train_seconds"] > 0
    assert result["train_cpu_seconds"] > 0
    for acting in ("sampled", "zero_noise"):
        assert len(result[acting]["returns"]) == len(result[acting]["successes"]) == 2
    assert (output / "policies" / "pockets-rare-me-am-seed0" / "policy.onnx").is_file()
    assert not (output / "runs" / "pockets-rare-me-am-seed0" / "checkpoints").exists()

    for changed in (["--updates", "5"], ["--episodes", "3"], ["--transitions", "300"]):
        with pytest.raises(SystemExit, match=r"differs in .* Choose another --output"):
            run.main([*command, *changed])
    tiny.write_text(TINY.replace("mixture_weight = 0.1", "mixture_weight = 0.2"))
    with pytest.raises(SystemExit, match=r"differs in settings \(mixture_weight\)"):
        run.main(command)

    assert report.main([str(output)]) == 0
    text = (output / "report.md").read_text()
    assert "| task | seeds | data | bc | me-am |" in text
    assert "| all (2 tasks) |" not in text  # one domain is all
    assert "| pockets (2 tasks) | IQM |" in text
    assert "Probability of improvement, mean over 2 tasks" in text
    for name in ("tasks.png", "curves.png"):
        assert (output / name).stat().st_size > 10_000


def config_of(file: Path, method: str) -> Any:
    return first_job(suite_file.read_suite(file), method).config


def test_an_interrupted_job_ends_as_an_uninterrupted_one(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, data = first_job(suite_file.read_suite(tiny), "me-am"), tmp_path / "data"
    whole = run.run_job(job, tmp_path / "whole", data)
    assert not whole["resumed"]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "export_policy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_job(job, tmp_path / "parts", data)
    assert run.read_result(job, tmp_path / "parts")["finished"] is False
    assert report.read_results(tmp_path / "parts") == []
    parts = run.run_job(job, tmp_path / "parts", data)
    assert parts["resumed"]
    assert parts["train_cpu_seconds"] is None
    for acting in ("sampled", "zero_noise"):
        assert parts[acting]["returns"] == whole[acting]["returns"]


def test_a_run_that_failed_counts_as_no_success(tmp_path: Path) -> None:
    def result(method: str, successes: list[bool] | None) -> dict[str, Any]:
        task = {"domain": "maze", "label": "1", "sparse": False}
        base = {"task": task, "method": method, "preset": method, "seed": 0, "updates": 1, "episodes": 2, "curve": []}
        data = {"transitions": 1, "episodes": 1, "return_mean": -1.0, "best_tenth": -1.0, "success": 0.0}
        base |= {"data": data, "error": None, "train_cpu_seconds": 1.0, "train_seconds": 1.0}
        if successes is None:
            return base | {"error": "DivergedError: at step 1"}
        acted = {"successes": successes, "returns": [float(s) for s in successes]}
        return base | {"sampled": acted, "zero_noise": acted}

    text = report.tables([result("bc", None), result("me-am", [True, True])])
    assert "| maze-1 | 1 | 0 | 0 [0, 0] | 100 [100, 100] |" in text
    assert "maze-1, bc, seed 0: DivergedError" in text


def test_the_figures_are_those_of_rliable() -> None:
    # rliable 1.2.0: metrics.aggregate_mean, aggregate_iqm and probability_of_improvement of these arrays.
    x, y = (np.random.default_rng(seed).random((3, 5)) for seed in (0, 1))
    scores, others = list(x.T), list(y.T)
    assert intervals.mean_over_tasks(scores) == pytest.approx(0.5296228321098047, rel=1e-12)
    assert intervals.iqm(scores) == pytest.approx(0.576250943665541, rel=1e-12)
    assert intervals.improvement(scores, others) == pytest.approx(0.5333333333333333, rel=1e-12)
    assert intervals.improvement(scores, scores) == 0.5


def test_intervals_are_those_of_the_binomial_and_of_the_seeds() -> None:
    # One seed: the share of n episodes, whose standard error is sqrt(p (1 - p) / n).
    one = np.repeat([0.0, 1.0], [150, 250])[None]
    found = intervals.estimate(intervals.mean_over_tasks, {"a": one}, resamples=20_000)
    assert found.value == 0.625
    half = 1.96 * np.sqrt(0.625 * 0.375 / 400)
    assert found.low == pytest.approx(0.625 - half, abs=0.004)
    assert found.high == pytest.approx(0.625 + half, abs=0.004)
    # Seeds that differ more than episodes: more episodes do not narrow the interval.
    spread = np.repeat([[0.0], [1.0]], 1000, axis=1)
    assert intervals.estimate(intervals.mean_over_tasks, {"a": spread})[1:] == (0, 1)
    # Strata: tasks that differ in their level alone leave no interval.
    levels = {name: np.full((3, 4), level) for name, level in (("a", 0.0), ("b", 1.0))}
    assert intervals.estimate(intervals.mean_over_tasks, levels) == (0.5, 0.5, 0.5)
    better = {name: episodes + 1 for name, episodes in levels.items()}
    assert intervals.estimate(intervals.improvement, better, levels) == (1, 1, 1)
    assert intervals.estimate(intervals.improvement, levels, levels) == (0.5, 0.5, 0.5)


def test_a_folder_without_results_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "no finished jobs" in capsys.readouterr().err
