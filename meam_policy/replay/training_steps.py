"""What can be learned from a flight: its steps, in stretches without a gap."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import FormatError
from meam_policy.flight import Flight, FlightRecord
from meam_policy.replay.messages import Ticked, checked, in_type, numbered, observation_of
from meam_policy.spec import PolicySpec

__all__ = ["Step", "Stretch", "of_evaluation", "recorded_rate_hz", "recorded_spec", "stretches"]


class Step(NamedTuple):
    """One step: an action, and the observation after it.

    Attributes:
        reward: None where none was recorded.
    """

    action: NDArray[Any]
    observation: Any
    reward: float | None
    terminated: bool


class Stretch(NamedTuple):
    """Steps one after the other.

    Attributes:
        first: The observation before the first step.
    """

    first: Any
    steps: list[Step]


class _Row(NamedTuple):
    tick: int
    observation: Any
    action: NDArray[Any]
    reward: float | None
    terminated: bool


def recorded_spec(flight: Flight) -> PolicySpec:
    """The spec of the policy that acted.

    Raises:
        FormatError: the recording has none, or a broken one.
    """
    return PolicySpec.from_json(flight.about.get("spec", ""))


def of_evaluation(flight: Flight) -> bool:
    """Whether `meam eval` recorded it, in the policy's environment, and not a control loop."""
    return flight.about.get("kind") == "evaluation"


def recorded_rate_hz(flight: Flight) -> float | None:
    """The ticks a second of a loop; of an evaluation the policy's, None where it has none.

    Raises:
        FormatError: a loop's flight has no rate above 0.
    """
    if of_evaluation(flight):
        return recorded_spec(flight).control_rate_hz
    try:
        rate = float(json.loads(flight.about["settings"])["rate_hz"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{flight.path} does not say its rate_hz; expected one that a ControlLoop recorded."
        ) from error
    if not 0 < rate < math.inf:
        raise FormatError(f"{flight.path} has a rate_hz of {rate:g}; expected one above 0.")
    return rate


def stretches(flight: Flight) -> Iterator[Stretch]:
    """The stretches of a flight of one step or more.

    One ends where records are missing, ticks were skipped, an observation is not finite, a tick gave no action, or an
    episode ends. The last action of a control loop's stretch is left out: nothing says what came of it.

    Raises:
        FormatError: a message has a field that is missing, of another type, or of another size than the spec's.
    """
    spec = recorded_spec(flight)
    rows: list[_Row] = []
    for record, missing in numbered(flight):
        row = _row(record, spec) if record.topic == "tick" else None
        joined = not missing and record.topic != "event"
        goes_on = record.topic == "inference" or (row is not None and rows and row.tick == rows[-1].tick + 1)
        if rows and not (joined and goes_on):
            yield from _stretch(rows, _last_observation(record, spec))
            rows = []
        if row is not None:
            rows.append(row)
    yield from _stretch(rows, None)


def _row(record: FlightRecord, spec: PolicySpec) -> _Row | None:
    tick = Ticked.of(record)
    observation = _shaped(tick.observation, spec)
    if observation is None or tick.action is None:
        return None
    given, message = tick.action, record.message
    action = checked(record, lambda: in_type(given.reshape(spec.action.shape), spec.action.dtype))
    reward = checked(record, lambda: None if message.get("reward") is None else float(message["reward"]))
    return _Row(tick.tick, observation, action, reward, bool(message.get("terminated", False)))


def _last_observation(record: FlightRecord, spec: PolicySpec) -> Any:
    """What an evaluation's episode ended with; None where the record says no such thing."""
    if record.message.get("kind") != "end":
        return None
    return _shaped(checked(record, lambda: observation_of(record.message.get("observation"))), spec)


def _shaped(observation: Any, spec: PolicySpec) -> Any:
    """An observation in the types of its space; None if it does not fit, or is not finite."""
    parts = {}
    for box in spec.observation:
        part = observation if box.key is None else observation.get(box.key) if isinstance(observation, dict) else None
        if not isinstance(part, np.ndarray) or part.shape != tuple(box.shape) or not np.isfinite(part).all():
            return None
        parts[box.key] = in_type(part, box.dtype)
    return parts.get(None, parts)


def _stretch(rows: list[_Row], last: Any) -> Iterator[Stretch]:
    """A stretch, with the observation after its last row if that is known."""
    if not rows:
        return
    after = [row.observation for row in rows[1:]] + ([] if last is None else [last])
    steps = [Step(row.action, seen, row.reward, row.terminated) for row, seen in zip(rows, after, strict=False)]
    if steps:
        yield Stretch(rows[0].observation, steps)
