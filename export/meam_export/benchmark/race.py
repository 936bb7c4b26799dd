"""Times contestants in turn, call by call, after each has shown that it computes the policy."""

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
"""Seconds of every call of every round."""


@dataclass
class Outcome:
    """What was measured; filled by `race`, so that an interrupted one leaves what it has.

    Attributes:
        setting: The policy that acts.
        weight_bytes: Bytes of float32 weights that one inference of it reads.
        entrants: Who was to take part, in the order of the table.
        contestants: Who does.
        skipped: Why the others do not.
        steady: Latencies of calls one after the other.
        paced: Latencies of calls at the ticks of a control loop.
        about: What the worker said when it was ready.
        failures: Why a contestant has no result.
        peak_memory: Largest resident memory of the contestant's worker, in bytes; where the system tells.
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
    """Refuse a contestant that computes something else.

    Args:
        name: Of the contestant.
        entrant: What it is to compute: float32 to within `EXACT`, other weights to within `parity.TOLERANCES`.
        about: `max_error` and `rms_error`, as shares of the action's half width.

    Raises:
        ParityError: its answers are not the policy's.
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
        outcome: Its contestants race; what they do is added to it.
        rounds: How often everyone has a turn.
        environment: Environment variables of the workers.
        calls: Timed calls of a turn, one after the other.
        paced_calls: Timed calls of a turn at the ticks of a control loop; 0 for none.
        on_turn: Called with what is about to happen, once for every contestant's start and turn.

    Raises:
        ParityError: a contestant computes something else.
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
