"""`meam bench infer`: what its contestants compute, how they are timed, and what the tables make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_export.benchmark import (
    ENTRANTS,
    GPU_ENTRANTS,
    Conditions,
    InferenceSetting,
    Outcome,
    Problem,
    checkpoint_problem,
    environment,
    make_setting,
    prepare,
    race,
    random_problem,
    weight_bytes,
    worker,
)
from meam_export.benchmark.contestants import obstacle
from meam_export.benchmark.floor import compile_kernel, record_floor
from meam_export.benchmark.floor_actor import PANEL
from meam_export.benchmark.problem import formula_obstacle
from meam_export.benchmark.race import EXACT, require_parity
from meam_export.benchmark.report import (
    COLUMNS,
    cells,
    goals,
    markdown,
    measured_floor,
    notes,
    paced_calls,
    summarise,
    to_json,
)
from meam_export.commands.bench_infer import BenchInferArguments
from meam_export.graph.parity import TOLERANCES
from meam_policy.cli import run
from meam_policy.errors import ConfigError, NotFoundError, OutputError, ParityError
from meam_training import TrainConfig
from meam_training.benchmark import Contestant
from meam_training.networks.meam_networks import build_networks

TINY = InferenceSetting("large", 4, 2, 3, (16, PANEL), 3, nfe=5)
CONDITIONS = Conditions(calls=5, rate=200.0)
IN_THIS_PROCESS = [name for name, e in ENTRANTS.items() if e.actor == "numpy" or e.graph == "lean" or e.form == "eager"]
FLOORS = [name for name, e in ENTRANTS.items() if e.actor == "floor"]
QUICKLY = {"AOT_INDUCTOR_DEBUG_COMPILE": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Has torch.compile neither optimise nor vectorise: nothing here depends on how fast anyone is."""

FAKE_JAX = """
import numpy as np
__version__ = "0"
def jit(function): return function
def device_put(arrays): return arrays
class nn:
    def gelu(x, approximate):
        assert approximate
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
"""

STAND_IN = """
import json, sys
print(json.dumps({"max_error": float(sys.argv[2]), "rms_error": 0.0, "first_seconds": 1.0}), flush=True)
for line in sys.stdin:
    form, calls = line.split()
    print(sys.argv[1], form, calls, file=open(sys.argv[3], "a"))
    print(json.dumps([0.25] * int(calls)), flush=True)
"""

Actors = Callable[[str], Callable[[Any, Any], Any]]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return random_problem(TINY)


@pytest.fixture(scope="module")
def prepared(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The tasks of those that are quickly prepared; `test_contestants_of_every_kind_race` has the others."""
    folder = tmp_path_factory.mktemp("tiny")
    contestants, skipped = prepare(problem, IN_THIS_PROCESS + FLOORS, CONDITIONS, folder)
    assert set(skipped) <= {"floor-c"}
    return {contestant.name: json.loads(contestant.command[2]) for contestant in contestants}


def actor_of(task: dict[str, Any]) -> Callable[[Any, Any], Any]:
    return worker.load_actor(task["actor"]).make(Path(task["folder"]), task)


def recorded_of(task: dict[str, Any]) -> dict[str, Any]:
    with np.load(Path(task["folder"]) / task["inputs"]) as file:
        return dict(file)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def values_of(weights: dict[str, np.ndarray], inputs: np.ndarray) -> np.ndarray:
    values = []
    for member in range(TINY.num_critics):
        hidden = inputs
        for i in range(3):
            w, b = (weights[f"target_critic.{kind}.{i}"][member] for kind in ("weights", "biases"))
            hidden = hidden @ w + b
            if i < 2:
                hidden = gelu(hidden)
                hidden = hidden - hidden.mean(axis=-1, keepdims=True)
                hidden = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + 1e-6)
                scale, shift = (weights[f"target_critic.{kind}.{i}"][member] for kind in ("norm_scales", "norm_biases"))
                hidden = hidden * scale + shift
        values.append(hidden[..., 0])
    return np.mean(values, axis=0)


def numpy_policy(problem: Problem, steps: int, best_of: int, observation: Any, noise: Any) -> np.ndarray:
    """Written from the definition, in float64: [batch, obs] and [batch, noise] to [batch, chunk_size, action_dim]."""
    weights = {name: value.double().numpy() for name, value in problem.networks.state_dict().items()}
    spec, layers = problem.spec, len(problem.setting.hidden_dims) + 1
    s = (observation - np.array(spec.observation_mean)) / np.array(spec.observation_std)
    chunks = []
    for x in np.split(noise.astype(np.float64), best_of, axis=-1):
        for k in range(steps):
            hidden = np.concatenate([s, x, np.full((len(x), 1), k / steps)], axis=1)
            for i in range(layers):
                hidden = gelu(hidden) if i else hidden
                hidden = hidden @ weights[f"policy.layers.{i}.weight"].T + weights[f"policy.layers.{i}.bias"]
            x = x + hidden / steps
        chunks.append(x.clip(-1, 1))
    best = np.zeros(len(s), int)
    if best_of > 1:
        best = np.argmax([values_of(weights, np.concatenate([s, chunk], axis=1)) for chunk in chunks], axis=0)
    taken = np.array(chunks)[best, np.arange(len(s))].reshape(len(s), spec.chunk_size, spec.action_dim)
    return np.array(spec.action_offset) + np.array(spec.action_scale) * taken


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_every_contestant_computes_the_policy(name: str, problem: Problem, prepared: dict[str, Any]) -> None:
    entrant, task = ENTRANTS[name], prepared[name]
    act, recorded = actor_of(task), recorded_of(task)
    steps = entrant.nfe or TINY.nfe
    off = []
    for observation, noise, expected in zip(*(recorded[k] for k in ("observation", "noise", "expected")), strict=True):
        exact = numpy_policy(problem, steps, entrant.best_of, observation, noise)
        assert np.abs(exact - expected).max() < 1e-6  # what the workers compare with
        found = np.array(act(observation, noise), np.float64).reshape(exact.shape)
        off.append((found - exact) / np.array(problem.spec.action_scale))
    if entrant.precision == "fp32":
        assert np.abs(off).max() < 1e-5
    else:
        assert np.sqrt(np.square(off).mean()) < TOLERANCES[entrant.precision]
        assert np.abs(off).max() > 1e-6
    assert recorded["expected"].std(axis=0).min() > 0.01


@pytest.mark.parametrize("name", FLOORS)
def test_the_floor_multiplies_by_the_matrices_of_every_step(
    name: str, problem: Problem, prepared: dict[str, Any]
) -> None:
    if name not in prepared:
        pytest.skip("there is no C compiler")
    act, recorded = actor_of(prepared[name]), recorded_of(prepared[name])
    weights = {key: value.double().numpy() for key, value in problem.networks.state_dict().items()}
    matrices = [weights[f"policy.layers.{i}.weight"] for i in range(3)]
    matrices[0] = matrices[0][:, TINY.observation_dim : -1]
    for observation, noise in zip(recorded["observation"], recorded["noise"], strict=True):
        if name == "floor-sum":
            exact: Any = sum(matrix.sum() for matrix in matrices)
        else:
            once = np.eye(6) + matrices[2] @ matrices[1] @ matrices[0] / TINY.nfe
            exact = noise @ np.linalg.matrix_power(once, TINY.nfe).T
        assert act(observation, noise) == pytest.approx(exact, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@given(
    obs=st.integers(1, 4),
    act=st.integers(1, 3),
    chunk=st.integers(1, 3),
    hidden=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    steps=st.integers(1, 4),
)
def test_the_bytes_of_the_floor_are_those_of_the_matrices(
    obs: int, act: int, chunk: int, hidden: list[int], steps: int
) -> None:
    problem = random_problem(InferenceSetting("any", obs, act, chunk, tuple(hidden), 1, steps))
    inner = sum(rows * columns for rows, columns in pairwise(hidden))
    expected = 4 * steps * (act * chunk * hidden[0] + inner + hidden[-1] * act * chunk)
    assert weight_bytes(problem) == expected
    matrices = [value for name, value in record_floor(problem, 1).items() if name.startswith("matrix.")]
    assert steps * sum(matrix.nbytes for matrix in matrices) == expected


def test_the_large_policy_reads_36_megabytes() -> None:
    assert make_setting("large").hidden_dims == (512,) * 4
    assert weight_bytes(random_problem(make_setting("large"))) == 10 * 4 * (2 * 125 * 512 + 3 * 512 * 512)


@pytest.mark.slow
def test_jax_is_given_the_same_formula(problem: Problem, tmp_path: Path) -> None:
    modules = tmp_path / "modules" / "jax"
    modules.mkdir(parents=True)
    (modules / "__init__.py").write_text(FAKE_JAX)
    (modules / "numpy.py").write_text("from numpy import *")
    outcome = raced(problem, ["jax"], tmp_path, jax_python=Path(sys.executable), PYTHONPATH=str(modules.parent))
    assert outcome.failures == {}
    assert outcome.about["jax"]["max_error"] < 1e-5
    assert outcome.about["jax"]["jax"] == "0"
    assert "torch" not in outcome.about["jax"]


def raced(problem: Problem, names: list[str], folder: Path, rounds: int = 1, **changes: Any) -> Outcome:
    fields = {name: changes.pop(name) for name in list(changes) if name.islower()}
    conditions = replace(CONDITIONS, **fields)
    contestants, skipped = prepare(problem, names, conditions, folder)
    found = {name: ENTRANTS[name] for name in names}
    outcome = Outcome(problem.setting, weight_bytes(problem), found, contestants, skipped)
    race(outcome, rounds, environment(conditions) | changes, calls=5, paced_calls=paced_calls(conditions))
    return outcome


@pytest.mark.slow
def test_the_exported_policy_is_timed_without_pytorch_in_its_process(problem: Problem, tmp_path: Path) -> None:
    outcome = raced(problem, ["lean"], tmp_path, rounds=2)
    assert outcome.failures == {}
    assert "onnxruntime" in outcome.about["lean"]
    assert "torch" not in outcome.about["lean"]
    assert [len(latencies) for latencies in outcome.steady["lean"]] == [5, 5]
    assert [len(latencies) for latencies in outcome.paced["lean"]] == [1, 1]
    assert min(map(min, outcome.steady["lean"])) > 0


def test_a_contestant_that_computes_something_else_is_refused(problem: Problem, tmp_path: Path) -> None:
    contestants, _ = prepare(problem, ["numpy"], CONDITIONS, tmp_path)
    with np.load(tmp_path / "formula.npz") as file:
        parts = dict(file)
    parts["bias.1"][0] += 0.5
    np.savez(tmp_path / "formula.npz", **parts)
    outcome = Outcome(TINY, weight_bytes(problem), {"numpy": ENTRANTS["numpy"]}, contestants)
    with pytest.raises(ParityError, match="numpy answers 0.* away from the policy"):
        race(outcome, 1, environment(CONDITIONS), calls=1, paced_calls=0)
    assert outcome.steady == {}


@pytest.mark.parametrize(
    ("name", "about", "refused"),
    [
        ("lean", {"max_error": EXACT, "rms_error": 0.0}, False),
        ("lean", {"max_error": 1.1 * EXACT, "rms_error": 0.0}, True),
        ("lean", {"max_error": np.nan, "rms_error": 0.0}, True),
        ("lean-int8", {"max_error": 1.0, "rms_error": TOLERANCES["int8"]}, False),
        ("lean-int8", {"max_error": 0.0, "rms_error": 1.1 * TOLERANCES["int8"]}, True),
        ("lean-int8", {"max_error": 0.0, "rms_error": np.nan}, True),
    ],
)
def test_the_tolerance_is_that_of_the_precision(name: str, about: dict[str, float], refused: bool) -> None:
    if not refused:
        require_parity(name, ENTRANTS[name], about)
        return
    with pytest.raises(ParityError, match=f"^{name} answers"):
        require_parity(name, ENTRANTS[name], about)


def test_errors_are_shares_of_the_half_width_and_copies_of_reused_answers() -> None:
    buffer = np.zeros((1, 1, 2), np.float32)

    def act(observation: Any, _noise: Any) -> Any:
        buffer[...] = observation
        return buffer

    observation = np.array([1.0, 3.0]).reshape(2, 1, 1)
    expected = np.array([[1.0, 1.0], [3.0, 2.0]]).reshape(2, 1, 1, 2)
    recorded = {"observation": observation, "noise": observation, "expected": expected, "scale": np.array([1.0, 4.0])}
    assert worker.errors(act, recorded) == {"max_error": 0.25, "rms_error": 0.125}


class Clock:
    """Time that passes only in sleep and work."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("durations", "ticks"), [([0.25], [1, 2, 3, 4]), ([1.25], [1, 3, 5, 7]), ([0.5, 2.5], [1, 2, 5, 6])]
)
def test_paced_calls_begin_at_ticks(clock: Clock, durations: list[float], ticks: list[int]) -> None:
    starts, work = [], cycle(durations)

    def act(*_: Any) -> None:
        starts.append(clock.now - 100.0)
        clock.now += next(work)

    seconds = worker.paced(act, cycle([(0, 0)]), 3, rate=1.0)
    assert starts == ticks
    assert seconds == [duration for duration, _ in zip(cycle(durations), range(4), strict=False)][1:]


def test_calls_that_warm_up_are_not_timed(clock: Clock) -> None:
    calls: list[int] = []

    def act(observation: int, _noise: int) -> None:
        calls.append(observation)
        clock.now += observation

    def inputs() -> Iterator[tuple[int, int]]:
        yield from ((i, 0) for i in range(100))

    seconds = worker.steady(act, inputs(), 3)
    assert calls == list(range(worker.WARM_CALLS + 3))
    assert seconds == calls[-3:]


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Contestant]:
    def make(name: str, program: str = STAND_IN, error: float = 0.0) -> Contestant:
        return Contestant(name, (sys.executable, "-c", program, name, str(error), str(tmp_path / "log")), "steady", 5)

    return make


def test_everyone_has_a_turn_a_round_steady_and_then_paced(stand_in: Callable[..., Contestant], tmp_path: Path) -> None:
    names = ["numpy", "lean", "jax"]
    outcome = Outcome(TINY, 1, {n: ENTRANTS[n] for n in names}, [stand_in(n) for n in names])
    race(outcome, 2, os.environ, calls=4, paced_calls=3)
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    for start in (0, 6):
        turns = log[start : start + 6]
        assert {name for name, *_ in turns} == set(names)
        assert [rest for _, *rest in turns] == [["steady", "4"], ["paced", "3"]] * 3
        assert all(first[0] == second[0] for first, second in zip(turns[::2], turns[1::2], strict=True))
    assert outcome.steady == {name: [[0.25] * 4] * 2 for name in names}
    assert outcome.paced == {name: [[0.25] * 3] * 2 for name in names}


def test_a_failing_worker_is_a_failed_row_and_the_others_go_on(stand_in: Callable[..., Contestant]) -> None:
    contestants = [stand_in("jax", "import no_such_module"), stand_in("lean")]
    outcome = Outcome(TINY, 1, {n: ENTRANTS[n] for n in ("jax", "lean")}, contestants)
    race(outcome, 1, os.environ, calls=2, paced_calls=0)
    assert outcome.failures == {"jax": "ModuleNotFoundError: No module named 'no_such_module'"}
    assert outcome.steady == {"lean": [[0.25, 0.25]]}
    assert outcome.paced == {}
    assert cells(summarise(outcome)[0])[:2] == ["jax", "failed"]
    assert f"Failed, jax: {outcome.failures['jax']}" in notes(outcome, CONDITIONS)


def measured(setting: InferenceSetting = TINY, **seconds: list[float]) -> Outcome:
    """An outcome of made-up latencies, one call a round."""
    named = {name.replace("_", "-"): [[s] for s in values] for name, values in seconds.items()}
    contestants = [Contestant(name, (), "steady", 1) for name in named]
    return Outcome(setting, 1000, {name: ENTRANTS[name] for name in named}, contestants, steady=named)


def row_of(outcome: Outcome, name: str):
    return next(row for row in summarise(outcome) if row.name == name)


def test_ratios_are_taken_within_the_rounds() -> None:
    # Twice as fast in every round, of which two were disturbed: the ratio of the medians would be 3.
    outcome = measured(lean=[1.0, 2.0, 10.0], torch_eager=[2.0, 6.0, 20.0], torch_compile=[1.0, 2.0, 1.0])
    assert row_of(outcome, "lean").over_eager == 2.0
    assert row_of(outcome, "lean").over_compiled == 1.0
    assert row_of(outcome, "torch-eager").over_eager == 1.0
    assert row_of(outcome, "lean").steady == pytest.approx((2.0, 9.84, 10.0))


def test_a_round_is_as_fast_as_its_median_call() -> None:
    outcome = measured(lean=[1.0], torch_eager=[3.0])
    outcome.steady = {"lean": [[1.0, 1.0, 9.0]], "torch-eager": [[3.0, 2.0, 100.0]]}
    assert row_of(outcome, "lean").over_eager == 3.0


def test_the_floor_is_the_fastest_way_to_read_the_weights() -> None:
    outcome = measured(lean=[3.0, 6.0], floor_numpy=[2.0, 5.0], floor_c=[1.5, 4.0])
    floor = measured_floor(outcome)
    assert floor is not None
    assert (floor.name, floor.seconds, floor.bytes_per_second) == ("floor-c", 2.75, 1000 / 2.75)
    assert row_of(outcome, "lean").of_floor == pytest.approx((3 / 1.5 + 6 / 4) / 2)
    assert row_of(outcome, "floor-c").of_floor == 1.0
    assert row_of(outcome, "floor-c").chunks_per_second is None
    outcome.failures["floor-c"] = "gone"
    assert row_of(outcome, "lean").of_floor == pytest.approx((3 / 2 + 6 / 5) / 2)
    assert measured_floor(measured(lean=[1.0])) is None


def test_fewer_steps_have_a_lower_floor_and_other_weights_none() -> None:
    outcome = measured(floor_c=[5.0], lean_k3=[6.0], lean_int8=[1.0], lean_best_of_4=[9.0])
    assert row_of(outcome, "lean-k3").of_floor == pytest.approx(6 / (5 * 3 / TINY.nfe))
    assert row_of(outcome, "lean-int8").of_floor is None
    assert row_of(outcome, "lean-best-of-4").of_floor is None


def test_throughput_counts_the_decisions_of_a_batch() -> None:
    assert row_of(measured(replace(TINY, batch=1024), lean=[0.5]), "lean").chunks_per_second == 2048


def test_goals_are_told_met_or_missed_where_they_are_about_the_measurement() -> None:
    outcome = measured(lean=[1.0], torch_eager=[2.8], torch_compile=[1.5], floor_c=[0.8], lean_int8=[0.3])
    told = [line for line in notes(outcome, CONDITIONS) if line.startswith("Goal")]
    assert told == [
        "Goal, lean at least 2.8 times as fast as torch-eager: 2.80, met.",
        "Goal, lean at least 1.6 times as fast as torch-compile: 1.50, missed.",
        "Goal, lean at most 1.2 times the floor: 1.25, missed.",
        "Goal, lean-int8 at least 7 times as fast as torch-eager: 9.33, met.",
    ]
    assert goals(outcome, replace(CONDITIONS, threads=2)) == []
    assert goals(replace(outcome, setting=replace(TINY, batch=2)), CONDITIONS) == []
    assert goals(replace(outcome, setting=replace(TINY, name="checkpoint own")), CONDITIONS) == []
    small = goals(replace(outcome, setting=replace(TINY, name="small")), CONDITIONS)
    assert {goal.bound for goal in small if goal.figure == "of_floor"} == {2.0}


def test_the_markdown_is_a_table_with_what_is_missing() -> None:
    outcome = measured(lean=[0.001, 0.003], torch_eager=[0.004, 0.004], floor_c=[0.001, 0.001])
    outcome.paced = {"lean": [[0.005], [0.005]]}
    outcome.skipped = {"jax": "no | python"}
    outcome.about["lean"] = {"onnxruntime": "1"}
    lines = markdown([outcome], CONDITIONS).splitlines()
    assert "onnxruntime 1" in lines[0]
    assert "| lean | 2 | 2.98 | 3 | 5 | 5 | 5 | 2.67 |  | 2.00 | 500 |" in lines
    table = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(COLUMNS) + 1}
    assert "- Skipped, jax: no | python." in lines
    assert "- Floor: floor-c reads 0.001 MB in 1 ms, 0.001 GB/s." in lines


def test_the_json_is_strict_and_holds_every_call() -> None:
    outcome = measured(lean=[1.0, 2.0], floor_c=[1.0, 1.0])
    data = json.loads(json.dumps(to_json([outcome], CONDITIONS), allow_nan=False))
    (setting,) = data["settings"]
    assert setting["steady"]["lean"] == [[1.0], [2.0]]
    assert setting["floor"]["name"] == "floor-c"
    assert [goal["met"] for goal in setting["goals"]] == [False]


def test_without_jax_it_is_skipped_with_a_line(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    reason = obstacle(ENTRANTS["jax"], problem, CONDITIONS)
    assert reason is not None
    assert "--jax-python" in reason
    assert obstacle(ENTRANTS["jax"], problem, replace(CONDITIONS, jax_python=Path("python"))) is None


def test_without_a_compiler_the_c_floor_is_skipped_with_a_line(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    contestants, skipped = prepare(problem, ["floor-c", "floor-sum"], CONDITIONS, tmp_path)
    assert [contestant.name for contestant in contestants] == ["floor-sum"]
    assert "no C compiler" in skipped["floor-c"]


def test_a_compiler_that_fails_is_a_line_too(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert compile_kernel(str(broken), tmp_path) == "out of order"
    _, skipped = prepare(problem, ["floor-c"], CONDITIONS, tmp_path)
    assert skipped == {"floor-c": "the C compiler failed: out of order"}


def test_policies_that_the_formula_does_not_describe_are_not_raced_by_it(problem: Problem) -> None:
    assert formula_obstacle(problem) is None
    sizes: dict[str, Any] = {"hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 1, "chunk_size": 3}
    for config in (
        TrainConfig.preset("me-am", **sizes),
        TrainConfig.preset("qam", solver="midpoint", **sizes),
        TrainConfig.preset("qam-edit", edit_scale=0.3, **sizes),
        TrainConfig.preset("qam", fourier_features=4, **sizes),
    ):
        spec = replace(
            problem.spec,
            integration=replace(problem.spec.integration, solver=config.solver, nfe=10),
            method=config.method,
        )
        other = Problem(TINY, build_networks(spec, config), spec, config)
        for name in ("numpy", "jax"):
            reason = obstacle(ENTRANTS[name], other, CONDITIONS)
            assert reason is not None
            assert "written for Euler" in reason


def test_a_policy_without_critics_does_not_choose(problem: Problem) -> None:
    spec = replace(problem.spec, integration=replace(problem.spec.integration, nfe=10), method="bc")
    config = TrainConfig.preset("bc", hidden_dims=(8,), chunk_size=3, solver="euler", confine=False)
    other = Problem(TINY, build_networks(spec, config), spec, config)
    reason = obstacle(ENTRANTS["lean-best-of-4"], other, CONDITIONS)
    assert reason == "a bc policy has no critics to choose by"


@pytest.mark.slow
def test_a_batch_is_answered_as_a_whole(tmp_path: Path) -> None:
    outcome = raced(random_problem(replace(TINY, batch=40)), ["numpy", "lean", "floor-c", "floor-numpy"], tmp_path)
    assert outcome.failures == {}
    assert "batch 1" in outcome.skipped["floor-c"]
    assert all(about["max_error"] < 1e-5 for about in outcome.about.values())


def test_graphs_for_a_gpu_are_written_without_one(problem: Problem, tmp_path: Path) -> None:
    names = [name for name in GPU_ENTRANTS if name != "traced"]
    contestants, skipped = prepare(problem, names, replace(CONDITIONS, device="cuda"), tmp_path)
    assert set(skipped) <= {"jax"}
    tasks = {contestant.name: json.loads(contestant.command[2]) for contestant in contestants}
    assert {task["device"] for task in tasks.values()} == {"cuda"}
    assert {task["cores"] for task in tasks.values()} == {None}
    recorded = recorded_of(tasks["lean-fp16-fixed"])
    for name in ("lean", "lean-fixed", "lean-fp16", "lean-fp16-fixed"):
        act = actor_of(tasks[name] | {"device": "cpu"})
        require_parity(name, GPU_ENTRANTS[name], worker.errors(act, recorded))
    assert environment(replace(CONDITIONS, device="tensorrt"))["JAX_PLATFORMS"] == "cuda"


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_is_refused_before_anything_starts(
    device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert run(["bench", "infer", "--device", device]) == 2
    assert f'device="{device}", but onnxruntime offers only' in capsys.readouterr().err


def test_a_gpu_that_pytorch_does_not_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("meam_export.benchmark.contestants.provider_list", lambda *_, **__: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["bench", "infer", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rounds": 0}, ConfigError, "rounds is 0"),
        ({"calls": 0}, ConfigError, "calls is 0"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"batch": 0}, ConfigError, "batch is 0"),
        ({"hz": -1.0}, ConfigError, "hz is -1.0"),
        ({"hz": float("nan")}, ConfigError, "hz is nan"),
        ({"shapes": ()}, ConfigError, "shapes is empty"),
        ({"contestants": ("lean-fixed",)}, ConfigError, "lean-fixed does not act on cpu"),
        ({"contestants": ("numpy",), "device": "cuda"}, ConfigError, "numpy does not act on cuda"),
        ({"jax_python": Path("no/such/python")}, NotFoundError, "is no program"),
        ({"markdown": Path("no/such/folder/table.md")}, OutputError, "expected a file in a folder that exists"),
    ],
)
def test_arguments_out_of_range_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BenchInferArguments(**fields)


def test_the_names_of_the_command_line_are_those_of_the_entrants() -> None:
    for device, known in (("cpu", ENTRANTS), ("cuda", GPU_ENTRANTS), ("tensorrt", GPU_ENTRANTS)):
        for name in known:
            assert BenchInferArguments(contestants=(name,), device=device).contestants == (name,)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = {"large": TINY, "small": replace(TINY, name="small", hidden_dims=(8,))}
    monkeypatch.setattr("meam_export.benchmark.settings._SHAPES", shapes)
    monkeypatch.setattr(sys.modules["meam_export.benchmark.race"], "PAUSE", 0.0)
    chosen = ["--contestants", "numpy", "lean", "floor-numpy", "--rounds", "2", "--calls", "8", "--hz", "500"]
    table = tmp_path / "table.md"
    assert run(["bench", "infer", *chosen, "--markdown", str(table), "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert [setting["name"] for setting in settings] == ["large", "small"]
    for setting in settings:
        rows = {row["name"]: row for row in setting["contestants"]}
        assert set(rows) == {"numpy", "lean", "floor-numpy"}
        assert {row["failure"] for row in rows.values()} == {None}
        assert all(0 < row["steady"][0] <= row["steady"][2] for row in rows.values())
        assert rows["lean"]["of_floor"] > 0
        assert setting["floor"]["seconds"] > 0
        assert [[len(calls) for calls in rounds] for rounds in setting["paced"].values()] == [[2, 2]] * 3
    assert table.read_text().count("| lean |") == 2


@pytest.mark.slow
def test_a_wrong_contestant_ends_the_command_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("meam_export.benchmark.settings._SHAPES", {"small": TINY})
    monkeypatch.setattr(sys.modules["meam_export.benchmark.race"], "EXACT", 1e-12)
    assert run(["bench", "infer", "--shapes", "small", "--contestants", "numpy", "--rounds", "1"]) == 2
    output = capsys.readouterr()
    assert "meam: numpy answers" in output.err
    assert "p50" in output.out  # what was measured before is shown


@pytest.mark.slow
def test_training_does_not_load_export() -> None:
    modules = "meam_training.commands.bench_train, meam_policy.commands.bench"
    code = f"import sys, {modules}; assert 'meam_export' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["train", "infer"])
def test_every_benchmark_has_a_help_and_is_listed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(["bench", name, "--help"])
    assert caught.value.code == 0
    assert f"usage: meam bench {name}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(["bench", "--help"])
    assert f"  {name}  " in capsys.readouterr().out


def test_a_missing_library_is_told_with_the_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "meam_export.commands.bench_infer", None)
    assert run(["bench", "infer"]) == 2
    assert "`meam bench infer` needs" in (told := capsys.readouterr().err)
    assert "meam-policy[cpu,train,export]" in told


def test_a_trained_policy_is_read_from_its_checkpoint(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    networks = SimpleNamespace(eval=lambda: problem.networks)
    config = TrainConfig.preset("qam", hidden_dims=(16, 8), num_critics=3, chunk_size=3, nfe=5)
    spec = replace(problem.spec, integration=replace(problem.spec.integration, best_of=2))
    checkpoint = SimpleNamespace(spec=spec, config=config, load_networks=lambda: networks)
    monkeypatch.setattr("meam_training.runs.checkpoint.Checkpoint.load", lambda _path: checkpoint)
    found = checkpoint_problem(Path("runs/own"), batch=2)
    assert found.setting == InferenceSetting("checkpoint own", 4, 2, 3, (16, 8), 3, 5, batch=2)
    assert found.spec.integration.best_of == 1
    assert found.networks is problem.networks


@pytest.mark.slow
def test_contestants_of_every_kind_race(problem: Problem, tmp_path: Path) -> None:
    # Of those that act by the same code, one: the others' answers are compared in this process.
    alike = {"jax", "lean-bare", "lean-k3", "lean-k3-int8", "lean-best-of-4", "floor-torch", "floor-sum", "floor-c"}
    names = [name for name in ENTRANTS if name not in alike]
    assert set(ENTRANTS) - set(names) - {"jax"} < {*IN_THIS_PROCESS, *FLOORS}
    outcome = raced(problem, names, tmp_path, rounds=1, **QUICKLY)
    assert outcome.failures == {}
    assert set(outcome.steady) == set(outcome.paced) == set(names)
    exact = [name for name, about in outcome.about.items() if about["max_error"] < 1e-5]
    assert set(exact) == set(outcome.about) - {"lean-int8"}
    row = row_of(outcome, "lean")
    assert row.over_eager is not None
    assert row.over_eager > 0
    assert row.over_compiled is not None
