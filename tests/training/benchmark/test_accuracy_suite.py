"""The accuracy suite in benchmarks/accuracy: its closed forms, its distances, and one cheap run of it."""

from __future__ import annotations

import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meam_policy import DivergedError
from meam_training.algorithm.q_maximizer import maximize_q

ACCURACY = Path(__file__).parents[3] / "benchmarks" / "accuracy"
sys.path.insert(0, str(ACCURACY))  # its scripts import each other by name, as a script's folder is on the path
names = ("problems", "metrics", "run", "report", "reading")
problems, metrics, suite, report, reading = (importlib.import_module(name) for name in names)

SPECIAL = [run for run in problems.RUNS.values() if run.faces or run.adaptive or run.mirror_stages > 1]
PLAIN = [run for run in problems.RUNS.values() if run not in SPECIAL]
CELLS = [(run, context) for run in PLAIN for context in problems.CONTEXTS[run.dim]]
LINE = [(run, context) for run, context in CELLS if run.dim == 1]


def named(value: Any) -> str:
    return value.name.replace(" ", "-")


def gaussian(x: float, mean: float, std: float) -> float:
    return math.exp(-(((x - mean) / std) ** 2) / 2) / math.sqrt(2 * math.pi) / std


def moments(grid: Any, mass: Any) -> tuple[Any, Any]:
    mean = mass @ grid.points
    return mean, mass @ np.square(grid.points - mean)


@pytest.mark.parametrize(("run", "context"), LINE, ids=named)
def test_the_target_is_the_closed_form_by_quadrature(run: Any, context: Any) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    (goal,) = context.goal

    def behaviour(a: float) -> float:
        parts = zip(context.weights, context.means, context.stds, strict=True)
        return sum(w * gaussian(a, mean[0], std) for w, mean, std in parts)

    def integral(density: Any, low: float, high: float) -> float:
        return integrate.quad(density, low, high, points=[p for p in (-0.5, 0, 0.5) if low < p < high], limit=200)[0]

    kept, guided = integral(behaviour, -1, 1), integral(lambda a: gaussian(a, goal, 0.1), -1, 1)
    w, power, tau = run.mixture_weight, 1 - run.entropy_coef, run.inverse_temperature

    def prior(a: float) -> float:
        return (1 - w) * behaviour(a) / kept + w * gaussian(a, goal, 0.1) / guided

    def target(a: float) -> float:
        return prior(a) ** power * math.exp(tau * 2 * math.exp(-((a - goal) ** 2) / (2 * 0.09)))

    grid = problems.make_grid(1)
    whole = integral(target, -1, 1)
    for low, high in ((-1, 0), (-0.6, -0.4), (0.3, 0.5), (0.45, 0.9)):
        inside = (grid.points[:, 0] > low) & (grid.points[:, 0] < high)
        assert run.prior(context, grid)[inside].sum() == pytest.approx(integral(prior, low, high), abs=1e-5)
        assert run.target(context, grid)[inside].sum() == pytest.approx(integral(target, low, high) / whole, abs=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_a_gaussian_times_a_quadratic_reward_is_the_known_gaussian(dim: int) -> None:
    class Quadratic(problems.Context):
        def reward(self, actions: Any) -> Any:
            return -np.square(actions - 0.3).sum(axis=1) / 2

    context, grid = Quadratic("", (1.0,), ((-0.1,) * dim,), (0.1,), goal=(0.3,) * dim), problems.make_grid(dim)
    # Precisions add: (1 - lambda) / std² of the prior and tau of the reward.
    power, tau = 0.5, 40.0
    precision = power / 0.1**2 + tau
    mean, variance = moments(grid, problems.Run(dim, 1 - power, tau, 0.0).target(context, grid))
    assert mean == pytest.approx((power / 0.1**2 * -0.1 + tau * 0.3) / precision, abs=1e-5)
    assert variance == pytest.approx(1 / precision, abs=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
def test_without_reward_and_entropy_the_target_is_the_prior(dim: int) -> None:
    run, grid = problems.Run(dim, 0.0, 0.0, 0.2), problems.make_grid(dim, 200)
    for context in problems.CONTEXTS[dim]:
        np.testing.assert_allclose(run.target(context, grid), run.prior(context, grid), rtol=1e-9)


def test_the_wider_mixture_has_its_share_at_the_goal() -> None:
    context, grid = problems.CONTEXTS[1][2], problems.make_grid(1)
    masses = [problems.Run(1, 0.0, 1.0, w).prior(context, grid) for w in (0.0, 0.2)]
    near = np.abs(grid.points[:, 0] - context.goal[0]) < 0.1
    guided = (masses[1] - 0.8 * masses[0]) / 0.2
    assert guided[near].sum() == pytest.approx(math.erf(1 / math.sqrt(2)), abs=1e-3)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_goal_is_the_only_maximiser_and_the_suite_s_search_finds_it(dim: int) -> None:
    grid, value = problems.make_grid(dim, 200), problems.make_value(dim)
    settings = suite.COMMON
    generator = np.random.default_rng(0)
    for index, context in enumerate(problems.CONTEXTS[dim]):
        rewards = context.reward(grid.points)
        best = grid.points[rewards.argmax()]
        assert np.abs(best - context.goal).max() <= grid.width
        assert (rewards < rewards.max() - 1e-3).mean() > 0.95
        starts = torch.from_numpy(context.sample(64, generator)).float()[None]
        observations = torch.eye(len(problems.CONTEXTS[dim]))[index].expand(64, -1)
        found, _ = maximize_q(
            lambda x, observations=observations: value(observations.expand(len(x), -1, -1), x),
            starts,
            settings["ascent_steps"],
            settings["ascent_step_size"],
            settings["trust_radius"],
        )
        assert np.abs(found.numpy() - context.goal).max() < 0.02


@pytest.mark.parametrize("dim", [1, 2])
def test_the_data_are_one_step_episodes_of_the_behaviour(dim: int) -> None:
    dataset, rows = problems.make_dataset(dim, 4000), 4000
    assert dataset.terminations.all()
    assert dataset.episode_ends.all()
    assert np.abs(dataset.actions).max() <= 1
    rewards = problems.make_value(dim)(torch.from_numpy(dataset.observations), torch.from_numpy(dataset.actions))
    np.testing.assert_allclose(rewards.numpy(), dataset.rewards, atol=1e-5)
    run, grid = problems.Run(dim, 0.0, 0.0, 0.0), problems.make_grid(dim)
    for index, context in enumerate(problems.CONTEXTS[dim]):
        actions = dataset.actions[index * rows : (index + 1) * rows].astype(np.float64)
        assert (dataset.observations[index * rows : (index + 1) * rows] == np.eye(4)[index]).all()
        found = metrics.mode_masses(context, actions)
        expected = metrics.mode_masses(context, grid.points, run.prior(context, grid))
        np.testing.assert_allclose(found, expected, atol=0.03)
        assert found.sum() == pytest.approx(1)
    assert problems.make_dataset(dim, 10).fingerprint == problems.make_dataset(dim, 10).fingerprint


def test_the_distance_of_shifted_gaussians_is_the_shift() -> None:
    points = problems.make_grid(1).points
    density = [np.exp(-np.square(points[:, 0] - mean) / (2 * 0.1**2)) for mean in (-0.2, 0.15)]
    first, second = (metrics.projected_cdf(points, mass / mass.sum()) for mass in density)
    assert metrics.wasserstein(first, second, 1) == pytest.approx(0.35, abs=1e-4)


def test_the_distance_of_samples_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    first, second = generator.uniform(-1, 1, (300, 1)), generator.uniform(-0.5, 1, (500, 1)) ** 2
    found = metrics.wasserstein(metrics.projected_cdf(first), metrics.projected_cdf(second), 1)
    assert found == pytest.approx(stats.wasserstein_distance(first[:, 0], second[:, 0]), abs=5e-4)


def test_the_sliced_distance_of_a_shift_is_two_over_pi_of_its_length() -> None:
    points = np.random.default_rng(0).normal(0, 0.1, (2000, 2))
    shift = np.array([0.3, -0.2])
    found = metrics.wasserstein(metrics.projected_cdf(points), metrics.projected_cdf(points + shift), 2)
    # The mean of |cos| over all directions is 2 / pi.
    assert found == pytest.approx(2 / math.pi * np.linalg.norm(shift), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "context"), [*LINE, CELLS[-1]], ids=named)
def test_samples_of_the_prior_are_at_1_and_of_the_target_at_the_floor(run: Any, context: Any) -> None:
    grid = problems.make_grid(run.dim)
    target, generator = metrics.Target(run, context, grid), np.random.default_rng(1)
    floor = target.floor(5000)
    assert 0 < floor < 0.06
    assert target.normalised_w1(grid.sample(run.prior(context, grid), 5000, generator)) == pytest.approx(1, abs=0.06)
    assert target.normalised_w1(grid.sample(run.target(context, grid), 5000, generator)) < 4 * floor


def test_the_suite_has_forty_cells_and_every_job_has_valid_settings() -> None:
    assert len(CELLS) == 40
    assert all(run.name == name for name, run in suite.ALL_RUNS.items())
    for method in suite.METHODS:
        for name, run in suite.ALL_RUNS.items():
            config = suite.Job(method, "learned", name, 3).config
            assert (config.method, config.seed, config.objective) == ("me-am", 3, suite.METHODS[method]["objective"])
            assert config.inverse_temperature == run.settings["inverse_temperature"]
            assert (config.entropy_coef, config.chunk_size) == (run.entropy_coef, 1)
            if run.settings["mixture_weight"]:
                assert config.mixture_bandwidth == problems.BANDWIDTH
    for context in (*problems.CONTEXTS[1], *problems.CONTEXTS[2]):
        assert sum(context.weights) == pytest.approx(1)
        assert tuple(context.modes[-1]) == context.goal


def test_a_diverged_job_is_recorded_reported_and_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*args: Any, **kwargs: Any) -> None:
        raise DivergedError("The gradient of update 7 is not finite.")

    monkeypatch.setattr(suite, "train", diverge)
    job = suite.Job("reference", "true", "1d-0.9-3-0", 0)
    assert suite.run_jobs([job], tmp_path, workers=0) == 0
    assert "1d-0.9-3-0-seed0: diverged" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "jobs").iterdir()) == [f"{job.name}.json", f"{job.name}.npz"]
    monkeypatch.setattr(suite, "train", lambda *args, **kwargs: pytest.fail("done again"))
    assert suite.run_jobs([job], tmp_path, workers=0) == 0

    text = report.tables(reading.read_results(tmp_path))
    assert "| reference | diverged | diverged | 0 of 4 | - | 1 of 1 | 0 |" in text
    assert "- reference, 1d-0.9-3-0, seed 0: DivergedError: The gradient of update 7 is not finite." in text
    assert "| 1d-0.9-3-0 | rare | 0.10 | 0.99 | diverged |" in text
    with pytest.raises(SystemExit, match="differs in settings from what is asked for"):
        suite.run_jobs([suite.Job("reference", "true", "1d-0.9-3-0", 0, {"steps": 7000})], tmp_path, workers=0)


def test_a_folder_without_results_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 1
    assert "holds no finished jobs" in capsys.readouterr().err


def test_two_mirror_stages_tilt_twice_and_faces_hold_their_share() -> None:
    context, grid = problems.CONTEXTS[1][1], problems.make_grid(1)
    twice = problems.Run(1, 0.0, 1.0, 0.0, mirror_stages=2).target(context, grid)
    np.testing.assert_allclose(twice, problems.Run(1, 0.0, 2.0, 0.0).target(context, grid), rtol=1e-9)
    prior = problems.Run(1, 0.0, 1.0, 0.0, faces=0.3).prior(context, grid)
    assert prior.sum() == pytest.approx(1)
    assert prior[[0, -1]] == pytest.approx([0.27, 0.03], abs=1e-3)
    actions = problems.make_dataset(1, 20_000, faces=0.3).actions[20_000:40_000]
    assert [(actions == side).mean() for side in (-1, 1)] == pytest.approx([0.27, 0.03], abs=0.01)


@pytest.mark.slow
def test_the_reweighted_policy_comes_close_to_its_targets_with_few_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "SAMPLES", 8000)
    quick = {"learning_rate": 1e-2, "hidden_dims": (32, 32), "batch_size": 128}
    monkeypatch.setattr(suite, "COMMON", {**suite.COMMON, **quick})
    command = ["--output", str(tmp_path), "--method", "reweighted", "--run", "1d-0.5-1-0", "--jobs", "0"]
    assert suite.main([*command, "--steps", "600", "--pretrain-steps", "250"]) == 0
    (path,) = (tmp_path / "jobs").glob("*.json")
    cells = {cell["context"]: cell for cell in json.loads(path.read_text())["cells"]}
    assert cells["rare"]["normalised_w1"] < 0.5  # 0.34 at most with seeds 0 to 2; that of the prior is 1
    assert cells["rare"]["mode_mass"][-1] > 0.3  # a tenth of the data
    assert all(cell["max_action"] <= 1 for cell in cells.values())
    assert report.main([str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.glob("true*")} == {"true.md", "true-overview.png", "true-reweighted.png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "critic"),
    [("5d-bump-0-2m-2-1", "true"), ("25d-lin-0-2m-1.5-1-context", "true"), ("5d-lin-0-2m-2-1", "exact")],
)
def test_a_job_on_chunks_is_measured_and_reported_beside_its_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, critic: str
) -> None:
    monkeypatch.setattr(suite, "SAMPLES", 4000)
    monkeypatch.setattr(suite, "PRIOR_SAMPLES", 20_000)
    command = ["--output", str(tmp_path), "--method", "reweighted", "--run", name, "--critic", critic, "--jobs", "0"]
    assert suite.main([*command, "--steps", "10", "--pretrain-steps", "5"]) == 0
    (path,) = (tmp_path / "jobs").glob("*.json")
    (cell,) = json.loads(path.read_text())["cells"]
    # Hardly trained: about where the prior is, and wider than a mode.
    assert cell["normalised_w1"] > 0.5
    assert cell["stiff_log_variance"] > 1
    assert sum(cell["mode_mass"]) == pytest.approx(1)
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / f"{critic}.md").read_text()
    assert [line.split("|")[2].strip() for line in text.splitlines()[4:7]] == ["floor", "tilted prior", "reweighted"]
    assert (tmp_path / f"{critic}-chunks.png").is_file()


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, str(ACCURACY / "run.py"), "--output", str(tmp_path), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("jobs/.*/training/metrics.csv")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert stderr == "Interrupted; finished jobs are kept. Run the same command to go on.\n"
    assert list((tmp_path / "jobs").iterdir()) == []
