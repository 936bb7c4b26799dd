"""Recomputes a flight, tick by tick, and finds the first one that differs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from meam_policy import errors
from meam_policy.errors import ConfigError, FormatError, MeamError
from meam_policy.flight import Flight, FlightRecord, read_flight
from meam_policy.flight.identity import changes, identity_of
from meam_policy.replay.messages import Answered, Ticked, in_type, numbered
from meam_policy.replay.replay_loop import ReplayLoop
from meam_policy.replay.report import Difference, ReplayReport
from meam_policy.replay.training_steps import of_evaluation, recorded_spec

__all__ = ["replay_flight", "replay_read"]

_OF_LIMITS = ("safety", "robot_sha256")
_OUTSIDE = "missed_deadlines"
"""The event that is counted by the clock."""
_FIRST_TICKS = 10
_ACTED_BEFORE = (
    "; or the policy had acted before this flight, which begins without a reset: then its first action was limited "
    "from one that the recording does not have; call loop.reset() before the first tick"
)


def replay_flight(file: str | os.PathLike[str], policy: Any) -> ReplayReport:
    """Compute every action of a recording again, by the code that gave it, and compare it bit for bit.

    The recording gives what came from outside: observations and their ages, noise, pauses, and when each chunk arrived.
    Everything else happens again. After a gap, such as the beginning of a ring or dropped records, the replay goes on
    at the next chunk, from the last action that was recorded before it.

    Args:
        file: A flight file, of `ControlLoop(record=)` or `meam eval --flight`; a cut one is replayed up to there.
        policy: A `MeamPolicy`, with the settings with which it acted; its queues are used.

    Returns:
        What was compared, and the first difference.

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is no flight file, or damaged.
        ConfigError: the policy is none, or cannot act as the recorded loop did: it takes no prefix, for instance.
        MissingExtraError: mcap is not installed.
    """
    return replay_read(read_flight(file), policy)


def replay_read(flight: Flight, policy: Any) -> ReplayReport:
    """`replay_flight` of a file that was read."""
    if not (hasattr(policy, "spec") and hasattr(policy, "predict_action_chunk") and hasattr(policy, "reset")):
        raise ConfigError(f"policy is a {type(policy).__name__}; expected a MeamPolicy.")
    _require_fit(flight, policy)
    comparison = _Comparison(flight, changes(flight.about, identity_of(policy)))
    try:
        if of_evaluation(flight):
            _replay_evaluation(flight, policy, comparison)
        else:
            with closing(_loop_of(flight, policy)) as loop:
                _LoopReplay(loop, comparison).run(flight)
    except MeamError:
        raise
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FormatError(f"{flight.path} has what no loop records ({reason}). Take an undamaged copy.") from error
    return comparison.report()


def _require_fit(flight: Flight, policy: Any) -> None:
    """Refuse a policy of other sizes than the recorded one: not a number could be compared."""
    recorded = recorded_spec(flight)
    for name in ("observation", "action", "chunk_size"):
        was, now = (
            [(box.key, box.shape) for box in value] if name == "observation" else getattr(value, "shape", value)
            for value in (getattr(spec, name) for spec in (recorded, policy.spec))
        )
        if was != now:
            raise ConfigError(
                f"The policy's {name} is {now}; expected {was}, as {flight.path} has. Load the policy of it."
            )


class _Comparison:
    """Counts what is compared."""

    def __init__(self, flight: Flight, identity: dict[str, str]) -> None:
        self._flight, self._identity = flight, identity
        self.ticks = self.replayed = self.inferences = self.dropped = 0
        self._largest, self._first, self._differing = 0.0, None, set[int]()

    def differs(self, record: FlightRecord, what: str, reason: str, first: tuple[str, ...] = ()) -> None:
        """Note a difference, and what of the policy's identity may be behind it, beginning with some of its parts."""
        self._differing.add(record.number)
        if self._first is None:
            named = [self._identity[name] for name in first if name in self._identity]
            named += [words for name, words in self._identity.items() if name not in first]
            behind = "; ".join(named) or "policy, settings and versions are the recorded ones"
            message = record.message
            place = int(message.get("episode", 0)), int(message.get("tick", 0))
            self._first = Difference(record.number, *place, what, f"{reason.rstrip('.')}. Identity: {behind}.")

    def arrays(self, was: NDArray[Any] | None, now: ArrayLike | None, *, of_action: bool = False) -> bool:
        """Whether two arrays are the same bits."""
        if was is None or now is None:
            return was is None and now is None
        before, after = (np.asarray(array, np.float64).ravel() for array in (was, now))
        if before.shape == after.shape and np.array_equal(before.view(np.int64), after.view(np.int64)):
            return True
        if of_action:
            size = float(np.abs(before - after).max()) if before.shape == after.shape else np.inf
            self._largest = max(self._largest, size)
        return False

    def one_sided(self) -> None:
        """Note an action that is on one side only."""
        self._largest = np.inf

    def report(self) -> ReplayReport:
        """All of it."""
        return ReplayReport(
            path=self._flight.path,
            ticks=self.ticks,
            replayed=self.replayed,
            differing=len(self._differing),
            inferences=self.inferences,
            max_difference=self._largest,
            first=self._first,
            identity=tuple(self._identity.values()),
            dropped=self.dropped,
            complete=self._flight.complete,
        )


def _counted(flight: Flight, comparison: _Comparison) -> Iterator[tuple[FlightRecord, bool]]:
    """The records, and whether the one before each is there."""
    for record, missing in numbered(flight):
        comparison.dropped += missing
        yield record, not missing


def _loop_of(flight: Flight, policy: Any) -> ReplayLoop:
    try:
        settings = json.loads(flight.about["settings"])
        return ReplayLoop(policy, settings)
    except MeamError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"{flight.path} has settings of a loop that this package does not make ({str(error)[:100]}); expected a "
            "recording of this version."
        ) from error


class _LoopReplay:
    """Goes through a control loop's flight."""

    def __init__(self, loop: ReplayLoop, comparison: _Comparison) -> None:
        self._loop, self._comparison = loop, comparison
        # Whether the loop's state is that of the recorded one.
        self._synchronous = False
        self._before: Ticked | None = None
        self._askers: dict[int, Ticked] = {}
        # Whether the flight began without a reset, and none came since.
        self._unreset = False

    def run(self, flight: Flight) -> None:
        for record, joined in _counted(flight, self._comparison):
            if not joined:
                self._lose()
            if record.topic == "inference":
                answer = Answered.of(record)
                self._loop.inference.answers[answer.number] = answer
            elif record.topic == "tick":
                self._tick(record)
            else:
                self._event(record)

    def _lose(self) -> None:
        self._synchronous, self._before = False, None

    def _event(self, record: FlightRecord) -> None:
        kind = record.message.get("kind")
        if kind == "begin":
            self._loop.begin(reset=True)  # as a policy that was just loaded
            self._synchronous = self._unreset = True
        elif kind == "episode":
            reset = bool(record.message.get("reset"))
            self._unreset &= not reset
            self._synchronous |= reset
            if self._synchronous:
                self._loop.begin(reset)
            self._before = None
        elif kind == "neutral" and self._synchronous:
            was, now = _array(record.message.get("action")), self._loop.neutral()
            if not self._comparison.arrays(was, now, of_action=True):
                reason = "the way to the neutral action is limited otherwise"
                self._comparison.differs(record, "neutral action", reason, _OF_LIMITS)

    def _tick(self, record: FlightRecord) -> None:
        comparison, loop, tick = self._comparison, self._loop, Ticked.of(record)
        comparison.ticks += 1
        if tick.asked is not None:
            self._askers = {number: asker for number, asker in self._askers.items() if number > tick.asked - 8}
            self._askers[tick.asked] = tick
        if tick.error is not None and tick.error not in errors.__all__:  # an interrupt, anywhere in the tick
            self._lose()
            return
        if not self._synchronous:
            self._resume(tick)
        if self._synchronous:
            comparison.replayed += 1
            try:
                action, error = loop.replay(tick), None
            except MeamError as raised:
                action, error = None, raised
            self._compare(record, tick, action, error)
            if (tick.error is not None and error is None) or (action is None) != (tick.action is None):
                comparison.one_sided()
                self._lose()
        loop.inference.answers = {n: a for n, a in loop.inference.answers.items() if n not in tick.arrived}
        self._before = tick

    def _resume(self, tick: Ticked) -> None:
        before, loop = self._before, self._loop
        if before is None or before.action is None or not tick.arrived or before.tick < loop.blend_ticks:
            return
        answer, asker = loop.inference.answers.get(tick.arrived[0]), self._askers.get(tick.arrived[0])
        if answer is None or asker is None or answer.opening or (asker is tick and not loop.blocking):
            return
        loop.resume(before, tick, asker, answer)
        self._synchronous = True

    def _compare(
        self, record: FlightRecord, tick: Ticked, action: NDArray[Any] | None, error: MeamError | None
    ) -> None:
        comparison, loop = self._comparison, self._loop
        for answer, recorded in loop.inference.again:
            comparison.inferences += 1
            self._compare_inference(record, answer, recorded)
        asked = [] if tick.asked is None else [tick.asked]
        was, now = (sorted(event for event in events if event != _OUTSIDE) for events in (tick.events, loop.events))
        kind = None if error is None else type(error).__name__
        if kind != tick.error:
            answer_now = "an action" if error is None else f"{kind}: {error}"
            reason = f"recorded {tick.error or 'an action'}, now {answer_now}"
            comparison.differs(record, "what the tick did", reason, _OF_LIMITS)
        elif loop.inference.asked != asked:
            reason = f"inferences asked for: recorded {asked}, now {loop.inference.asked}"
            comparison.differs(record, "schedule", reason)
        elif was != now:
            reason = f"events recorded {was}, now {now}: a stale or refused observation, or one that is no longer so"
            comparison.differs(record, "events", reason, _OF_LIMITS)
        if action is None or tick.action is None:
            return
        chosen = comparison.arrays(tick.chosen, loop.chosen)
        if not comparison.arrays(tick.action, action, of_action=True):
            limits = "the limits gave another action" + ("" if not chosen else ", from the same choice")
            reason = limits if chosen else "another action was chosen" + (f" ({', '.join(was)})" if was else "")
            if self._unreset and tick.tick < _FIRST_TICKS:
                reason += _ACTED_BEFORE
            comparison.differs(record, "action", reason, _OF_LIMITS if chosen else ())
        elif not chosen:
            comparison.differs(record, "action before the limits", "another action was chosen, and limited to the same")

    def _compare_inference(self, record: FlightRecord, answer: Any, recorded: Answered) -> None:
        comparison, name = self._comparison, f"chunk of inference {recorded.number}"
        prefix = answer.request.prefix
        same = (prefix is None) == (recorded.prefix is None) and all(
            comparison.arrays(was, now) for was, now in zip(recorded.prefix or (), prefix or (), strict=False)
        )
        if not same:
            comparison.differs(record, f"prefix of inference {recorded.number}", "it continues other actions")
        elif recorded.noise is None:
            comparison.differs(record, name, "the recording has no noise: the recorded policy has no last_noise")
        elif (answer.error is None) != (recorded.error is None):
            was, now = recorded.error or "a chunk", answer.error or "a chunk"
            comparison.differs(record, name, f"recorded {was}, now {now}")
        elif recorded.error is None and not comparison.arrays(recorded.chunk, answer.chunk):
            reason = "the network computes another chunk from the same observation and noise"
            if recorded.chunk is not None and recorded.chunk.size == answer.chunk.size:
                reason += f", by up to {np.abs(recorded.chunk.ravel() - answer.chunk.ravel()).max():.3g}"
            comparison.differs(record, name, reason)


def _array(value: Any) -> NDArray[Any] | None:
    return None if value is None else np.asarray(value, dtype=np.float64)


def _replay_evaluation(flight: Flight, policy: Any, comparison: _Comparison) -> None:
    if not hasattr(policy, "select_action"):
        raise ConfigError(f"policy is a {type(policy).__name__}; expected a MeamPolicy, which acts step by step.")
    synchronous = True
    zeros = np.zeros(policy.spec.noise_dim, np.float32)
    policy.reset()
    for record, joined in _counted(flight, comparison):
        synchronous &= joined
        if record.topic != "tick":
            continue
        tick = Ticked.of(record)
        comparison.ticks += 1
        if not synchronous:
            continue
        comparison.replayed += 1
        before = policy.inferences
        noise = zeros if tick.noise is None else in_type(tick.noise, np.float32)
        try:
            action = policy.select_action(tick.observation, noise=noise)
        except MeamError as error:
            comparison.differs(
                record, "what the tick did", f"recorded an action, now {type(error).__name__}: {error}", _OF_LIMITS
            )
            comparison.one_sided()
            return
        ran = policy.inferences > before
        comparison.inferences += ran
        if ran != (tick.noise is not None):
            reason = "the network ran" if ran else "the network did not run"
            comparison.differs(record, "schedule", f"{reason}, other than recorded")
        if not comparison.arrays(tick.action, action, of_action=True):
            reason = "from the same observations and noise, network or limits gave another action"
            comparison.differs(record, "action", reason)
