"""The comparison in benchmarks/realtime: what it measures, how it counts waiting, and one tiny run of it."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy import BoxSpec, PolicySpec
from meam_policy.rollouts.result import mean_interval
from meam_policy.spec import Integration
from meam_training import OfflineDataset, TrainConfig, collect, train

REALTIME = Path(__file__).parents[2] / "benchmarks" / "realtime"
sys.path.insert(0, str(REALTIME))  # its modules import each other by name, as a script's folder is on the path
smoothness, episodes, delay_report = (
    importlib.import_module(name) for name in ("smoothness", "episodes", "delay_report")
)


def load_script() -> Any:
    # By its path: other benchmarks have a run.py too.
    spec = importlib.util.spec_from_file_location("realtime_run", REALTIME / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_straight_line_of_actions_has_no_jerk_and_one_jump_everywhere() -> None:
    actions = np.arange(9.0)[:, None] * [1.0, -2.0]
    begins = np.arange(9) % 4 == 0
    found = smoothness.smoothness(actions, begins, np.zeros(9, bool), [2.0, 4.0])
    assert (found.jerk, found.boundary_jump, found.inner_jump) == (0, 0.5, 0.5)


def test_jumps_are_sorted_by_where_a_chunk_begins_and_held_ticks_count_in_the_jerk_alone() -> None:
    # chunk 1: 0, 1; held: 1, 1; chunk 2: 4, 6
    found = smoothness.smoothness([[0], [1], [1], [1], [4], [6]], [1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1])
    assert found.boundary_jump == 3
    assert found.inner_jump == np.mean([1, 2])
    assert found.jerk == np.mean([(-1) ** 2, 0, 3**2, (-1) ** 2])


def test_what_an_episode_does_not_have_is_nan() -> None:
    found = smoothness.smoothness([[0.0], [1.0]], [True, False], [False, False], [1.0])
    assert np.isnan([found.jerk, found.boundary_jump]).all()
    assert found.inner_jump == 1


@given(st.integers(0, 2**32 - 1))
def test_the_measures_have_no_unit_and_ignore_a_constant(seed: int) -> None:
    random = np.random.default_rng(seed)
    actions, begins, held = random.normal(size=(12, 3)), random.random(12) < 0.3, random.random(12) < 0.2
    width, scale, shift = random.uniform(0.5, 2, 3), random.uniform(0.5, 9, 3), random.normal(size=3)
    one = smoothness.smoothness(actions, begins, held, width)
    other = smoothness.smoothness(actions * scale + shift, begins, held, width * scale)
    for name in ("jerk", "boundary_jump", "inner_jump"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, nan_ok=True)


class CountingPolicy:
    """Every action of chunk n is n, or whatever the prefix is where that has the weight 1."""

    takes_prefix = True

    def __init__(self) -> None:
        box = {"dtype": "float32", "low": (-100.0,), "high": (100.0,)}
        self.spec = PolicySpec(
            integration=Integration(nfe=1),
            observation=(BoxSpec(shape=(1,), **box),),
            action=BoxSpec(shape=(1,), **box),
            chunk_size=4,
            execute_steps=2,
            observation_mean=(0.0,),
            observation_std=(1.0,),
            action_offset=(0.0,),
            action_scale=(1.0,),
            method="by hand",
        )
        self.chunks = 0

    def predict_action_chunk(self, observation: Any, *, prefix: Any = None, prefix_weight: Any = None) -> Any:
        self.chunks += 1
        chunk = np.full((4, 1), self.chunks, np.float32)
        return chunk if prefix is None else np.where(prefix_weight[:, None] == 1, prefix, chunk)

    def reset(self, seed: int | None = None) -> None:
        self.chunks = 0

    def accepts(self, observation: Any) -> bool:
        return True

    def limit_action(self, action: Any) -> Any:
        return action


class TwelveSteps(gymnasium.Env[Any, Any]):
    """Pays 1 a step for 12 steps, and reports success at the fifth alone."""

    def __init__(self) -> None:
        self.actions: list[float] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.actions = []
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.actions.append(float(action[0]))
        count = len(self.actions)
        return np.zeros(1, np.float32), 1.0, False, count == 12, {"success": count == 5}


def run_twelve(chunking: str, delay: int) -> tuple[Any, list[float]]:
    env = TwelveSteps()
    runs = episodes.delayed_episodes(CountingPolicy(), env, chunking, delay, episodes=2, seed=0, execute_steps=2)
    first, second = runs
    assert second == episodes.EpisodeFigures(**{**vars(first), "episode": 1})
    return first, env.actions


def test_the_environment_goes_on_with_the_held_action_while_blocking_waits() -> None:
    figures, actions = run_twelve("blocking", 2)
    assert actions == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert (figures.waiting, figures.overruns, figures.inferences, figures.missed) == (6, 0, 3, 0.5)
    assert (figures.success, figures.episode_return, figures.length) == (1, 12, 12)
    assert (figures.boundary_jump, figures.inner_jump) == pytest.approx((1 / 100, 0))


def test_naive_chunks_leave_no_gap_that_half_a_chunk_can_bridge() -> None:
    figures, actions = run_twelve("naive", 2)
    assert actions == [1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert (figures.waiting, figures.overruns, figures.inferences) == (0, 0, 5)


def test_a_delay_beyond_half_a_chunk_leaves_ticks_without_an_action() -> None:
    figures, actions = run_twelve("naive", 3)
    assert actions == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert (figures.waiting, figures.overruns, figures.missed) == (0, 5, 5 / 12)


@pytest.mark.slow
def test_a_measure_that_no_episode_has_is_missing_from_the_cell_and_named_so_in_the_table() -> None:
    first, _ = run_twelve("naive", 2)
    unknown = episodes.EpisodeFigures(**{**vars(first), "success": float("nan")})
    cell = delay_report.cell_figures([unknown, unknown])
    assert "success" not in cell.means
    assert cell.means["episode_return"] == (12, 12, 12)
    assert delay_report.markdown_table([cell]).splitlines()[-1].startswith("| 2 | naive | none | 12.0 [12.0, 12.0] |")


def test_gains_are_differences_between_episodes_of_one_number_at_delays_that_all_were_run_at() -> None:
    first, _ = run_twelve("naive", 2)
    returns = {"naive": (1.0, 5.0), "blocking": (0.0, 9.0), "realtime": (2.0, 6.0)}
    runs = [
        episodes.EpisodeFigures(
            **{**vars(first), "chunking": chunking, "episode": number, "episode_return": value, "delay": delay}
        )
        for chunking, values in returns.items()
        for number, value in enumerate(values)
        for delay in ((3, 4) if chunking == "blocking" else (3,))
    ]
    rows = delay_report.gain_table(runs).splitlines()[2:]
    assert rows == ["| 3 | 1.00 [1.00, 1.00] | -0.50 [-3.00, 2.00] |"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mujoco")
    dataset = OfflineDataset.from_minari(collect("meam/Pockets-v0", 200, root=tmp_path_factory.mktemp("data")))
    config = TrainConfig.preset(
        "bc",
        steps=60,
        batch_size=64,
        hidden_dims=(16,),
        learning_rate=1e-3,
        chunk_size=8,
        nfe=4,
        device="cpu",
    )
    folder = tmp_path_factory.mktemp("run")
    train(config, dataset, folder)
    return folder


@pytest.mark.slow
def test_the_same_command_writes_the_same_figures_and_realtime_chunks_jump_least(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script()
    monkeypatch.setattr(delay_report, "mean_interval", partial(mean_interval, resamples=50))
    arguments = ["--run", str(run_folder), "--episodes", "2", "--delays", "0", "2"]
    for name in ("one", "two"):
        script.main([*arguments, "--output-dir", str(tmp_path / name)])
    for file in ("episodes.csv", "cells.csv"):
        assert (tmp_path / "one" / file).read_text() == (tmp_path / "two" / file).read_text()
    assert (tmp_path / "one" / "delays.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "one" / "cells.csv").open() as stream:
        cells = {(row.pop("chunking"), int(row.pop("delay"))): row for row in csv.DictReader(stream)}
    assert len(cells) == 6
    assert cells["naive", 0] == cells["blocking", 0]  # a chunk that arrives at once need not be waited for
    assert float(cells["realtime", 2]["boundary_jump_mean"]) < float(cells["naive", 2]["boundary_jump_mean"])
    assert int(cells["blocking", 2]["waiting"]) > 0
    assert capsys.readouterr().out.count("| realtime |") == 4
