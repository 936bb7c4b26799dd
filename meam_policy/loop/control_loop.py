"""`ControlLoop`: a policy acts at a fixed rate, while its next action chunk is computed in the background."""

from __future__ import annotations

import copy
import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ActionError, ConfigError, MeamError, ObservationError
from meam_policy.flight import Recording
from meam_policy.loop.blend_in import BlendIn
from meam_policy.loop.chunk_inference import (
    BackgroundInference,
    ChunkAnswer,
    ChunkRequest,
    Inference,
    SimulatedInference,
)
from meam_policy.loop.chunk_policy import ChunkPolicy, UncheckedPolicy, checks_of
from meam_policy.loop.chunk_schedule import Chunking, ChunkSchedule
from meam_policy.loop.flight_log import FlightLog
from meam_policy.loop.loop_health import HealthRecorder, LoopHealth
from meam_policy.robot import RobotContract
from meam_policy.robot.limits import ActionLimits
from meam_policy.robot.vocabulary import ON_FAILURE
from meam_policy.spec import RATE_TOLERANCE
from meam_policy.typed import typed

__all__ = ["ControlLoop", "Overrun", "Plan", "StampedObservation"]

Overrun = Literal["hold", "repeat", "zero", "home", "stop"]
"""What a control loop does in a tick for which it has no action."""

_RECENT_DELAYS = 10
"""Number of recent inferences whose longest delay is expected of the next one."""


@dataclass(frozen=True, eq=False)
class StampedObservation:
    """An observation, and when it was made.

    Attributes:
        observation: As the policy takes it.
        timestamp: Seconds on the loop's clock, `time.monotonic`.
    """

    observation: Any
    timestamp: float


class Plan(NamedTuple):
    """What a control loop would execute next if no other chunk arrived.

    Attributes:
        actions: The last action and those to come, one a tick [n, *action_shape], 1 or more.
        begun: Whether the last tick began this chunk, or interrupted it: if not, the last plan holds but for its first
            action.
        observed: Ticks from the observation that the chunk was computed from until the last action.
    """

    actions: NDArray[Any]
    begun: bool
    observed: int


class ControlLoop:
    """Acts at a fixed rate; the policy runs in a separate thread.

    A tick takes one observation and gives one action. How chunks follow each other:

    - "realtime": real-time chunking (RTC). The next chunk is asked for while the running one is executed, and continues
      it: the rest of the running chunk is its prefix, with the weights of `prefix_weights`. It takes over in the tick
      in which it arrives, at the action of that tick: those whose time has passed are skipped.
    - "naive": the same without continuing, for every policy; actions may jump where the new chunk takes over.
    - "blocking": the loop waits for the next chunk when `execute_steps` actions of the running one are executed. The
      robot keeps its last command meanwhile, for as long as that takes.

    Every observation is judged by `policy.accepts`, and one that it refuses is treated like one that is too old. Every
    action passes `policy.limit_action`, so the policy's rate limit holds in the loop too; the first action of an
    episode is free. What a chunk continues is what the chunk before it asked for, not what the limit made of it.

    The first two ask for a chunk `execute_steps` ticks after they asked for the last one, or sooner if the running one
    would be used up before the expected delay has passed. Without gaps they need 2 * delay <= chunk_size.

    What a tick gives where no chunk has arrived in time, so that there is no action for it:

    - "hold": the last executed action again; for positions.
    - "repeat": the newest chunk from its first action on, again and again; for periodic motions.
    - "zero": zero, or the number within the action bounds closest to it; for velocities and torques.
    - "home": the home pose of the robot's contract; for positions.
    - "stop": raises; the loop then gives no action until it is reset.

    Where the policy has the robot's contract (`robot`), that gives what is not given here: rate, overrun, age, and the
    time over which an episode's first actions are blended in. Its limits and rates hold through `policy.limit_action`.

    Between two calls of `step` more than a tick may pass: a pause of two periods or more skips the ticks that passed,
    with their actions, as in `run`. After one as long as a chunk, or where the clock has gone backwards, so that nobody
    knows how much has passed, nothing that is queued or under way belongs to now: a new chunk is asked for, and until
    it arrives there is no action. In a simulation ticks are the clock.

    The first action of an episode is waited for, and a failure there is raised, whatever `overrun` is: nothing has
    been executed that could be held. Later a failed inference is counted and asked for again in the next tick, while
    the running chunk goes on; only "stop" raises it. A tick whose observation is too old gives what an overrun gives.

    One thread calls `step`, `run` and `reset`; `health`, `save_recording` and `close` may be called from any. Nobody
    else may use the policy until the loop is closed.

    Args:
        policy: A `MeamPolicy`, a wrapper around one, or any other `ChunkPolicy`.
        rate_hz: Ticks per second; None takes that of the robot's contract, or the one the policy was trained at.
        chunking: See above; "realtime" needs a policy that takes a prefix.
        overrun: See above; None takes the contract's `on_failure`, or "hold" without one.
        execute_steps: Ticks from one inference to the next, 1 to chunk_size; None for the policy's own.
        max_observation_age_s: Seconds between an observation's timestamp and its tick, beyond which it is not acted
            on; so is one that comes that much from the future, which is of another clock. None takes the contract's;
            infinity, or None without one, is for any age.
        blend_in_s: Seconds over which the first actions of an episode are approached from where the robot is, as its
            contract says; 0 for none. None takes the contract's.
        expected_delay: Ticks that an inference is expected to take; None takes the longest of the last ten.
        simulated_delay: Ticks that every inference takes, in a simulation: no thread, and no clock but the ticks. The
            same seeds then give the same actions. None for real time.
        any_rate: Accept another rate than that of the actions that the policy was trained on.
        unchecked: Accept a policy without all of `ChunkPolicy`, and do without what it lacks: then it takes no prefix,
            every observation is accepted, and no action is limited.
        record: Flight file to write, *.mcap, from which `replay_flight` recomputes every action; a `Recording` says
            more, such as to keep only the last seconds until the loop stops. The loop never waits for it. None records
            nothing.
        clock: Seconds, monotonic.
        sleep: Sleeps for the given time, seconds.

    Raises:
        OutputError: the file to record into exists, or cannot be made.
        MissingExtraError: mcap, which recording needs, is not installed.
        ConfigError: an argument is unknown or out of range; or the policy was trained on actions of another rate, takes
            no prefix, or has no `accepts`, `limit_action` or `takes_prefix`; or there is no rate, home pose or place to
            blend in from.

    Example:
        >>> with ControlLoop(policy, rate_hz=50, overrun="zero") as loop:  # doctest: +SKIP
        ...     loop.run(robot.read, robot.send, steps=1000)
    """

    @typed("policy")
    def __init__(
        self,
        policy: ChunkPolicy | UncheckedPolicy,
        rate_hz: float | None = None,
        *,
        chunking: Chunking = "realtime",
        overrun: Overrun | None = None,
        execute_steps: int | None = None,
        max_observation_age_s: float | None = None,
        blend_in_s: float | None = None,
        expected_delay: int | None = None,
        simulated_delay: int | None = None,
        any_rate: bool = False,
        unchecked: bool = False,
        record: Recording | str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        checks = checks_of(policy, unchecked)
        robot, recorded = checks.robot or RobotContract(), policy.spec.control_rate_hz
        timing, agreed = robot.timing, robot.rate_hz(policy.spec)
        rate_hz = agreed if rate_hz is None else rate_hz
        if rate_hz is None:
            raise ConfigError(
                "rate_hz is None; expected ticks a second, since neither policy nor robot.json says them."
            )
        if overrun is None:
            usual = "hold" if robot.stands_still else "zero"
            overrun = usual if timing.on_failure is None else ON_FAILURE[timing.on_failure].overrun
        age = timing.max_observation_age_s if max_observation_age_s is None else max_observation_age_s
        chunk_size = policy.spec.chunk_size
        steps = policy.spec.execute_steps if execute_steps is None else execute_steps
        _check_choice("chunking", chunking, get_args(Chunking))
        _check_choice("overrun", overrun, get_args(Overrun))
        _check(rate_hz > 0 and math.isfinite(rate_hz), "rate_hz", rate_hz, "ticks a second, above 0")
        fits = 1 <= steps <= chunk_size
        _check(fits, "execute_steps", steps, f"a whole number, 1 to chunk_size, {chunk_size}")
        _check(age is None or age > 0, "max_observation_age_s", age, "seconds above 0, or None")
        for name, delay in (("expected_delay", expected_delay), ("simulated_delay", simulated_delay)):
            whole = delay is None or delay >= 0
            _check(whole, name, delay, "whole ticks, 0 or more, or None")
        # A thread answers in the next tick at best.
        least = max(1 if simulated_delay is None else simulated_delay, expected_delay or 0)
        if chunking != "blocking" and least >= chunk_size:
            raise ConfigError(
                f"A chunk has {chunk_size} actions and takes {least} ticks to arrive: none of it would be executed. "
                'Use chunking="blocking", a faster variant or a policy with longer chunks.'
            )
        if not any_rate and recorded is not None and abs(rate_hz / recorded - 1) > RATE_TOLERANCE:
            raise ConfigError(
                f"rate_hz is {rate_hz:g}; expected {recorded:g}, the rate of the actions that the policy was trained "
                "on. Pass any_rate=True if that is intended."
            )
        limited = any(number.max_rate is not None for number in robot.action)
        if limited and agreed is not None and rate_hz > (1 + RATE_TOLERANCE) * agreed:
            raise ConfigError(
                f"rate_hz is {rate_hz:g}; expected at most {agreed:g}, that of robot.json: its max_rate holds from "
                "tick to tick, and would be exceeded in a second, whatever rate_limit is given. Put a robot.toml "
                "without max_rate in its place (`meam robot add`), and give SafetySettings a rate_limit for this rate."
            )
        if chunking == "realtime" and not checks.takes_prefix:
            raise ConfigError(
                'chunking="realtime" needs a policy that takes a prefix, and this one takes no prefix. '
                'Use chunking="naive", or export the variant rtc and load it with variant="rtc".'
            )
        self._policy = policy
        self._rate_hz, self._chunking, self._overrun, self._max_age = rate_hz, chunking, overrun, age
        self._simulated, self._clock, self._sleep = simulated_delay is not None, clock, sleep
        self._given_delay = simulated_delay if expected_delay is None else expected_delay
        self._delay = 1 if self._given_delay is None else self._given_delay
        self._delays: deque[int] = deque(maxlen=_RECENT_DELAYS)
        self._accepts, self._limit, self._preview = checks.accepts, checks.limit_action, checks.preview_actions
        space, limits = policy.spec.action_space, ActionLimits.of(robot, policy.spec)
        neutral = np.clip(np.zeros(policy.spec.action_dim), limits.low, limits.high)
        self._neutral = self._last = self._chosen = neutral.reshape(space.shape).astype(space.dtype)
        self._home = None if limits.home is None else limits.home.reshape(space.shape).astype(space.dtype)
        if overrun == "home" and self._home is None:
            raise ConfigError(
                'overrun is "home"; expected another one, since no robot.json says where home is: a default of every '
                "action."
            )
        blend_in_s = timing.blend_in_s if blend_in_s is None else blend_in_s
        self._blend_in = BlendIn.of(robot, policy.spec, blend_in_s, rate_hz)
        self._budget = math.inf if timing.latency_budget_ms is None else timing.latency_budget_ms / 1e3
        self._schedule = ChunkSchedule(chunking, chunk_size, policy.spec.action_dim, steps)
        self._recorder = HealthRecorder()
        self._tick, self._closed = 0, False
        self._chunk: int | None = None
        self._chunk_before: int | None = None
        self._given_at: float | None = None
        self._stopped: str | None = None
        self._asked = 0
        self._flight = None
        if record is not None:
            settings = {
                "rate_hz": rate_hz,
                "chunking": chunking,
                "overrun": overrun,
                "execute_steps": steps,
                "max_observation_age_s": age,
                "blend_in_s": blend_in_s,
                "expected_delay": expected_delay,
                "simulated_delay": simulated_delay,
                "unchecked": unchecked,
            }
            recording = record if isinstance(record, Recording) else Recording(record)
            self._flight = FlightLog(recording, policy, settings, self._recorder)
        self._inference = self._new_inference(policy, simulated_delay)

    def _new_inference(self, policy: UncheckedPolicy, simulated_delay: int | None) -> Inference:
        if simulated_delay is None:
            return BackgroundInference(policy, self._clock)
        return SimulatedInference(policy, simulated_delay)

    def __repr__(self) -> str:
        """One line: what acts, and how."""
        state = "closed" if self._closed else "stopped" if self._stopped is not None else "running"
        return (
            f"ControlLoop({self._policy!r}, rate_hz={self._rate_hz:g}, chunking={self._chunking!r}, "
            f"overrun={self._overrun!r}, {state})"
        )

    def step(self, observation: Any, timestamp: float | None = None) -> NDArray[Any]:
        """Give the action of one tick.

        Returns at once, except in the first tick of an episode and where blocking chunks end. An inference that hangs
        there hangs the loop.

        Args:
            observation: One observation; it is copied.
            timestamp: When it was made: seconds on the loop's clock, in a simulation ticks of this episode / rate_hz.
                None for now.

        Returns:
            The action, shaped and typed like `spec.action_space`, finite and within its bounds. Always a fresh array.

        Raises:
            ActionError: there is no action and `overrun` is "stop"; or the loop is stopped or closed.
            ObservationError: the first observation of an episode is too old.
            MeamError: the inference failed, in the first tick of an episode or with `overrun` "stop".
        """
        self._require_running()
        if self._given_at is not None:
            self._skip_pause((self._clock() - self._given_at) * self._rate_hz)
        return self._give(observation, timestamp)

    def _give(self, observation: Any, timestamp: float | None = None) -> NDArray[Any]:
        """Give the action of the present tick, and record it."""
        age = self._age(timestamp)
        if self._flight is None:
            return self._act(observation, age)
        self._flight.begin(observation, self._tick, age)
        try:
            action = self._act(observation, age)
        except BaseException as error:
            self._flight.fail(error)
            raise
        self._flight.give(self._chosen, self._last, self._delay)
        return action

    def _act(self, observation: Any, age: float | None) -> NDArray[Any]:
        """Give the action of the present tick, from all that comes from outside: this, and the answers that arrive."""
        fresh = self._is_fresh(age)
        usable = fresh and self._is_accepted(observation)
        if self._schedule.empty:
            self._open(observation, fresh, usable)
        else:
            self._collect()
            if usable and not self._inference.pending and self._schedule.is_due(self._tick, self._delay):
                self._ask(observation)
                self._collect(wait=self._chunking == "blocking")
        self._chunk_before, self._chunk = self._chunk, None
        self._chosen = self._choose(fresh, usable)
        self._last = self._limit(self._chosen)
        self._tick += 1
        self._recorder.count("ticks")
        self._given_at = None if self._simulated else self._clock()
        return self._last.copy()

    def plan(self) -> Plan:
        """What the loop would execute next if no other chunk arrived, for a controller that takes whole chunks.

        Actions are limited as `step` would limit them, if the policy has `preview_actions`, as `MeamPolicy` does. In a
        tick that gave no action of a chunk, the plan is that tick's action alone.

        Raises:
            ActionError: there has been no `step` since the episode began.
        """
        if not self._tick:
            raise ActionError("There is no plan before the first step of an episode. Call step.")
        if self._chunk is None:
            return Plan(self._last[None].copy(), begun=True, observed=0)
        coming = self._schedule.rest(self._tick)
        if len(coming):
            blended = [self._blend_in.blend(action, self._tick + k) for k, action in enumerate(coming)]
            coming = self._preview(np.stack(blended))
        actions = np.concatenate([self._last[None], coming]).astype(self._last.dtype)
        return Plan(actions, self._chunk != self._chunk_before, self._tick - 1 - self._chunk)

    def _skip_pause(self, periods: float) -> None:
        """Skip the ticks that have passed since the last action, so many periods ago; before it, if it is negative."""
        if 0 <= periods < 2:
            return
        if self._flight is not None:
            self._flight.pause = periods
        chunk_size = self._policy.spec.chunk_size
        skipped = int(periods) - 1 if periods > 0 else chunk_size
        self._recorder.count("missed_deadlines", skipped if periods > 0 else 1)
        self._tick += skipped
        if skipped >= chunk_size:
            self._inference.discard()

    @typed()
    def run(
        self,
        read_observation: Callable[[], Any],
        send_action: Callable[[NDArray[Any]], Any],
        *,
        steps: int | None = None,
        stop: threading.Event | None = None,
        send_neutral_on_exit: bool | None = None,
    ) -> LoopHealth:
        """Act at the loop's rate, beginning with a new chunk.

        Tick k begins at start + k / rate_hz, where start is when the first action was there: errors of the sleep do
        not add up. A tick that begins late makes up for it; one that is more than a period late skips the deadlines
        that have passed, with their actions.

        However the loop ends, by an exception of `read_observation` or Ctrl-C too, the neutral action is sent last if
        wanted; without it the robot keeps the last action. Ctrl-C then raises KeyboardInterrupt: a script that goes on
        to its next episode would move the robot again.

        Args:
            read_observation: Reads the sensors; an observation, or a `StampedObservation` for one that is older than
                the call. With `max_observation_age_s` it must be stamped.
            send_action: Sends an action to the robot.
            steps: Ticks to run; None for no end.
            stop: Ends the loop before its next tick when it is set.
            send_neutral_on_exit: Send zero, clipped into the bounds and the contract's limits, at the end; or the home
                pose if `overrun` is "home". None for True if `overrun` is "zero", and else False: it may be far away.

        Returns:
            How the loop did.

        Raises:
            MeamError: as `step`.
            ConfigError: an argument has another type.
        """
        self._require_running()
        self._begin_episode()
        if self._flight is not None:
            self._flight.begin_run()
        start, slot = 0.0, 0
        try:
            for tick in itertools.count() if steps is None else range(steps):
                if tick and not self._simulated:
                    due, slot = slot + 1, self._wait_for_slot(start, slot + 1)
                    self._skip(slot - due)  # actions whose time has passed are not made up for
                if stop is not None and stop.is_set():
                    break
                action = self._step_stamped(read_observation)
                if not tick and not self._simulated:
                    start = self._clock()
                if self._closed:  # by another thread, meanwhile
                    break
                send_action(action)
        except BaseException as error:
            if self._flight is not None:
                self._flight.stop(error)
            raise
        finally:
            try:
                if self._overrun == "zero" if send_neutral_on_exit is None else send_neutral_on_exit:
                    self._send_neutral(send_action)
            finally:
                if self._flight is not None:
                    self._flight.end_run()
        return self.health()

    def _skip(self, ticks: int) -> None:
        self._tick += ticks
        if self._flight is not None:
            self._flight.skipped += ticks

    @property
    def _rest(self) -> NDArray[Any]:
        """The action that a run ends with: the neutral one, or home."""
        return self._home if self._overrun == "home" and self._home is not None else self._neutral

    def _go_to_rest(self) -> None:
        """Go to the neutral action, or home, as far as the rate limit allows."""
        self._last = self._limit(self._rest.copy())
        if self._flight is not None:
            self._flight.neutral(self._last)

    def _send_neutral(self, send_action: Callable[[NDArray[Any]], Any]) -> None:
        """Go to the neutral action, or home, in steps that the rate limit allows, for at most two seconds."""
        for _ in range(max(1, math.ceil(2 * self._rate_hz))):
            self._go_to_rest()
            send_action(self._last.copy())
            if np.array_equal(self._last, self._rest):
                return
            if not self._simulated:
                self._sleep(1 / self._rate_hz)

    @typed()
    def reset(self, seed: int | None = None) -> None:
        """Start a new episode, also after a stop: drop every action of the old one, with those still being computed.

        Does not wait for a running inference; the next step does, before its own.

        Args:
            seed: Seed of the policy's noise from here on, 0 or more; None leaves the noise going as it is.

        Raises:
            ActionError: the loop is closed.
            ConfigError: the seed is negative.
        """
        _check(seed is None or seed >= 0, "seed", seed, "a whole number of 0 or more")
        self._require_open()
        self._inference.reset(seed)
        self._begin_episode(reset=True)
        self._stopped = None

    def health(self) -> LoopHealth:
        """How the loop is doing; from any thread, at any time."""
        stopped = self._stopped is not None or self._closed
        dropped = 0 if self._flight is None else self._flight.dropped
        return self._recorder.read(delay_ticks=self._delay, stopped=stopped, dropped_records=dropped)

    @typed()
    def save_recording(self, timeout_s: float = 10.0) -> Path:
        """Write the ring of `Recording(ring_seconds=)` now; without a ring, what waits for the disk.

        From any thread, but not from the one that keeps the robot's time: it waits.

        Args:
            timeout_s: Seconds to wait for the disk.

        Returns:
            The newest file.

        Raises:
            ConfigError: nothing is recorded, or the time is below 0 or longer than the system can wait.
            OutputError: the disk does not take it; what a ring held is kept for another try.
        """
        _check_wait(timeout_s)
        if self._flight is None:
            raise ConfigError("Nothing is recorded; expected a loop made with record=, a path or a Recording.")
        return self._flight.save(timeout_s)

    @typed()
    def close(self, timeout_s: float = 1.0) -> None:
        """End the thread; the loop gives no more actions.

        Args:
            timeout_s: Seconds to wait for a running inference, and as many for a recording, which goes on being written
                afterwards, if need be until the process ends. An inference that hangs is left behind in its daemon
                thread, which uses the policy until it returns.

        Raises:
            ConfigError: the time is below 0, or longer than the system can wait.
        """
        _check_wait(timeout_s)
        self._closed = True
        self._inference.close(timeout_s)
        if self._flight is not None:
            self._flight.close(timeout_s)

    def __enter__(self) -> ControlLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ActionError("The control loop is closed. Make a new one.")

    def _require_running(self) -> None:
        self._require_open()
        if self._stopped is not None:
            raise ActionError(f"The control loop is stopped: {self._stopped} Call reset() to start again.")

    def _begin_episode(self, reset: bool = False) -> None:
        self._schedule.clear()
        if self._flight is not None:
            self._flight.episode(reset)
        self._tick, self._given_at, self._chunk = 0, None, None

    def _age(self, timestamp: float | None) -> float | None:
        if timestamp is None or (self._max_age is None and self._flight is None):
            return None
        try:
            return (self._tick / self._rate_hz if self._simulated else self._clock()) - timestamp
        except (TypeError, OverflowError):
            if self._max_age is None:  # nobody but the recorder asks
                return None
            raise

    def _is_fresh(self, age: float | None) -> bool:
        return age is None or self._max_age is None or abs(age) <= self._max_age  # False for NaN

    def _is_accepted(self, observation: Any) -> bool:
        try:
            return self._accepts(observation)
        except ObservationError as error:
            if self._schedule.empty:
                raise
            self._recorder.add_failure(error)
            if self._overrun == "stop":
                self._stop(error)
            return False

    def _open(self, observation: Any, fresh: bool, usable: bool) -> None:
        if not fresh:
            self._recorder.count("stale_observations")
            raise ObservationError(
                f"The first observation of the episode is older than {self._max_age:g} s, or its timestamp is not of "
                "the loop's clock, time.monotonic. Check the sensor."
            )
        if not usable:
            raise ObservationError(
                "The first observation of the episode is refused by the policy's SafetySettings, and there is no "
                "action to hold. Check the sensor."
            )
        self._blend_in.begin(observation)
        self._inference.discard()  # of an earlier run, or of a first tick that was interrupted
        self._ask(observation, opening=True)
        answer = self._inference.collect(self._tick, wait=True)
        assert answer is not None
        self._take(answer)
        if answer.error is not None:
            raise answer.error

    def _ask(self, observation: Any, opening: bool = False) -> None:
        # With weight zero in the opening one, which so warms up what the later ones run.
        prefix = self._schedule.prefix(self._tick, self._delay) if self._chunking == "realtime" else None
        if self._flight is not None:
            self._flight.asked = self._asked
        # Copied: drivers write the next reading into the same memory.
        self._inference.ask(ChunkRequest(copy.deepcopy(observation), self._tick, prefix, opening, self._asked))
        self._asked += 1

    def _collect(self, wait: bool = False) -> None:
        answer = self._inference.collect(self._tick, wait)
        if answer is None:
            return
        self._take(answer)
        if answer.error is not None and self._overrun == "stop":
            self._stop(answer.error)

    def _take(self, answer: ChunkAnswer) -> None:
        if self._flight is not None:
            self._flight.arrive(answer, self._delay, self._delays)
        if answer.chunk is None:
            assert answer.error is not None
            self._recorder.add_failure(answer.error)
            return
        self._recorder.count("inferences")
        self._schedule.begin(answer.chunk, self._tick if self._chunking == "blocking" else answer.request.tick)
        if answer.seconds is not None:
            self._measure(answer.seconds, answer.request)

    def _measure(self, seconds: float, request: ChunkRequest) -> None:
        if not request.opening:
            self._recorder.add_latency(seconds)
            self._recorder.count("over_budget", int(seconds > self._budget))
            self._delays.append(self._tick - request.tick)
        if self._given_delay is None:
            self._delay = max(self._delays, default=max(1, math.ceil(seconds * self._rate_hz)))

    def _choose(self, fresh: bool, usable: bool) -> NDArray[Any]:
        if not fresh:
            self._recorder.count("stale_observations")
            return self._fallback(f"an observation is older than {self._max_age:g} s.", blind=True)
        if not usable:
            return self._fallback("the policy's SafetySettings refuse the observation.", blind=True)
        action = self._schedule.action(self._tick)
        if action is not None:
            self._chunk = self._schedule.start
            return self._blend_in.blend(action, self._tick)
        if self._chunking == "blocking" and self._inference.pending:
            # Simulated: a real wait lasts within one tick, and the robot keeps its last command.
            self._recorder.count("missed_deadlines")
            return self._last
        self._recorder.count("overruns")
        return self._fallback("the running chunk is used up, and the next one has not arrived.")

    def _fallback(self, reason: str, blind: bool = False) -> NDArray[Any]:
        if self._overrun == "stop":
            self._stop(ActionError(f"No action is given: {reason} The control loop is stopped; call reset()."), reason)
        if self._overrun == "zero":
            return self._neutral
        if self._overrun == "home":
            assert self._home is not None
            return self._home
        # Without an observation to go by, a chunk is not begun again.
        return self._last if self._overrun == "hold" or blind else self._schedule.repeated_action(self._tick)

    def _stop(self, error: MeamError, reason: str | None = None) -> NoReturn:
        self._stopped = reason or str(error)
        raise error

    def _step_stamped(self, read_observation: Callable[[], Any]) -> NDArray[Any]:
        reading = read_observation()
        if isinstance(reading, StampedObservation):
            return self._give(reading.observation, reading.timestamp)
        if self._max_age is not None and not self._simulated:
            raise ObservationError(
                f"max_observation_age_s is {self._max_age:g}, but the observation has no timestamp. Return a "
                "StampedObservation from read_observation."
            )
        return self._give(reading)

    def _wait_for_slot(self, start: float, slot: int) -> int:
        """Sleep until a deadline, or take the newest of those that have passed."""
        late = self._clock() - (start + slot / self._rate_hz)
        if late <= 0:
            self._sleep(-late)
            return slot
        skipped = int(late * self._rate_hz)
        self._recorder.count("missed_deadlines", 1 + skipped)
        return slot + skipped


def _check(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        raise ConfigError(f"{name} is {value}; expected {expected}.")


def _check_wait(timeout_s: float) -> None:
    waits = 0 <= timeout_s <= threading.TIMEOUT_MAX
    _check(waits, "timeout_s", timeout_s, f"seconds from 0 to {threading.TIMEOUT_MAX:g}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f'{name} is "{value}"; expected one of {", ".join(choices)}.')
