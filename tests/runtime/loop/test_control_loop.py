import itertools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy import ActionError, BoxSpec, ConfigError, MeamError, ObservationError, PolicySpec, SafetySettings
from meam_policy.loop.chunk_schedule import prefix_weights
from meam_policy.loop.control_loop import ControlLoop, StampedObservation
from meam_policy.spec import Integration

WAIT_S = 20  # only a broken loop takes this long
OBSERVATION = np.zeros(3, np.float32)


def make_spec(chunk_size=4, execute_steps=2, low=-1000.0, high=1000.0, shape=(2,), dtype="float32"):
    dim = math.prod(shape)
    return PolicySpec(
        integration=Integration(nfe=1),
        observation=(BoxSpec(shape=(3,), dtype="float32", low=(-np.inf,) * 3, high=(np.inf,) * 3),),
        action=BoxSpec(shape=shape, dtype=dtype, low=(low,) * dim, high=(high,) * dim),
        chunk_size=chunk_size,
        execute_steps=execute_steps,
        observation_mean=(0.0,) * 3,
        observation_std=(1.0,) * 3,
        action_offset=(0.0,) * dim,
        action_scale=(1.0,) * dim,
        method="by hand",
    )


class NumberedPolicy:
    """Action j of chunk n = 1, 2, ... is (n, j): an action tells where it comes from.

    Inference n raises `results[n]` if that is an error, and else answers with it. `during[n]` is called in it. With a
    gate, every inference but the first waits until `gate` is released.
    """

    takes_prefix = True

    def __init__(self, spec=None, results=None, during=None, gated=False):
        self.spec, self.results, self.during = spec or make_spec(), results or {}, during or {}
        self.observations, self.prefixes, self.weights, self.threads, self.resets = [], [], [], [], []
        self.gate = threading.Semaphore(1 if gated else 10**6)
        self.entered = threading.Semaphore(0)

    def predict_action_chunk(self, observation, *, prefix=None, prefix_weight=None):
        self.observations.append(observation)
        self.prefixes.append(prefix)
        self.weights.append(prefix_weight)
        self.threads.append(threading.current_thread())
        number = len(self.observations)
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT_S)
        self.during.get(number, lambda: None)()
        result = self.results.get(number)
        if isinstance(result, BaseException):
            raise result
        if result is not None:
            return result
        return np.array([(number, index) for index in range(self.spec.chunk_size)], np.float32)

    def reset(self, seed=None):
        self.resets.append((len(self.observations), seed))

    def accepts(self, observation):
        return True

    def limit_action(self, action):
        return action


class Clock:
    """Time that passes in sleeps, each longer than asked for by `overshoot`, and where a test lets it."""

    def __init__(self, overshoot=0.0):
        self.now, self.overshoot = 1000.0, overshoot

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds + self.overshoot

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def make_loop():
    """Makes loops; when the test ends, lets every inference end and closes them."""
    made = []

    def make(policy, rate_hz=100, **arguments):
        loop = ControlLoop(policy, rate_hz, **{"chunking": "naive", "clock": Clock(), **arguments})
        made.append((loop, policy))
        return loop

    yield make
    for loop, policy in made:
        if isinstance(policy, NumberedPolicy):
            policy.gate.release(1000)
        loop.close(timeout_s=WAIT_S)


def pairs(loop, ticks, observation=OBSERVATION):
    """The (chunk, index) of the actions of so many ticks."""
    return [tuple(int(number) for number in loop.step(observation)) for _ in range(ticks)]


def let_arrive(loop, policy, inferences=1):
    """Let inferences of a gated policy go on, until the answer of the newest one is there."""
    policy.gate.release(inferences)
    background = loop._inference
    with background._changed:
        assert background._changed.wait_for(lambda: background._answer is not None, WAIT_S)


# How chunks follow each other, in simulation.


def overlapping(chunk_size, execute_steps, delay, ticks):
    """The tick at which each chunk was asked for, and the (chunk, index) of each tick; index >= chunk_size: none."""
    first = max(1, min(execute_steps, chunk_size - delay))
    asked = [0, *(first + n * max(first, delay) for n in range(ticks))]
    newest = [max(n for n, tick in enumerate(asked) if n == 0 or tick + delay <= i) for i in range(ticks)]
    return asked, [(n + 1, i - asked[n]) for i, n in enumerate(newest)]


@pytest.mark.slow
@pytest.mark.parametrize("chunking", ["naive", "realtime"])
@given(st.data())
def test_overlapping_chunks_are_executed_from_the_tick_they_arrive_in_at_the_action_of_that_tick(chunking, data):
    chunk_size = data.draw(st.integers(2, 9))
    execute_steps = data.draw(st.integers(1, chunk_size))
    delay = data.draw(st.integers(0, chunk_size - 1))
    policy = NumberedPolicy(make_spec(chunk_size, execute_steps))
    loop = ControlLoop(policy, 50, chunking=chunking, overrun="repeat", simulated_delay=delay)
    _, expected = overlapping(chunk_size, execute_steps, delay, 40)
    assert pairs(loop, 40) == [(number, index % chunk_size) for number, index in expected]
    health = loop.health()
    assert health.overruns == sum(index >= chunk_size for _, index in expected)
    assert (health.ticks, health.missed_deadlines, health.delay_ticks) == (40, 0, delay)
    assert health.inferences == expected[-1][0]


@given(st.data())
def test_no_overrun_happens_while_the_delay_is_at_most_half_a_chunk(data):
    chunk_size = data.draw(st.integers(2, 12))
    steps, delay = data.draw(st.integers(1, chunk_size)), data.draw(st.integers(0, chunk_size // 2))
    loop = ControlLoop(NumberedPolicy(make_spec(chunk_size, steps)), 50, chunking="naive", simulated_delay=delay)
    pairs(loop, 60)
    assert loop.health().overruns == 0


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("execute_steps", [1, 2, 4])
def test_blocking_executes_its_steps_then_keeps_the_last_action_while_it_waits(execute_steps, delay):
    loop = ControlLoop(
        NumberedPolicy(make_spec(4, execute_steps)), 50, chunking="blocking", overrun="zero", simulated_delay=delay
    )
    cycles = [divmod(tick, execute_steps + delay) for tick in range(30)]
    assert pairs(loop, 30) == [(cycle + 1, min(rest, execute_steps - 1)) for cycle, rest in cycles]
    health = loop.health()
    assert health.missed_deadlines == sum(rest >= execute_steps for _, rest in cycles)
    assert health.overruns == 0


def test_execute_steps_of_the_loop_replace_those_of_the_policy():
    loop = ControlLoop(NumberedPolicy(), 50, chunking="naive", execute_steps=3, simulated_delay=0)
    assert pairs(loop, 4) == [(1, 0), (1, 1), (1, 2), (2, 0)]


@pytest.mark.parametrize("chunking", ["naive", "blocking"])
def test_without_delay_the_loop_acts_as_the_policy_does(make_policy, chunking):
    linear = make_policy(chunk_size=4, execute_steps=3)
    alone, policy = linear.load(seed=2), linear.load(seed=2)

    loop = ControlLoop(policy, 50, chunking=chunking, simulated_delay=0)
    for observation in np.random.default_rng(0).normal(size=(20, 3)):
        np.testing.assert_array_equal(loop.step(observation), alone.act(observation))


@pytest.mark.parametrize("chunking", ["naive", "blocking", "realtime"])
def test_simulation_repeats_exactly_with_its_seed(chunking):
    class NoisyPolicy(NumberedPolicy):
        def reset(self, seed=None):
            self.random = np.random.default_rng(seed)

        def predict_action_chunk(self, observation, **_):
            return self.random.normal(size=(4, 2))

    loop = ControlLoop(NoisyPolicy(), 50, chunking=chunking, simulated_delay=1)
    episodes = []
    for seed in (3, 3, 4):
        loop.reset(seed=seed)
        episodes.append([loop.step(OBSERVATION) for _ in range(11)])
    np.testing.assert_array_equal(episodes[0], episodes[1])
    assert not np.array_equal(episodes[0], episodes[2])


def test_simulation_starts_no_thread_and_reads_no_clock():
    def never(*_):
        raise AssertionError

    before = threading.active_count()
    loop = ControlLoop(NumberedPolicy(), 50, simulated_delay=2, max_observation_age_s=1, clock=never, sleep=never)
    loop.step(OBSERVATION, timestamp=0)
    health = loop.run(lambda: OBSERVATION, lambda _: None, steps=30)
    assert threading.active_count() == before
    assert (health.ticks, health.latency_last_ms, health.latency_p50_ms, health.latency_p99_ms) == (
        31,
        None,
        None,
        None,
    )


# Continuing the running chunk.


@given(st.data())
def test_weights_equal_the_formula_of_the_paper(data):
    chunk_size = data.draw(st.integers(1, 60))
    steps = data.draw(st.integers(0, chunk_size))
    delay = data.draw(st.integers(0, chunk_size - steps))
    expected = []
    for i in range(chunk_size):
        c = (chunk_size - steps - i) / (chunk_size - steps - delay + 1)
        soft = c * (math.exp(c) - 1) / (math.e - 1) if i >= delay else math.inf
        expected.append(1.0 if i < delay else soft if i < chunk_size - steps else 0.0)
    weights = prefix_weights(chunk_size, delay, steps)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert (weights.shape, weights.dtype) == ((chunk_size,), np.float32)
    assert (np.diff(weights) <= 0).all()


@pytest.mark.parametrize(
    ("delay", "steps", "expected"),
    [
        (5, 3, [1] * 5 + [0] * 3),  # everything that overlaps is executed before the new chunk arrives
        (8, 3, [1] * 5 + [0] * 3),
        (1000, 3, [1] * 5 + [0] * 3),
        (0, 8, [0] * 8),  # nothing overlaps
        (3, 8, [0] * 8),
        (8, 0, [1] * 8),
    ],
)
def test_weights_where_the_delay_reaches_the_end_of_the_overlap(delay, steps, expected):
    assert prefix_weights(8, delay, steps).tolist() == expected


def test_weights_of_very_long_chunks_are_finite():
    weights = prefix_weights(100_000, 50_000, 50_000)
    assert weights.tolist() == [1] * 50_000 + [0] * 50_000


@pytest.mark.parametrize(("delay", "steps"), [(-1, 2), (1, -1), (1, 5)])
def test_weights_refuse_what_is_out_of_range(delay, steps):
    with pytest.raises(ConfigError, match="expected 0"):
        prefix_weights(4, delay, steps)


@given(st.data())
def test_prefix_is_the_running_chunk_from_the_tick_of_the_observation_on(data):
    chunk_size = data.draw(st.integers(2, 9))
    steps, delay = data.draw(st.integers(1, chunk_size)), data.draw(st.integers(0, chunk_size - 1))
    policy = NumberedPolicy(make_spec(chunk_size, steps))
    loop = ControlLoop(policy, 50, chunking="realtime", simulated_delay=delay)
    executed = [loop.step(np.full(3, tick)) for tick in range(30)]
    asked, given_pairs = overlapping(chunk_size, steps, delay, 30)
    assert [observation[0] for observation in policy.observations] == [tick for tick in asked if tick < 30]
    for tick, prefix, weight in list(zip(asked, policy.prefixes, policy.weights, strict=False))[1:]:
        # The chunk that is running when the new one is asked for; without a delay it is replaced at once.
        number, index = given_pairs[tick] if delay else given_pairs[tick - 1]
        index += 0 if delay else 1
        rest = [(number, i) for i in range(index, chunk_size)]
        np.testing.assert_array_equal(prefix, rest + [(0, 0)] * (chunk_size - len(rest)))
        np.testing.assert_array_equal(weight, prefix_weights(chunk_size, delay, min(index, chunk_size)))
        for later in range(min(delay, 30 - tick)):  # what has weight one is executed indeed
            if weight[later] == 1:
                np.testing.assert_array_equal(executed[tick + later], prefix[later])


def test_prefix_of_an_opening_inference_has_weight_zero():
    policy = NumberedPolicy()
    loop = ControlLoop(policy, 50, chunking="realtime", simulated_delay=1)
    pairs(loop, 3)
    loop.reset()
    pairs(loop, 1)
    assert [bool(weight.any()) for weight in policy.weights] == [False, True, False]
    for prefix, weight in zip(policy.prefixes, policy.weights, strict=True):
        assert (prefix.shape, prefix.dtype, weight.shape, weight.dtype) == ((4, 2), np.float32, (4,), np.float32)


@pytest.mark.parametrize("chunking", ["naive", "blocking"])
def test_no_prefix_is_given_where_chunks_do_not_continue_each_other(chunking):
    class PlainPolicy(NumberedPolicy):
        takes_prefix = False

        def predict_action_chunk(self, observation):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().predict_action_chunk(observation)

    loop = ControlLoop(PlainPolicy(), 50, chunking=chunking, simulated_delay=1)  # pyright: ignore[reportArgumentType]
    pairs(loop, 10)
    assert loop.health().failed_inferences == 0


def test_expected_delay_sets_the_weights_and_how_early_a_chunk_is_asked_for():
    policy = NumberedPolicy(make_spec(8, 6))
    loop = ControlLoop(policy, 50, chunking="realtime", simulated_delay=1, expected_delay=4)
    for tick in range(8):
        loop.step(np.full(3, tick))
    assert [observation[0] for observation in policy.observations] == [0, 4]
    np.testing.assert_array_equal(policy.weights[1], prefix_weights(8, 4, 4))
    assert loop.health().delay_ticks == 4


# Ticks without an action.


@pytest.mark.parametrize(
    ("overrun", "instead"), [("hold", [(2, 3), (2, 3)]), ("repeat", [(2, 0), (2, 1)]), ("zero", [(0, 0), (0, 0)])]
)
def test_overrun_gives_what_was_chosen_and_is_counted(overrun, instead):
    loop = ControlLoop(NumberedPolicy(), 50, chunking="naive", overrun=overrun, simulated_delay=3)
    assert pairs(loop, 8) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 3), *instead, (3, 3)]
    assert loop.health().overruns == 2


def test_overrun_stop_raises_and_the_loop_stays_stopped_until_it_is_reset():
    loop = ControlLoop(NumberedPolicy(), 50, chunking="naive", overrun="stop", simulated_delay=3)
    assert pairs(loop, 5)[-1] == (2, 3)
    with pytest.raises(ActionError, match="used up, and the next one has not arrived. The control loop is stopped"):
        loop.step(OBSERVATION)
    assert loop.health().stopped
    for act in (lambda: loop.step(OBSERVATION), lambda: loop.run(lambda: OBSERVATION, print, steps=1)):
        with pytest.raises(ActionError, match=r"is stopped: .* not arrived. Call reset\(\) to start again."):
            act()
    health = loop.health()
    assert (health.stopped, health.ticks, health.overruns) == (True, 5, 1)
    loop.reset()
    assert not loop.health().stopped
    assert pairs(loop, 1) == [(4, 0)]


@pytest.mark.parametrize(("low", "high", "neutral"), [(-1, 1, 0), (0.5, 1, 0.5), (-1, -0.25, -0.25)])
def test_zero_is_the_number_within_the_bounds_that_is_closest_to_it(low, high, neutral):
    loop = ControlLoop(
        NumberedPolicy(make_spec(2, 1, low, high)),
        50,
        chunking="naive",
        overrun="zero",
        max_observation_age_s=1,
        simulated_delay=1,
    )
    loop.step(OBSERVATION)
    np.testing.assert_array_equal(loop.step(OBSERVATION, timestamp=-9), np.full(2, neutral, np.float32))


def test_inference_that_hangs_stops_no_step_and_is_used_when_it_comes(make_loop):
    policy = NumberedPolicy(make_spec(6, 2), gated=True)
    loop = make_loop(policy)
    assert pairs(loop, 9) == [(1, index) for index in (0, 1, 2, 3, 4, 5, 5, 5, 5)]
    assert loop.health().overruns == 3
    let_arrive(loop, policy)
    # Asked for in tick 2, and there in tick 9: its actions ended with tick 7.
    assert pairs(loop, 1) == [(1, 5)]
    let_arrive(loop, policy)
    assert pairs(loop, 2) == [(3, 1), (3, 2)]
    assert loop.health().overruns == 4


def test_inference_runs_in_a_daemon_thread_of_its_own(make_loop):
    policy = NumberedPolicy(make_spec(6, 2), gated=True)
    loop = make_loop(policy)
    pairs(loop, 3)
    assert policy.entered.acquire(timeout=WAIT_S)
    assert policy.entered.acquire(timeout=WAIT_S)  # in the second inference by now
    assert pairs(loop, 1) == [(1, 3)]
    (thread,) = set(policy.threads)
    assert thread is not threading.current_thread()
    assert thread.daemon


def test_blocking_step_waits_for_its_inference(make_loop):
    policy = NumberedPolicy(gated=True)
    loop = make_loop(policy, chunking="blocking")
    pairs(loop, 2)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(loop.step, OBSERVATION)
        policy.entered.acquire(timeout=WAIT_S)
        policy.entered.acquire(timeout=WAIT_S)
        assert not step.done()
        policy.gate.release()
        assert step.result(WAIT_S).tolist() == [2, 0]
    assert loop.health().overruns == 0


# Old observations.


@pytest.mark.parametrize("age", [0.31, 1e9, -0.31, -1.7e9, math.nan, math.inf])
@pytest.mark.parametrize(
    ("overrun", "instead"), [("hold", [(1, 0), (1, 0)]), ("repeat", [(1, 0), (1, 0)]), ("zero", [(0, 0), (0, 0)])]
)
def test_observation_beyond_the_age_is_not_acted_on(overrun, instead, age):
    policy = NumberedPolicy()
    loop = ControlLoop(policy, 10, chunking="naive", overrun=overrun, max_observation_age_s=0.3, simulated_delay=0)
    actions = [loop.step(np.full(3, tick), tick / 10 - (age if tick in (1, 2) else 0.25)) for tick in range(4)]
    assert [tuple(action) for action in actions] == [(1, 0), *instead, (2, 0)]
    assert [observation[0] for observation in policy.observations] == [0, 3]
    health = loop.health()
    assert (health.stale_observations, health.overruns, health.ticks) == (2, 0, 4)


def test_simulated_time_begins_with_the_episode():
    loop = ControlLoop(NumberedPolicy(), 10, chunking="naive", max_observation_age_s=0.3, simulated_delay=0)
    for _ in range(3):
        loop.reset()
        for tick in range(6):
            loop.step(OBSERVATION, timestamp=tick / 10)
    assert loop.health().stale_observations == 0


def test_old_observation_stops_a_loop_that_stops():
    loop = ControlLoop(
        NumberedPolicy(), 10, chunking="naive", overrun="stop", max_observation_age_s=0.3, simulated_delay=0
    )
    loop.step(OBSERVATION)
    with pytest.raises(ActionError, match="an observation is older than 0.3 s. The control loop is stopped"):
        loop.step(OBSERVATION, timestamp=-1)
    assert loop.health().stopped


@pytest.mark.parametrize("overrun", ["hold", "repeat", "zero", "stop"])
def test_old_first_observation_is_refused_since_nothing_can_be_held(overrun):
    loop = ControlLoop(
        NumberedPolicy(), 10, chunking="naive", overrun=overrun, max_observation_age_s=0.3, simulated_delay=0
    )
    with pytest.raises(ObservationError, match="first observation of the episode is older than 0.3 s"):
        loop.step(OBSERVATION, timestamp=-1)
    assert loop.health().stale_observations == 1
    assert pairs(loop, 1) == [(1, 0)]


def test_age_is_measured_on_the_clock_and_without_a_timestamp_is_none(make_loop):
    clock = Clock()
    loop = make_loop(NumberedPolicy(), 1, max_observation_age_s=0.5, clock=clock, overrun="zero")
    loop.step(OBSERVATION, 999.75)
    clock.passes(0.5)
    assert loop.step(OBSERVATION, 999.75).tolist() == [0, 0]
    assert pairs(loop, 1) != [(0, 0)]
    assert loop.health().stale_observations == 1


# Inferences that fail.


@pytest.mark.parametrize("overrun", ["hold", "repeat", "zero"])
def test_failed_inference_is_counted_and_asked_for_again_while_the_chunk_goes_on(overrun):
    error = ObservationError("Observation is nan at index [2].")
    policy = NumberedPolicy(results={2: error})
    loop = ControlLoop(policy, 50, chunking="naive", overrun=overrun, simulated_delay=1)
    assert pairs(loop, 6) == [(1, 0), (1, 1), (1, 2), (1, 3), (3, 1), (3, 2)]
    health = loop.health()
    assert (health.failed_inferences, health.overruns, health.inferences) == (1, 0, 2)
    assert health.last_error is error


@pytest.mark.parametrize(
    ("overrun", "instead"), [("hold", [(1, 3)] * 3), ("repeat", [(1, 0), (1, 1), (1, 2)]), ("zero", [(0, 0)] * 3)]
)
@pytest.mark.parametrize("delay", [0, 1])
def test_inference_that_always_fails_ends_in_overruns(overrun, instead, delay):
    policy = NumberedPolicy(results={n: ActionError("no") for n in range(2, 100)})
    loop = ControlLoop(policy, 50, chunking="naive", overrun=overrun, simulated_delay=delay)
    assert pairs(loop, 7) == [(1, 0), (1, 1), (1, 2), (1, 3), *instead]
    assert loop.health().overruns == 3


@pytest.mark.parametrize("simulated_delay", [1, None])
def test_failed_inference_is_raised_in_the_thread_of_a_loop_that_stops(make_loop, simulated_delay):
    error = ObservationError("Observation is nan at index [2].")
    policy = NumberedPolicy(results={2: error}, gated=True)
    loop = make_loop(policy, overrun="stop", simulated_delay=simulated_delay)
    if simulated_delay:
        policy.gate.release(10)
    pairs(loop, 3)
    if not simulated_delay:
        let_arrive(loop, policy)
    with pytest.raises(ObservationError) as caught:
        loop.step(OBSERVATION)
    assert caught.value is error
    with pytest.raises(ActionError, match=r"is stopped: Observation is nan at index \[2\]. Call reset"):
        loop.step(OBSERVATION)
    assert loop.health().stopped
    policy.gate.release(10)
    loop.reset()
    assert pairs(loop, 1) == [(3, 0)]


@pytest.mark.parametrize("chunking", ["naive", "blocking", "realtime"])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (np.full((4, 2), np.nan), "produced NaN or infinity"),
        (np.array([[0, 0], [0, 0], [0, 0], [0, np.inf]]), "produced NaN or infinity"),
        (np.zeros((1, 4, 2)), r"answered with shape \(1, 4, 2\); expected \(4, 2\). .* not a batch"),
        (np.zeros((3, 2)), r"answered with shape \(3, 2\); expected \(4, 2\)"),
        ("an answer", r"answered with shape \(\)"),
        (ZeroDivisionError("by zero"), "inference failed; no action comes of it: ZeroDivisionError: by zero"),
    ],
)
def test_whatever_a_policy_does_no_action_but_a_finite_one_leaves_the_loop(chunking, result, message):
    policy = NumberedPolicy(results={2: result, 3: result})
    loop = ControlLoop(policy, 50, chunking=chunking, simulated_delay=0)
    actions = np.array([loop.step(OBSERVATION) for _ in range(8)])
    assert np.isfinite(actions).all()
    assert actions[-1, 0] == 5
    health = loop.health()
    assert health.failed_inferences == 2
    assert isinstance(health.last_error, ActionError)
    with pytest.raises(MeamError, match=message):
        raise health.last_error
    assert (health.last_error.__cause__ is result) == isinstance(result, Exception)


@pytest.mark.parametrize("simulated_delay", [2, None])
@pytest.mark.parametrize("overrun", ["hold", "repeat", "zero", "stop"])
def test_failure_of_the_first_inference_is_raised_and_the_next_step_tries_again(make_loop, overrun, simulated_delay):
    policy = NumberedPolicy(results={1: ObservationError("nan"), 3: ObservationError("nan")})
    loop = make_loop(policy, overrun=overrun, simulated_delay=simulated_delay)
    for good in ((2, 0), (4, 0)):
        with pytest.raises(ObservationError, match="nan"):
            loop.step(OBSERVATION)
        assert not loop.health().stopped
        assert pairs(loop, 1) == [good]
        loop.reset()
    assert loop.health().failed_inferences == 2


# Episodes.


def test_no_action_of_an_old_episode_is_executed_even_if_its_inference_ends_later(make_loop):
    policy = NumberedPolicy(make_spec(8, 2), gated=True)
    loop = make_loop(policy)
    assert pairs(loop, 3)[-1] == (1, 2)
    for _ in range(2):
        assert policy.entered.acquire(timeout=WAIT_S)
    loop.reset(seed=5)  # in the second inference, and does not wait for it
    assert policy.resets == []
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(loop.step, OBSERVATION)
        policy.gate.release()
        assert policy.entered.acquire(timeout=WAIT_S)  # the old one has ended, the new one begun
        assert not step.done()
        assert policy.resets == [(2, 5)]
        policy.gate.release()
        assert step.result(WAIT_S).tolist() == [3, 0]
    policy.gate.release(1000)
    assert all(number >= 3 for number, _ in pairs(loop, 50))


def test_answer_that_arrived_before_the_reset_is_dropped_too(make_loop):
    policy = NumberedPolicy(make_spec(8, 2), gated=True)
    loop = make_loop(policy)
    pairs(loop, 3)
    let_arrive(loop, policy)
    loop.reset()
    policy.gate.release()
    assert pairs(loop, 1) == [(3, 0)]


def test_every_reset_reaches_the_policy_in_order_before_the_first_inference_of_the_episode(make_loop):
    policy = NumberedPolicy(make_spec(8, 2), gated=True)
    loop = make_loop(policy)
    pairs(loop, 3)
    for _ in range(2):
        assert policy.entered.acquire(timeout=WAIT_S)
    for seed in (5, None, 6):
        loop.reset(seed)
    policy.gate.release(2)
    assert pairs(loop, 1) == [(3, 0)]
    pairs(loop, 3)
    let_arrive(loop, policy)
    assert policy.resets == [(2, 5), (2, None), (2, 6)]  # and once each


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize("chunking", ["naive", "blocking", "realtime"])
def test_first_action_after_a_reset_comes_from_the_new_observation(chunking, delay):
    policy = NumberedPolicy()
    loop = ControlLoop(policy, 50, chunking=chunking, simulated_delay=delay)
    for ticks in range(1, 9):
        inferences = len(policy.observations)
        actions = [loop.step(np.full(3, 100 * ticks + tick)) for tick in range(ticks)]
        assert actions[0].tolist() == [inferences + 1, 0]
        assert policy.observations[inferences][0] == 100 * ticks
        loop.reset()


def test_first_tick_that_was_interrupted_is_begun_again_with_the_next_observation(make_loop, monkeypatch):
    policy = NumberedPolicy()
    loop = make_loop(policy)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop._inference, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.step(np.full(3, 1))
    loop.step(np.full(3, 2))
    assert policy.observations[-1][0] == 2


# Statistics.


def test_latency_and_delay_are_measured_without_the_opening_inference(make_loop):
    clock = Clock()
    during = {1: lambda: clock.passes(0.035), 2: lambda: clock.passes(0.02), 3: lambda: clock.passes(0.01)}
    policy = NumberedPolicy(make_spec(12, 4), during=during, gated=True)
    loop = make_loop(policy, rate_hz=100, clock=clock)
    pairs(loop, 1)
    health = loop.health()
    assert (health.latency_last_ms, health.delay_ticks) == (None, 4)  # 35 ms of 10 ms ticks, until a delay is measured
    pairs(loop, 6)  # asked for in tick 4
    let_arrive(loop, policy)
    assert pairs(loop, 1) == [(2, 3)]
    health = loop.health()
    assert health.latency_last_ms == pytest.approx(20)
    assert (health.delay_ticks, health.inferences) == (3, 2)
    pairs(loop, 1)  # tick 8
    let_arrive(loop, policy)
    assert pairs(loop, 1) == [(3, 1)]
    health = loop.health()
    assert health.latency_last_ms == pytest.approx(10)
    assert health.latency_p50_ms == pytest.approx(15)
    assert health.latency_p99_ms == pytest.approx(19.9)
    assert health.delay_ticks == 3  # the most of the last ones, not the last


def test_eight_threads_read_health_while_the_loop_runs(make_loop):
    loop = make_loop(NumberedPolicy())
    done = threading.Event()

    def read():
        seen = [loop.health()]
        while not done.is_set():
            seen.append(loop.health())
        return seen

    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read) for _ in range(8)]
        pairs(loop, 3000)
        done.set()
        for reader in readers:
            seen = reader.result(WAIT_S)
            assert all(a.ticks <= b.ticks and a.inferences <= b.inferences for a, b in itertools.pairwise(seen))
    assert loop.health().ticks == 3000


# Arrays.


@pytest.mark.parametrize("simulated_delay", [0, None])
def test_actions_and_observations_share_no_memory_with_anyone(make_loop, simulated_delay):
    chunk = np.ones((4, 2), np.float32)
    policy = NumberedPolicy(results={1: chunk, 2: chunk})
    loop = make_loop(policy, chunking="blocking", simulated_delay=simulated_delay)
    reading = {"arm": np.zeros(3), "hand": np.zeros(1)}
    for _ in range(4):
        action = loop.step(reading)
        assert action.tolist() == [1, 1]
        action[:] = chunk[:] = 7
        reading["arm"][:] += 1
        chunk[:] = 1 if len(policy.observations) < 2 else chunk
    assert [observation["arm"].tolist() for observation in policy.observations] == [[0] * 3, [2] * 3]


@pytest.mark.parametrize("overrun", ["hold", "zero"])
@pytest.mark.parametrize("shape", [(2,), ()])
def test_instead_of_a_missing_action_comes_a_fresh_array(overrun, shape):
    spec = make_spec(shape=shape)
    failures = {n: ActionError("no") for n in range(2, 100)}
    policy = NumberedPolicy(spec, results={1: np.ones((4, spec.action_dim)), **failures})
    loop = ControlLoop(policy, 50, chunking="naive", overrun=overrun, simulated_delay=0)
    for _ in range(4):
        loop.step(OBSERVATION)
    first = loop.step(OBSERVATION)
    assert isinstance(first, np.ndarray)
    expected = first.copy()
    first[...] = 99
    np.testing.assert_array_equal(loop.step(OBSERVATION), expected)


@pytest.mark.parametrize(("shape", "dtype"), [((2,), "float32"), ((2, 3), "float64"), ((), "float32")])
def test_actions_are_shaped_and_typed_like_the_action_space_and_within_its_bounds(shape, dtype):
    spec = make_spec(3, 2, -0.1, 0.1, shape, dtype)
    chunks = {n: np.random.default_rng(n).normal(size=(3, spec.action_dim)) for n in range(1, 9)}
    policy = NumberedPolicy(spec, results=chunks)
    loop = ControlLoop(policy, 50, chunking="realtime", simulated_delay=0)
    for tick in range(8):
        action = loop.step(OBSERVATION)
        number, index = divmod(tick, 2)
        expected = np.clip(chunks[number + 1][index].reshape(shape).astype(dtype), spec.action_space.low, 0.1)
        np.testing.assert_array_equal(action, np.minimum(expected, spec.action_space.high))
        assert isinstance(action, np.ndarray)
        assert spec.action_space.contains(action)


# Running at a rate.


def run_timed(loop, clock, steps, work=None, **arguments):
    """Run a loop with the given seconds of work in some ticks; the time of every action after the first one's."""
    times = []

    def send(_):
        times.append(clock())
        clock.passes((work or {}).get(len(times) - 1, 0.0))

    health = loop.run(lambda: OBSERVATION, send, steps=steps, **arguments)
    return np.array(times) - times[0], health


@pytest.mark.parametrize("rate_hz", [50, 333, 500])
def test_sleeps_that_last_too_long_do_not_add_up(make_loop, rate_hz):
    clock = Clock(overshoot=0.0003)
    loop = make_loop(NumberedPolicy(), rate_hz, clock=clock, sleep=clock.sleep)
    times, health = run_timed(loop, clock, 1000, work=dict.fromkeys(range(1000), 0.001))
    np.testing.assert_allclose(times[1:], np.arange(1, 1000) / rate_hz + 0.0003, rtol=0, atol=1e-9)
    assert (health.ticks, health.missed_deadlines) == (1000, 0)


def test_tick_that_is_late_by_less_than_a_period_is_made_up_for(make_loop):
    clock = Clock()
    loop = make_loop(NumberedPolicy(), 100, clock=clock, sleep=clock.sleep)
    times, health = run_timed(loop, clock, 8, work={2: 0.015})
    np.testing.assert_allclose(times, [0, 0.01, 0.02, 0.035, 0.04, 0.05, 0.06, 0.07], rtol=0, atol=1e-9)
    assert health.missed_deadlines == 1


def test_tick_that_is_late_by_more_than_a_period_skips_what_has_passed_and_keeps_the_grid(make_loop):
    clock = Clock()
    loop = make_loop(NumberedPolicy(), 100, clock=clock, sleep=clock.sleep)
    times, health = run_timed(loop, clock, 6, work={2: 0.035})
    np.testing.assert_allclose(times, [0, 0.01, 0.02, 0.055, 0.06, 0.07], rtol=0, atol=1e-9)
    assert (health.missed_deadlines, health.ticks) == (3, 6)  # of 0.03, 0.04 and 0.05


def test_blocking_inference_makes_the_next_tick_late(make_loop):
    clock = Clock()
    policy = NumberedPolicy(during={2: lambda: clock.passes(0.025)})
    loop = make_loop(policy, 100, chunking="blocking", clock=clock, sleep=clock.sleep)
    times, health = run_timed(loop, clock, 4)
    np.testing.assert_allclose(times, [0, 0.01, 0.045, 0.045], rtol=0, atol=1e-9)
    assert health.missed_deadlines == 2


def test_clock_starts_when_the_first_action_is_there(make_loop):
    clock = Clock()
    loop = make_loop(NumberedPolicy(during={1: lambda: clock.passes(5)}), 100, clock=clock, sleep=clock.sleep)
    times, health = run_timed(loop, clock, 3)
    np.testing.assert_allclose(times, [0, 0.01, 0.02], rtol=0, atol=1e-9)
    assert (health.missed_deadlines, health.latency_last_ms) == (0, None)


def test_run_begins_with_a_new_chunk():
    loop = ControlLoop(NumberedPolicy(make_spec(8, 4)), 50, chunking="naive", simulated_delay=1)
    sent = []
    for _ in range(2):
        loop.run(lambda: OBSERVATION, lambda action: sent.append(tuple(action)), steps=3)
    assert sent == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]


def test_run_takes_the_timestamps_of_stamped_observations():
    readings = iter([StampedObservation(OBSERVATION, stamp) for stamp in (0.0, -5.0, 0.2)])
    loop = ControlLoop(
        NumberedPolicy(), 10, chunking="naive", overrun="zero", max_observation_age_s=1, simulated_delay=0
    )
    sent = []
    health = loop.run(
        lambda: next(readings), lambda action: sent.append(tuple(action)), steps=3, send_neutral_on_exit=False
    )
    assert sent == [(1, 0), (0, 0), (2, 0)]
    assert health.stale_observations == 1


def test_stop_event_ends_the_loop_before_its_next_tick():
    stop, sent = threading.Event(), []
    loop = ControlLoop(NumberedPolicy(), 50, simulated_delay=0)

    def send(action):
        sent.append(action)
        if len(sent) == 3:
            stop.set()

    assert loop.run(lambda: OBSERVATION, send, stop=stop).ticks == 3
    assert len(sent) == 3


@pytest.mark.parametrize(
    ("overrun", "wanted", "neutral"),
    [("zero", None, True), ("zero", False, False), ("hold", None, False), ("stop", None, False), ("hold", True, True)],
)
@pytest.mark.parametrize("end", ["steps", "interrupt", "broken sensor"])
def test_neutral_action_is_sent_last_where_it_is_wanted_however_the_loop_ends(overrun, wanted, neutral, end):
    sent, error = [], {"interrupt": KeyboardInterrupt, "broken sensor": OSError}.get(end)

    def read():
        if len(sent) == 3 and error:
            raise error
        return OBSERVATION

    loop = ControlLoop(NumberedPolicy(), 50, chunking="naive", overrun=overrun, simulated_delay=0)

    def run():
        loop.run(read, lambda action: sent.append(tuple(action)), steps=3 + bool(error), send_neutral_on_exit=wanted)

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert sent == [(1, 0), (1, 1), (2, 0)] + [(0, 0)] * neutral


# Closing.


def test_close_ends_the_thread_and_the_loop(make_loop):
    policy = NumberedPolicy()
    with make_loop(policy) as loop:
        pairs(loop, 3)
    assert not policy.threads[0].is_alive()
    for act in (lambda: loop.step(OBSERVATION), loop.reset, lambda: loop.run(lambda: OBSERVATION, print)):
        with pytest.raises(ActionError, match="The control loop is closed. Make a new one."):
            act()
    health = loop.health()
    assert (health.stopped, health.ticks) == (True, 3)
    loop.close()


def test_close_returns_while_an_inference_hangs(make_loop):
    policy = NumberedPolicy(gated=True)
    loop = make_loop(policy)
    pairs(loop, 3)
    for _ in range(2):
        assert policy.entered.acquire(timeout=WAIT_S)
    loop.close(timeout_s=0.01)
    assert policy.threads[0].is_alive()
    policy.gate.release()
    policy.threads[0].join(WAIT_S)
    assert not policy.threads[0].is_alive()


def test_close_ends_a_step_that_waits(make_loop):
    policy = NumberedPolicy(gated=True)
    loop = make_loop(policy, chunking="blocking")
    pairs(loop, 2)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(loop.step, OBSERVATION)
        for _ in range(2):
            assert policy.entered.acquire(timeout=WAIT_S)
        loop.close(timeout_s=0)
        with pytest.raises(ActionError, match="closed while it waited for an inference"):
            step.result(WAIT_S)


def test_process_ends_while_an_inference_hangs(run_python, make_policy):
    linear = make_policy()
    code = (
        "import threading, numpy as np, meam_policy\n"
        "from meam_policy.loop.control_loop import ControlLoop\n"
        "class Hanging:\n"
        f"    spec = meam_policy.MeamPolicy.from_pretrained({str(linear.folder)!r}).spec\n"
        "    def predict_action_chunk(self, observation):\n"
        "        threading.Event().wait() if observation else None\n"
        "        return np.zeros((4, 2))\n"
        "loop = ControlLoop(Hanging(), 50, chunking='naive', unchecked=True)\n"
        "print([loop.step(tick).tolist() for tick in range(6)][-1])"
    )
    result = run_python("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "[0.0, 0.0]\n", "")


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate_hz": 0}, "rate_hz is 0; expected ticks a second, above 0"),
        ({"rate_hz": -1}, "rate_hz is -1"),
        ({"rate_hz": math.nan}, "rate_hz is nan"),
        ({"rate_hz": math.inf}, "rate_hz is inf"),
        ({"chunking": "Naive"}, 'chunking is "Naive"; expected one of realtime, naive, blocking'),
        ({"overrun": "panic"}, 'overrun is "panic"; expected one of hold, repeat, zero, home, stop'),
        ({"execute_steps": 0}, "execute_steps is 0; expected a whole number, 1 to chunk_size, 4"),
        ({"execute_steps": 5}, "execute_steps is 5"),
        ({"max_observation_age_s": 0}, "max_observation_age_s is 0; expected seconds above 0"),
        ({"max_observation_age_s": math.nan}, "max_observation_age_s is nan"),
        ({"simulated_delay": -1}, "simulated_delay is -1; expected whole ticks, 0 or more"),
        ({"expected_delay": -1}, "expected_delay is -1; expected whole ticks, 0 or more"),
        ({"simulated_delay": 4}, "has 4 actions and takes 4 ticks to arrive: none of it would be executed"),
        ({"expected_delay": 7}, "has 4 actions and takes 7 ticks to arrive: none of it would be executed"),
    ],
)
def test_argument_that_is_out_of_range_is_refused(arguments, message):
    before = threading.active_count()
    with pytest.raises(ConfigError, match=message):
        ControlLoop(NumberedPolicy(), **{"rate_hz": 50, "chunking": "naive", **arguments})
    assert threading.active_count() == before


def test_single_actions_cannot_be_computed_beside_the_loop(make_loop):
    with pytest.raises(ConfigError, match="A chunk has 1 actions and takes 1 ticks to arrive"):
        ControlLoop(NumberedPolicy(make_spec(1, 1)), 50, chunking="naive")
    assert pairs(make_loop(NumberedPolicy(make_spec(1, 1)), chunking="blocking"), 2) == [(1, 0), (2, 0)]


@pytest.mark.parametrize("takes_prefix", [False, None])
def test_realtime_refuses_a_policy_that_takes_no_prefix(takes_prefix):
    policy = NumberedPolicy()
    policy.takes_prefix = takes_prefix
    with pytest.raises(ConfigError, match=r'this one takes no prefix. Use chunking="naive"'):
        ControlLoop(policy, 50)


def without(policy, *names) -> Any:
    """A wrapper that passes everything on but some attributes."""
    kept = {"spec", "predict_action_chunk", "reset", "takes_prefix", "accepts", "limit_action"} - {*names}
    return SimpleNamespace(**{name: getattr(policy, name) for name in kept})


@pytest.mark.parametrize(
    "names", [["accepts"], ["limit_action"], ["takes_prefix"], ["takes_prefix", "accepts", "limit_action"]]
)
@pytest.mark.parametrize("chunking", ["naive", "realtime"])
def test_wrapper_that_forgets_a_check_is_refused_by_its_name_with_what_to_do(make_policy, names, chunking):
    wrapper = without(make_policy().load(), *names)
    with pytest.raises(ConfigError) as caught:
        ControlLoop(wrapper, 50, chunking=chunking)
    assert f"SimpleNamespace has no {', '.join(names)}; expected all of ChunkPolicy" in str(caught.value)
    assert "pass them on" in str(caught.value)
    assert "unchecked=True" in str(caught.value)


def test_unchecked_policy_is_taken_where_that_is_said(make_policy):
    policy = make_policy(chunk_size=4, execute_steps=4).load(safety=SafetySettings(rate_limit=0.05), seed=0)
    bare = without(policy, "takes_prefix", "accepts", "limit_action")
    loop = ControlLoop(bare, 50, chunking="naive", simulated_delay=0, unchecked=True)
    actions = [loop.step(np.sin(np.arange(3) + tick)) for tick in range(10)]
    assert np.abs(np.diff(actions, axis=0)).max() > 0.05
    assert policy.health().rate_limited == 0
    with pytest.raises(ConfigError, match="takes no prefix"):
        ControlLoop(bare, 50, chunking="realtime", unchecked=True)


def test_checks_that_an_unchecked_policy_has_are_in_force(make_policy):
    policy = make_policy(chunk_size=4, execute_steps=4).load(safety=SafetySettings(rate_limit=0.05), seed=0)
    loop = ControlLoop(without(policy, "takes_prefix"), 50, chunking="naive", simulated_delay=0, unchecked=True)
    actions = [loop.step(np.sin(np.arange(3) + tick)) for tick in range(10)]
    assert np.abs(np.diff(np.array(actions, np.float64), axis=0)).max() <= 0.05 + 1e-6
    assert policy.health().rate_limited > 0


def test_repr_is_one_line_with_the_policy_and_how_it_acts(make_policy):
    policy = make_policy().load()
    loop = ControlLoop(policy, 50, chunking="naive", simulated_delay=1)
    assert repr(loop) == f"ControlLoop({policy!r}, rate_hz=50, chunking='naive', overrun='hold', running)"
    loop.close()
    assert repr(loop).endswith("closed)")


def test_health_as_json_has_the_text_of_the_last_error():
    loop = ControlLoop(NumberedPolicy(results={2: ActionError("no")}), 50, chunking="naive", simulated_delay=0)
    fresh = loop.health().to_json()
    assert json.loads(json.dumps(fresh, allow_nan=False)) == fresh
    assert (fresh["last_error"], fresh["latency_p50_ms"]) == (None, None)
    pairs(loop, 3)
    found = loop.health().to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["last_error"] == {"error": "ActionError", "message": "no"}
    assert (found["ticks"], found["failed_inferences"]) == (3, 1)


def test_negative_seed_is_refused(make_loop):
    with pytest.raises(ConfigError, match="seed is -1; expected a whole number of 0 or more"):
        make_loop(NumberedPolicy()).reset(seed=-1)


def test_the_rate_limit_of_the_policy_holds_in_the_loop(make_policy):
    policy = make_policy(chunk_size=4, execute_steps=4).load(safety=SafetySettings(rate_limit=0.05), seed=0)
    loop = ControlLoop(policy, 50, chunking="naive", overrun="repeat", simulated_delay=1)
    actions = [loop.step(np.sin(np.arange(3) + tick)) for tick in range(30)]
    steps = np.abs(np.diff(np.array(actions, np.float64), axis=0))
    assert steps.max() <= 0.05 + 1e-6
    assert policy.health().rate_limited > 5
    loop.reset(seed=1)
    assert np.isfinite(loop.step(np.ones(3))).all()


def test_a_tick_never_waits_for_the_inference_of_a_real_policy(make_policy, monkeypatch):
    policy = make_policy(chunk_size=20, execute_steps=2).load(seed=0)
    release, begun, calls = threading.Event(), threading.Event(), itertools.count()
    run_all = policy.session.run_all

    def slow(*inputs):
        if next(calls):
            begun.set()
            assert release.wait(20)
        return run_all(*inputs)

    monkeypatch.setattr(policy.session, "run_all", slow)
    with ControlLoop(policy, 50, chunking="naive", overrun="zero") as loop:
        actions = [loop.step(np.zeros(3)) for _ in range(3)]
        assert begun.wait(20)
        # The inference is under way, and does not end before these ticks have been given.
        actions += [loop.step(np.zeros(3)) for _ in range(25)]
        assert loop.health().overruns > 0
        assert np.isfinite(actions).all()
        release.set()


def test_an_observation_that_the_policy_refuses_holds_the_last_action_and_is_counted(make_policy):
    safety = SafetySettings(on_bad_observation="hold", on_unfamiliar="hold", unfamiliarity_limit=5)
    policy = make_policy(chunk_size=4, execute_steps=4).load(safety=safety, seed=0)
    loop = ControlLoop(policy, 50, chunking="naive", overrun="repeat", simulated_delay=1)
    last = loop.step(np.zeros(3))
    for bad in ([np.nan, 0, 0], [0, 6, 0]):
        np.testing.assert_array_equal(loop.step(np.array(bad)), last)
    assert (policy.health().bad_observations, policy.health().unfamiliar) == (1, 1)
    loop.reset(seed=0)
    with pytest.raises(ObservationError, match="first observation of the episode is refused"):
        loop.step(np.full(3, np.nan))


def test_another_rate_than_that_of_the_training_data_is_refused(make_policy):
    policy = make_policy(control_rate_hz=10.0).load()
    with pytest.raises(ConfigError, match="rate_hz is 50; expected 10, the rate of the actions"):
        ControlLoop(policy, 50, chunking="naive")
    ControlLoop(policy, 50, chunking="naive", any_rate=True).close()
    ControlLoop(policy, 10, chunking="naive").close()


def test_the_way_to_the_neutral_action_keeps_the_rate_limit(make_policy):
    policy = make_policy(chunk_size=4, execute_steps=4).load(safety=SafetySettings(rate_limit=0.05), seed=0)
    loop = ControlLoop(policy, 50, chunking="naive", overrun="zero", simulated_delay=1)
    sent = []
    loop.run(lambda: np.ones(3), sent.append, steps=8)
    assert np.abs(np.diff(np.array(sent, np.float64), axis=0)).max() <= 0.05 + 1e-6
    np.testing.assert_array_equal(sent[-1], 0)


@pytest.mark.parametrize("action", [[np.nan, 0.0], [np.inf, 0.0], [0.0], [[0.0, 0.0]]])
def test_an_action_that_is_not_one_is_refused_and_does_not_loosen_the_limit(make_policy, action):
    policy = make_policy().load(safety=SafetySettings(rate_limit=0.1))
    first = policy.limit_action(np.zeros(2))
    with pytest.raises(ActionError, match="expected finite numbers of shape"):
        policy.limit_action(action)
    assert np.abs(policy.limit_action(np.ones(2)) - first).max() <= 0.1 + 1e-6


def test_an_age_limit_wants_timestamps(make_policy):
    policy = make_policy().load()
    with (
        ControlLoop(policy, 50, chunking="naive", max_observation_age_s=0.1) as loop,
        pytest.raises(ObservationError, match=r"has no timestamp\. Return a StampedObservation"),
    ):
        loop.run(lambda: np.zeros(3), lambda _: None, steps=2)


@pytest.mark.parametrize("name", ["simulated_delay", "expected_delay", "execute_steps"])
def test_ticks_are_whole(make_policy, name):
    with pytest.raises(ConfigError, match=rf"{name} is 1.5 \(float\); expected a whole number"):
        ControlLoop(make_policy().load(), 50, chunking="naive", **cast(Any, {name: 1.5}))


# Pauses between two calls of `step`, and clocks that jump.


@pytest.fixture
def timed_loop(make_loop):
    """A loop of 100 Hz on a clock of ours, whose chunks of 4 actions are executed whole, and its policy."""

    def make(**arguments):
        policy, clock = NumberedPolicy(make_spec(chunk_size=4, execute_steps=4), gated=True), Clock()
        return make_loop(policy, clock=clock, **{"expected_delay": 0, **arguments}), policy, clock

    return make


def test_ticks_at_the_rate_follow_each_other(timed_loop):
    loop, _, clock = timed_loop()
    found = pairs(loop, 1)
    for period in (0.01, 0.019, 0.0):
        clock.passes(period)
        found += pairs(loop, 1)
    assert found == [(1, 0), (1, 1), (1, 2), (1, 3)]
    assert loop.health().missed_deadlines == 0


def test_a_pause_skips_the_actions_whose_time_has_passed(timed_loop):
    loop, _, clock = timed_loop()
    pairs(loop, 1)
    clock.passes(0.0301)
    assert pairs(loop, 1) == [(1, 3)]
    assert (loop.health().missed_deadlines, loop.health().overruns) == (2, 0)


@pytest.mark.parametrize(("jump", "missed"), [(0.0501, 4), (3600.001, 359_999), (-0.01, 1), (-3600.0, 1)])
@pytest.mark.parametrize("overrun", ["hold", "zero", "repeat", "stop"])
def test_after_a_long_pause_or_a_jump_nothing_that_is_queued_is_executed(timed_loop, jump, missed, overrun):
    loop, policy, clock = timed_loop(overrun=overrun)
    assert pairs(loop, 2) == [(1, 0), (1, 1)]
    clock.passes(jump)
    if overrun == "stop":
        with pytest.raises(ActionError, match="used up"):
            loop.step(OBSERVATION)
        assert loop.health().stopped
    elif overrun == "repeat":
        assert pairs(loop, 1)[0][0] == 1
    else:
        assert pairs(loop, 1) == [(1, 1) if overrun == "hold" else (0, 0)]
    assert (loop.health().missed_deadlines, loop.health().overruns) == (missed, 1)
    if overrun != "stop":
        let_arrive(loop, policy)
        assert pairs(loop, 1) == [(2, 1)]  # asked for in the tick after the jump


def test_a_chunk_that_was_under_way_before_a_jump_is_not_executed(timed_loop):
    loop, policy, clock = timed_loop(expected_delay=3)
    pairs(loop, 2)  # the second asks for a chunk
    assert all(policy.entered.acquire(timeout=WAIT_S) for _ in range(2))
    clock.passes(-1.0)
    assert pairs(loop, 1) == [(1, 1)]
    let_arrive(loop, policy, 2)
    assert pairs(loop, 1) == [(3, 1)]
    assert loop.health().inferences == 2


def test_a_pause_is_no_delay_of_an_inference(timed_loop):
    loop, policy, clock = timed_loop(expected_delay=None)
    pairs(loop, 4)
    clock.passes(10.0)
    pairs(loop, 1)
    let_arrive(loop, policy, 2)
    pairs(loop, 1)
    assert loop.health().delay_ticks == 1


def test_blocking_chunks_begin_anew_after_a_pause(timed_loop):
    loop, policy, clock = timed_loop(chunking="blocking")
    pairs(loop, 2)
    clock.passes(1.0)
    policy.gate.release()
    assert pairs(loop, 2) == [(2, 0), (2, 1)]


def test_an_episode_begins_without_the_pause_before_it(timed_loop):
    loop, policy, clock = timed_loop()
    pairs(loop, 2)
    loop.reset()
    clock.passes(60.0)
    policy.gate.release()
    assert pairs(loop, 2) == [(2, 0), (2, 1)]
    assert loop.health().missed_deadlines == 0


@given(st.lists(st.floats(-0.1, 0.1) | st.floats(-1e6, 1e6), max_size=20))
def test_no_action_is_executed_later_than_half_the_rate_would_be(jumps):
    clock, began, last = Clock(), 0.0, 0
    with ControlLoop(NumberedPolicy(), 100, chunking="blocking", execute_steps=4, clock=clock) as loop:
        for jump in [0.0, *jumps]:
            clock.passes(jump)
            ((chunk, index),) = pairs(loop, 1)
            if chunk > last:
                assert index == 0
                began, last = clock.now, chunk
            assert -1e-6 <= (clock.now - began) * 100 <= 2 * index + 1e-6


# The plan: what would be executed next if no other chunk arrived


def planned(loop):
    plan = loop.plan()
    return [tuple(int(n) for n in action) for action in plan.actions], plan.begun, plan.observed


def test_the_plan_is_the_rest_of_the_running_chunk_and_says_when_another_began():
    loop = ControlLoop(NumberedPolicy(), 50, chunking="naive", simulated_delay=1)
    with pytest.raises(ActionError, match="no plan before the first step"):
        loop.plan()
    seen = []
    for _ in range(6):
        action = loop.step(OBSERVATION)
        actions, begun, observed = planned(loop)
        assert actions[0] == tuple(int(n) for n in action)
        seen.append((actions, begun, observed))
    # Chunk 2 is asked for at tick 2 and is there at tick 3, with its action 1; chunk 3 at ticks 4 and 5.
    assert seen == [
        ([(1, 0), (1, 1), (1, 2), (1, 3)], True, 0),
        ([(1, 1), (1, 2), (1, 3)], False, 1),
        ([(1, 2), (1, 3)], False, 2),
        ([(2, 1), (2, 2), (2, 3)], True, 1),
        ([(2, 2), (2, 3)], False, 2),
        ([(3, 1), (3, 2), (3, 3)], True, 1),
    ]
    loop.reset()
    with pytest.raises(ActionError, match="no plan"):
        loop.plan()


def test_a_blocking_loop_plans_what_it_executes_of_a_chunk():
    loop = ControlLoop(NumberedPolicy(), 50, chunking="blocking", simulated_delay=0)
    plans = [(loop.step(OBSERVATION), planned(loop))[1] for _ in range(3)]
    assert plans == [([(1, 0), (1, 1)], True, 0), ([(1, 1)], False, 1), ([(2, 0), (2, 1)], True, 0)]


def test_the_plan_of_a_tick_without_an_action_is_what_it_gave():
    policy = NumberedPolicy(results={2: MeamError("gone"), 3: MeamError("gone"), 4: MeamError("gone")})
    loop = ControlLoop(policy, 50, chunking="naive", simulated_delay=1, overrun="hold", execute_steps=4)
    plans = [(loop.step(OBSERVATION), planned(loop))[1] for _ in range(5)]
    assert plans[3] == ([(1, 3)], False, 3)
    assert plans[4] == ([(1, 3)], True, 0)  # held: a controller must not go on with what it was told before


def test_the_plan_is_what_the_ticks_then_give_within_limits_and_rates(tmp_path):
    class Limited(NumberedPolicy):
        """Moves by at most 0.5 a tick, and remembers."""

        last = None

        def limit_action(self, action):
            self.last = self.preview_actions(action[None])[0]
            return self.last

        def preview_actions(self, actions):
            last, found = self.last, []
            for action in actions:
                last = action if last is None else np.clip(action, last - 0.5, last + 0.5)
                found.append(last)
            return np.stack(found)

    loop = ControlLoop(Limited(), 50, chunking="blocking", execute_steps=4, simulated_delay=0)
    loop.step(OBSERVATION)
    plan = loop.plan().actions
    then = [loop.step(OBSERVATION) for _ in range(3)]
    np.testing.assert_array_equal(plan[1:], then)
    assert plan[-1, 1] == 1.5
