"""Tables of the benchmark's results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import numpy as np

from meam_export.benchmark.contestants import Conditions
from meam_export.benchmark.race import Latencies, Outcome
from meam_training.benchmark import processor
from meam_training.benchmark.tables import Section, markdown_report, three_digits

__all__ = [
    "BRIEF",
    "COLUMNS",
    "Floor",
    "Goal",
    "Row",
    "cells",
    "goals",
    "machine",
    "markdown",
    "measured_floor",
    "notes",
    "sizes",
    "summarise",
    "to_json",
]

COLUMNS = (
    "",
    "p50, ms",
    "p99",
    "max",
    "paced",
    "p99",
    "max",
    "over eager",
    "over compiled",
    "of floor",
    "chunks/s",
)

BRIEF = (0, 1, 2, 4, 7, 8, 9)
"""Indices of the columns shown in a terminal."""

_QUANTILES = (0.5, 0.99, 1.0)

Quantiles = tuple[float, float, float]
"""Median, 99th percentile and maximum, in seconds."""


@dataclass(frozen=True)
class Floor:
    """How fast the weights were read.

    Attributes:
        name: Contestant that read them fastest.
        weight_bytes: Bytes it read per call.
        seconds: Median duration of its back-to-back calls, all rounds together.
    """

    name: str
    weight_bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes read per second."""
        return self.weight_bytes / self.seconds


@dataclass(frozen=True)
class Row:
    """One contestant's result; what was not measured is None.

    Attributes:
        name: The contestant.
        summary: Short description of it.
        steady: Latency of back-to-back calls, all rounds together.
        paced: Latency of calls at the ticks of a control loop, all rounds together.
        over_eager: Speed-up over eager PyTorch: ratio of the medians within a round, median over the rounds.
        over_compiled: Speed-up over torch.compile, likewise.
        of_floor: Latency as a multiple of the floor's, likewise; float32 with one chunk only.
        chunks_per_second: Action chunks per second in back-to-back calls.
        max_error: Largest error against float64, as a share of the action's half width.
        first_seconds: Duration of the first call, including compilation.
        peak_memory: Peak resident memory of its process, bytes.
        failure: Why there is no result.
    """

    name: str
    summary: str
    steady: Quantiles | None = None
    paced: Quantiles | None = None
    over_eager: float | None = None
    over_compiled: float | None = None
    of_floor: float | None = None
    chunks_per_second: float | None = None
    max_error: float | None = None
    first_seconds: float | None = None
    peak_memory: int | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Goal:
    """A figure that the exported policy should reach on one thread.

    Attributes:
        contestant: Contestant it applies to.
        figure: Field of its `Row`.
        bound: Value to reach.
        seen: Value measured.
    """

    contestant: str
    figure: str
    bound: float
    seen: float

    @property
    def met(self) -> bool:
        """Whether the goal is reached: `bound` is a maximum for `of_floor`, and a minimum for the speed-ups."""
        return self.seen <= self.bound if self.figure == "of_floor" else self.seen >= self.bound


_GOALS = {
    ("lean", "over_eager"): {"large": 2.8, "small": 2.8},
    ("lean", "over_compiled"): {"large": 1.6, "small": 1.6},
    ("lean", "of_floor"): {"large": 1.2, "small": 2.0},
    ("lean-int8", "over_eager"): {"large": 7.0, "small": 7.0},
}
_GOAL_TEXTS = {
    "over_eager": "at least {} times as fast as torch-eager",
    "over_compiled": "at least {} times as fast as torch-compile",
    "of_floor": "at most {} times the floor",
}


def measured_floor(outcome: Outcome) -> Floor | None:
    """The floor: the fastest measured way to read the weights; None if none was measured."""
    reading = [name for name, entrant in outcome.entrants.items() if entrant.actor == "floor"]
    medians = {name: float(np.median(_pooled(outcome.steady[name]))) for name in reading if _ran(name, outcome)}
    if not medians:
        return None
    name = min(medians, key=lambda name: medians[name])
    return Floor(name, outcome.weight_bytes, medians[name])


def summarise(outcome: Outcome) -> list[Row]:
    """One row per contestant."""
    return [_row(contestant.name, outcome) for contestant in outcome.contestants]


def goals(outcome: Outcome, conditions: Conditions) -> list[Goal]:
    """The goals that apply to what was measured: batch 1 of a shape of `make_setting`, on one CPU thread."""
    if (conditions.device, conditions.threads, outcome.setting.batch) != ("cpu", 1, 1):
        return []
    rows, found = {row.name: row for row in summarise(outcome)}, []
    for (name, figure), bounds in _GOALS.items():
        seen = getattr(rows[name], figure) if name in rows else None
        if seen is not None and outcome.setting.name in bounds:
            found.append(Goal(name, figure, bounds[outcome.setting.name], seen))
    return found


def cells(row: Row) -> list[str]:
    """The cells of a table row, in the order of `COLUMNS`."""
    if row.failure is not None:
        return [row.name, "failed", *[""] * (len(COLUMNS) - 2)]
    times = [*(row.steady or [None] * 3), *(row.paced or [None] * 3)]
    ratios = (row.over_eager, row.over_compiled, row.of_floor)
    return [
        row.name,
        *("" if seconds is None else three_digits(1e3 * seconds) for seconds in times),
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        "" if row.chunks_per_second is None else three_digits(row.chunks_per_second),
    ]


def notes(outcome: Outcome, conditions: Conditions) -> list[str]:
    """Lines below the table: the floor, the goals, and the entrants that were skipped or failed."""
    floor, found = measured_floor(outcome), []
    if floor is not None:
        rate = f", {three_digits(floor.bytes_per_second / 1e9)} GB/s" if outcome.setting.batch == 1 else ""
        read = f"{floor.weight_bytes / 1e6:.3g} MB in {three_digits(1e3 * floor.seconds)} ms{rate}"
        found.append(f"Floor: {floor.name} reads {read}.")
    for goal in goals(outcome, conditions):
        aim = _GOAL_TEXTS[goal.figure].format(f"{goal.bound:g}")
        found.append(f"Goal, {goal.contestant} {aim}: {goal.seen:.2f}, {'met' if goal.met else 'missed'}.")
    found += [f"Skipped, {name}: {reason}." for name, reason in outcome.skipped.items()]
    return found + [f"Failed, {name}: {reason}" for name, reason in outcome.failures.items()]


def sizes(outcome: Outcome, conditions: Conditions) -> str:
    """One line on the policy's sizes and on how it was timed."""
    s = outcome.setting
    rounds = max(map(len, outcome.steady.values()), default=0)
    paced = f", then {paced_calls(conditions)} at {conditions.rate:g} Hz" if conditions.rate else ""
    return (
        f"Observation {s.observation_dim}, action {s.action_dim}, chunk {s.chunk_size}; hidden layers "
        f"{' '.join(map(str, s.hidden_dims))}, NFE {s.nfe}, critics {s.num_critics}, batch {s.batch}; "
        f"rounds {rounds}, calls a round {conditions.calls}{paced}."
    )


def paced_calls(conditions: Conditions) -> int:
    """Calls per turn at the ticks of a control loop."""
    return max(1, conditions.calls // 4) if conditions.rate else 0


def machine(outcomes: Sequence[Outcome], conditions: Conditions) -> dict[str, Any]:
    """What the numbers were measured on: processor, threads, device, versions, date."""
    versions: dict[str, str] = {}
    for outcome in outcomes:
        for about in outcome.about.values():
            versions |= {name: about[name] for name in ("numpy", "torch", "onnxruntime", "jax") if name in about}
    found = {"processor": processor(), "threads": conditions.threads, "device": conditions.device}
    return {**found, **versions, "date": date.today().isoformat()}


def markdown(outcomes: Sequence[Outcome], conditions: Conditions) -> str:
    """The tables, and what they were measured on, as Markdown."""
    return markdown_report(
        machine(outcomes, conditions),
        [
            Section(
                outcome.setting.name,
                sizes(outcome, conditions),
                COLUMNS,
                list(map(cells, summarise(outcome))),
                notes(outcome, conditions),
            )
            for outcome in outcomes
        ],
    )


def to_json(outcomes: Sequence[Outcome], conditions: Conditions) -> dict[str, Any]:
    """The machine-readable results, including the latency of every call of every round."""
    return {
        "machine": machine(outcomes, conditions),
        "settings": [
            {
                **asdict(outcome.setting),
                "contestants": [asdict(row) for row in summarise(outcome)],
                "floor": None if (floor := measured_floor(outcome)) is None else asdict(floor),
                "goals": [{**asdict(goal), "met": goal.met} for goal in goals(outcome, conditions)],
                "skipped": dict(outcome.skipped),
                "steady": outcome.steady,
                "paced": outcome.paced,
            }
            for outcome in outcomes
        ],
    }


def _row(name: str, outcome: Outcome) -> Row:
    entrant, about = outcome.entrants[name], outcome.about.get(name, {})
    known = Row(
        name,
        entrant.summary,
        max_error=about.get("max_error"),
        first_seconds=about.get("first_seconds"),
        peak_memory=outcome.peak_memory.get(name),
        failure=outcome.failures.get(name),
    )
    if not _ran(name, outcome):
        return known
    steady, floor = _quantiles(outcome.steady[name]), measured_floor(outcome)
    acts = entrant.actor != "floor"
    share = None
    if floor is not None and entrant.precision == "fp32" and entrant.best_of == 1:
        steps = outcome.setting.nfe / (entrant.nfe or outcome.setting.nfe)
        share = steps * _ratio(name, floor.name, outcome)
    return Row(
        **{
            **vars(known),
            "steady": steady,
            "paced": _quantiles(outcome.paced[name]) if outcome.paced.get(name) else None,
            "over_eager": _over(name, "torch-eager", outcome) if acts else None,
            "over_compiled": _over(name, "torch-compile", outcome) if acts else None,
            "of_floor": share,
            "chunks_per_second": outcome.setting.batch / steady[0] if acts else None,
        }
    )


def _over(name: str, other: str, outcome: Outcome) -> float | None:
    return _ratio(other, name, outcome) if _ran(other, outcome) else None


def _ratio(name: str, other: str, outcome: Outcome) -> float:
    """Ratio of the median latencies, name's over other's, within a round; median over the rounds.

    An interrupted round may lack one of the two.
    """
    pairs = zip(outcome.steady[name], outcome.steady[other], strict=False)
    return float(np.median([np.median(seconds) / np.median(others) for seconds, others in pairs]))


def _ran(name: str, outcome: Outcome) -> bool:
    return bool(outcome.steady.get(name)) and name not in outcome.failures


def _pooled(latencies: Latencies) -> list[float]:
    return [seconds for round_ in latencies for seconds in round_]


def _quantiles(latencies: Latencies) -> Quantiles:
    middle, high, highest = np.quantile(_pooled(latencies), _QUANTILES).tolist()
    return middle, high, highest
