"""Times contestants in turn, call by call, once each has been shown to compute the policy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meam_export.benchmark.settings import Entrant, InferenceSetting
from meam_export.graph.parity import TOLERANCES
from meam_policy.errors import ParityError
from meam_training.benchmark import Contestant
from meam_training.benchmark.race import PAUSE, Worker, turns

__all__ = ["EXACT", "Outcome", "race", "require_parity"]

EXACT = 1e-4
"""Largest accepted error of a contestant in float32, as a share of the action's half width."""

Latencies = list[list[float]]
"""Duration of every call of every round, seconds."""


@dataclass
class Outcome:
    """What was measured; `race` fills it as it goes, so that an interrupted race keeps its results so far.

    Attributes:
        setting: Sizes of the policy.
        weight_bytes: Bytes of float32 weights that one inference reads.
        entrants: All entrants asked for, in the order of the table.
        contestants: Those that take part.
        skipped: Why each of the others does not, by name.
        steady: Latencies of back-to-back calls, by contestant.
        paced: Latencies of calls at the ticks of a control loop, by contestant.
        about: What each worker reported when it was ready.
        failures: Why a contestant has no result, by name.
        peak_memory: Peak resident memory of each worker, bytes; missing if the system does not report it.
    """

    setting: InferenceSetting
    weight_bytes: int
    entrants: Mapping[str, Entrant]
    contestants: Sequence[Contestant]
    skipped: Mapping[str, str] = field(default_factory=dict)
    steady: dict[str, Latencies] = field(default_factory=dict)
    paced: dict[str, Latencies] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)


def require_parity(name: str, entrant: Entrant, about: Mapping[str, Any]) -> None:
    """Refuse a contestant that does not compute the policy.

    Args:
        name: Name of the contestant.
        entrant: Its precision sets the accepted error: `EXACT` for float32, `parity.TOLERANCES` for other weights.
        about: `max_error` and `rms_error`, as shares of the action's half width.

    Raises:
        ParityError: the error is above the accepted one.
    """
    exact = entrant.precision == "fp32"
    kind, accepted = ("max_error", EXACT) if exact else ("rms_error", TOLERANCES[entrant.precision])
    if not about[kind] <= accepted:  # also catches NaN
        raise ParityError(
            f"{name} answers {about[kind]:.2g} of the action's half width away from the policy in float64 ({kind}); "
            f"expected at most {accepted:.2g} for {entrant.precision}. Nothing was timed; leave it out with "
            "--contestants, and please report it."
        )


def race(
    outcome: Outcome,
    rounds: int,
    environment: Mapping[str, str],
    *,
    calls: int,
    paced_calls: int,
    on_turn: Callable[[str], None] = lambda _: None,
) -> None:
    """Start every worker, check all of them, then let the contestants take turns.

    Args:
        outcome: Names the contestants; their results are added to it.
        rounds: Turns per contestant.
        environment: Environment variables of the workers.
        calls: Back-to-back timed calls per turn.
        paced_calls: Timed calls per turn at the ticks of a control loop; 0 for none.
        on_turn: Called before every start and every turn of a contestant, with a description of it.

    Raises:
        ParityError: a contestant does not compute the policy.
    """
    workers: dict[str, Worker] = {}
    try:
        for contestant in outcome.contestants:
            on_turn(f"starting {contestant.name}")
            workers[contestant.name] = Worker(contestant.command, environment)
            about = workers[contestant.name].ready()
            if about:
                require_parity(contestant.name, outcome.entrants[contestant.name], about)
                outcome.about[contestant.name] = about
        for contestant in turns(outcome.contestants, rounds):
            on_turn(contestant.name)
            worker = workers[contestant.name]
            for form, count, latencies in (("steady", calls, outcome.steady), ("paced", paced_calls, outcome.paced)):
                seconds = worker.ask(form, count, json.loads) if count and not worker.failure else None
                if seconds is not None:
                    latencies.setdefault(contestant.name, []).append(seconds)
                    time.sleep(PAUSE)
    finally:
        _close(outcome, workers)


def _close(outcome: Outcome, workers: Mapping[str, Worker]) -> None:
    for name, worker in workers.items():
        if worker.failure:
            outcome.failures[name] = worker.failure
        memory = worker.peak_memory()
        if memory is not None:
            outcome.peak_memory[name] = memory
        worker.stop()
