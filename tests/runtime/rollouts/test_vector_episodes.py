import os
import pickle
import signal
import threading
from contextlib import closing
from functools import partial
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meam_policy import ActionError, BoxSpec, ConfigError, SpaceError, WorkerError, rollout
from meam_policy.acting.action_queue import ActionChunkQueue
from meam_policy.rollouts.episode_log import Trajectory

MODES = list(AutoresetMode)


class Corridor(gymnasium.Env):
    """A noisy walk whose seed decides how long it lasts, and whether it terminates; success at its third step."""

    def __init__(self, least=2, most=12, dict_space=False):
        box = spaces.Box(-np.inf, np.inf, (3,))
        self.observation_space = spaces.Dict({"arm": box, "wrist": box}) if dict_space else box
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.least, self.most = least, most

    def observe(self):
        place = self.place.astype(np.float32)
        return {"arm": place, "wrist": -2 * place} if isinstance(self.observation_space, spaces.Dict) else place

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(self.least, self.most + 1))
        self.terminates = bool(self.np_random.integers(2))
        self.place, self.steps = self.np_random.normal(size=3), 0
        return self.observe(), {"success": True}  # of a reset, which does not count

    def step(self, action):
        self.steps += 1
        self.place = self.place / 2 + self.np_random.normal(size=3)
        self.place[:2] += action
        done = self.steps == self.length
        info = {"success": self.steps == 3} if self.steps > 1 else {}
        ends = (done and self.terminates, done and not self.terminates)
        return self.observe(), float(self.place.sum()), *ends, info


class Fixed(Corridor):
    """A corridor of a given length, whatever its seed."""

    def __init__(self, length):
        super().__init__(length, length)


def one_hot_policy(make_policy, observation_dim=3, **arguments):
    """Every action depends on one observation and one noise number: no sum that a batch could round differently."""
    random = np.random.default_rng(3)
    action = arguments.get("action")
    width = 4 * (2 if action is None else action.size)
    weight = np.zeros((observation_dim, width))
    weight[random.integers(observation_dim, size=width), np.arange(width)] = random.normal(size=width) / 3
    noise_weight = np.diag(random.normal(size=width) / 3)
    return make_policy(weight=weight, noise_weight=noise_weight, **{"execute_steps": 3, **arguments})


def dict_policy(make_policy):
    boxes = [BoxSpec((3,), "float32", (-np.inf,) * 3, (np.inf,) * 3, key=key) for key in ("wrist", "arm")]
    return one_hot_policy(make_policy, 6, observation=boxes)


@pytest.fixture
def walker(make_policy):
    """A policy for the corridor, executing 3 of 4 actions a chunk."""
    return one_hot_policy(make_policy)


def run(policy, env, episodes, seed) -> tuple[Any, dict[int, Trajectory]]:
    trajectories: dict[int, Trajectory] = {}
    done: list[int] = []

    def take(index, trajectory):
        assert index not in trajectories
        trajectories[index] = trajectory

    result = rollout(policy, env, episodes, seed, record=True, on_episode=done.append, on_trajectory=take)
    assert done == list(range(1, episodes + 1))
    return result, trajectories


def assert_same_runs(one, other):
    for name in ("returns", "lengths", "successes"):
        np.testing.assert_array_equal(getattr(one[0], name), getattr(other[0], name))
    for ours, theirs in zip(one[0].observations, other[0].observations, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert one[1].keys() == other[1].keys()
    for index in one[1]:
        for ours, theirs in zip(one[1][index], other[1][index], strict=True):
            for key in ours if isinstance(ours, dict) else [...]:
                np.testing.assert_array_equal(ours[key], theirs[key], strict=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("episodes", "slots"), [(11, 3), (2, 3), (4, 4), (5, 1)])
def test_every_episode_is_that_of_a_single_environment(walker, mode, episodes, slots):
    single = run(walker.load(), Corridor(), episodes, 40)
    vector = run(walker.load(), SyncVectorEnv([Corridor] * slots, autoreset_mode=mode), episodes, 40)
    assert_same_runs(single, vector)
    if episodes == 11:
        assert len(set(single[0].lengths.tolist())) > 5
        assert {bool(t.terminations[-1]) for t in single[1].values()} == {True, False}
        assert set(single[0].successes.tolist()) == {True, False}


@pytest.mark.parametrize("mode", MODES)
def test_dict_observations_are_those_of_a_single_environment(make_policy, mode):
    policy = dict_policy(make_policy)
    corridor = partial(Corridor, dict_space=True)
    single = run(policy.load(), corridor(), 7, 1)
    assert_same_runs(single, run(policy.load(), SyncVectorEnv([corridor] * 3, autoreset_mode=mode), 7, 1))
    assert set(single[1][0].observations) == {"arm", "wrist"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dict_space", [False, True])
def test_environment_that_reuses_its_memory_gives_the_same(make_policy, dict_space, mode):
    corridor = partial(Corridor, dict_space=dict_space)
    policy = dict_policy(make_policy) if dict_space else one_hot_policy(make_policy)
    env = SyncVectorEnv([corridor] * 3, copy=False, autoreset_mode=mode)
    assert_same_runs(run(policy.load(), corridor(), 8, 0), run(policy.load(), env, 8, 0))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(1, 5),
    episodes=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    execute_steps=st.integers(1, 4),
    mode=st.sampled_from(MODES),
)
def test_any_policy_that_seeds_its_slots_runs_alike(make_spec, slots, episodes, seed, execute_steps, mode):
    spec = make_spec(execute_steps=execute_steps)
    single = run(SlotPolicy(spec), Corridor(), episodes, seed)
    vector = run(SlotPolicy(spec), SyncVectorEnv([Corridor] * slots, autoreset_mode=mode), episodes, seed)
    assert_same_runs(single, vector)


class SlotPolicy:
    """The least that `rollout` needs: NumPy in place of a network, computed row by row."""

    def __init__(self, spec):
        self.spec, self.inferences, self.queue = spec, 0, None
        self.generators = {}

    def reset(self, seed=None, mask=None):
        seeds = seed if isinstance(seed, list) else [seed]
        for slot, each in enumerate(seeds):
            if mask is None or mask[slot]:
                self.generators[slot] = np.random.default_rng(each)
        if mask is None:
            self.queue = None
        elif self.queue is not None:
            self.queue.clear(mask)

    def act(self, observation):
        rows = np.atleast_2d(observation)
        if self.queue is None:
            self.queue = ActionChunkQueue(len(rows), self.spec.chunk_size, self.spec.execute_steps, 2)
        slots = self.queue.empty_slots()
        if slots.size:
            noise = [self.generators[slot].normal(size=(self.spec.chunk_size, 2)) for slot in slots]
            chunks = [np.tanh(row[:2] + draw) for row, draw in zip(rows[slots], noise, strict=True)]
            self.queue.put(slots, np.array(chunks, np.float32))
            self.inferences += 1
        actions = self.queue.pop()
        return actions if np.ndim(observation) == 2 else actions[0]


def expected_first_action(policy, first_observation, seed):
    generator = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
    noise = generator.standard_normal(policy.spec.noise_dim, dtype=np.float32)
    return policy.chunks(np.atleast_2d(first_observation), np.atleast_2d(noise))[0, 0]


@pytest.mark.parametrize("slots", [None, 1, 3])
def test_first_action_of_an_episode_comes_from_its_first_observation(walker, slots):
    env = Corridor() if slots is None else SyncVectorEnv([Corridor] * slots)
    result, trajectories = run(walker.load(), env, 9, 70)
    assert any(length % 3 for length in result.lengths)  # something is left in the queue
    for index, trajectory in trajectories.items():
        assert isinstance(trajectory.observations, np.ndarray)
        expected = expected_first_action(walker, trajectory.observations[0], 70 + index)
        np.testing.assert_allclose(trajectory.actions[0], expected, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_that_ends_in_the_middle_of_a_chunk_leaves_the_other_rows_alone(walker, mode):
    makers = [partial(Fixed, length) for length in (5, 40, 40)]
    undisturbed = run(walker.load(), SyncVectorEnv([makers[1]] * 3, autoreset_mode=mode), 3, 9)[1]
    disturbed = run(walker.load(), SyncVectorEnv(makers, autoreset_mode=mode), 3 * 8, 9)[1]
    assert [len(disturbed[index].rewards) for index in (0, 1, 2, 3, 21)] == [5, 40, 40, 5, 5]
    for index in (1, 2):
        for ours, theirs in zip(undisturbed[index], disturbed[index], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_short_episodes_do_not_push_out_long_ones(walker):
    makers = [partial(Fixed, 2), partial(Fixed, 50)]
    assert rollout(walker.load(), SyncVectorEnv(makers), 6, 0).lengths.tolist() == [2, 50] * 3


def test_latencies_are_those_of_the_calls_that_ran_the_network(walker):
    policy = walker.load()
    result = rollout(policy, SyncVectorEnv([partial(Fixed, 7)] * 4), 4, 0)
    assert len(result.latencies) == policy.inferences == 3


class Forgetful(VectorWrapper):
    """A vector environment that knows no masks."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed)


def test_environment_that_resets_slots_in_the_middle_of_an_episode_is_refused(walker):
    env = Forgetful(SyncVectorEnv([partial(Fixed, 3), partial(Fixed, 8)]))
    with pytest.raises(ConfigError, match="has reset slot 1, whose episode was going on"):
        rollout(walker.load(), env, 4, 0)


def test_vector_environment_of_other_spaces_is_refused_before_it_is_reset(make_policy):
    policy = make_policy(action=BoxSpec((1,), "float32", (-2.0,), (2.0,)))
    with pytest.raises(SpaceError, match="action has shape"):
        rollout(policy.load(), SyncVectorEnv([Corridor]), 1, 0)


def test_interrupt_passes_on_after_what_was_finished_was_reported(walker):
    finished = []

    def interrupt(count):
        finished.append(count)
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rollout(walker.load(), SyncVectorEnv([Corridor] * 2), 50, 0, on_episode=interrupt)
    assert finished == [1, 2, 3]


@pytest.fixture(scope="module")
def real_makers():
    pytest.importorskip("mujoco")
    # It falls over at its own time; and one that never ends by itself.
    return {
        "InvertedPendulum-v5": partial(gymnasium.make, "InvertedPendulum-v5", max_episode_steps=30),
        "Pendulum-v1": partial(gymnasium.make, "Pendulum-v1", max_episode_steps=25),
        "meam/Pockets-v0": partial(gymnasium.make, "meam/Pockets-v0"),
    }


def real_policy(make_policy, env):
    boxes = BoxSpec.from_space(env.observation_space), BoxSpec.from_space(env.action_space)
    return one_hot_policy(make_policy, boxes[0].size, observation=[boxes[0]], action=boxes[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["InvertedPendulum-v5", "Pendulum-v1", "meam/Pockets-v0"])
def test_real_environments_give_the_same_in_a_vector(make_policy, real_makers, name, mode):
    make = real_makers[name]
    policy = real_policy(make_policy, make())
    single = run(policy.load(), make(), 5, 7)
    assert_same_runs(single, run(policy.load(), SyncVectorEnv([make] * 3, autoreset_mode=mode), 5, 7))
    assert (len(set(single[0].lengths.tolist())) > 1) == (name == "InvertedPendulum-v5")


@pytest.mark.slow
@pytest.mark.parametrize("shared_memory", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_subprocesses_give_the_same(make_policy, real_makers, mode, shared_memory):
    make = real_makers["InvertedPendulum-v5"]
    policy = real_policy(make_policy, make())
    env = AsyncVectorEnv([make] * 2, shared_memory=shared_memory, context="spawn", autoreset_mode=mode)
    try:
        if mode == AutoresetMode.NEXT_STEP and not shared_memory:
            with pytest.raises(ConfigError, match="shared_memory=True"):
                rollout(policy.load(), env, 5, 7)
            return
        single = run(policy.load(), make(), 5, 7)
        for _ in range(2):  # whatever state it was left in
            assert_same_runs(single, run(policy.load(), env, 5, 7))
    finally:
        env.close()


def test_network_that_sums_gives_the_same_up_to_rounding(make_policy, real_makers):
    # A chunk of Pockets is 20 numbers of 4 products each; its motion forgets, and does not amplify what is rounded.
    make = real_makers["meam/Pockets-v0"]
    boxes = BoxSpec.from_space(make().observation_space), BoxSpec.from_space(make().action_space)
    policy = make_policy(observation=[boxes[0]], action=boxes[1], execute_steps=3)
    single = run(policy.load(), make(), 6, 0)
    vector = run(policy.load(), SyncVectorEnv([make] * 4), 6, 0)
    np.testing.assert_array_equal(single[0].lengths, vector[0].lengths)
    for one, other in zip(single[0].observations, vector[0].observations, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_episodes_of_a_slot_follow_each_other_in_steps_of_the_number_of_slots(walker):
    order = []
    env = SyncVectorEnv([Corridor] * 3)
    rollout(walker.load(), env, 12, 0, on_trajectory=lambda index, _: order.append(index))
    assert sorted(order) == list(range(12))
    for slot in range(3):
        own = [index for index in order if index % 3 == slot]
        assert all(later - earlier == 3 for earlier, later in pairwise(own))


class Unpicklable(Exception):
    """An exception that no process can send to another."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Demanding(Exception):
    """An exception that can be sent, and not be received."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Doomed(Corridor):
    """A corridor of five steps that fails at a step, counted over all episodes."""

    def __init__(self, fails_at=None, way=None):
        super().__init__(5, 5)
        self.left, self.way = fails_at, way

    def step(self, action):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                if self.way is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                else:
                    raise self.way
        return super().step(action)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (None, "was killed by SIGKILL"),
        (ValueError("the arm\nis stuck"), r"failed: ValueError: the arm\nis stuck"),
        (Unpicklable(), "ended with exit code 0, without a report that could be read"),
        (Demanding(1, 2), "ended with exit code 0, without a report that could be read"),
        (ActionError("no action"), "failed: ActionError: no action"),
    ],
)
def test_a_worker_that_dies_is_named_with_the_episodes_that_were_finished(walker, monkeypatch, way, said):
    monkeypatch.setattr("meam_policy.environments.vector_environment.REPORT_S", 2.0)
    whole = rollout(walker.load(), SyncVectorEnv([Doomed] * 3), 9, seed=4)
    # The first step of its slot's third episode, when two episodes of every slot are finished.
    env = AsyncVectorEnv([Doomed, partial(Doomed, 11, way), Doomed], context="fork", autoreset_mode="Disabled")
    with pytest.raises(WorkerError) as caught:
        rollout(walker.load(), env, 9, seed=4)
    error = pickle.loads(pickle.dumps(caught.value))
    assert error.worker == 1
    assert f"Worker 1 of the 3 of the vector environment {said}. " in str(error)
    assert error.partial.partial
    assert error.partial.summary()["partial"] is True
    assert "partial" in repr(error.partial)
    np.testing.assert_array_equal(error.partial.returns, whole.returns[:6])
    assert "partial" not in whole.summary()
    assert env.closed
    env.close()
    assert not any(process.is_alive() for process in env.processes)


def test_a_worker_that_dies_before_any_episode_is_finished_leaves_no_result(walker):
    env = AsyncVectorEnv([partial(Doomed, 1), Doomed], context="fork", autoreset_mode="Disabled")
    with pytest.raises(WorkerError, match="Worker 0 of the 2") as caught:
        rollout(walker.load(), env, 4, seed=0)
    assert caught.value.partial is None


def test_a_failure_that_is_no_workers_is_not_blamed_on_one(walker):
    policy = walker.load()
    policy.act = lambda observation: (_ for _ in ()).throw(ZeroDivisionError("of the policy"))
    env = AsyncVectorEnv([Doomed] * 2, context="fork", autoreset_mode="Disabled")
    with pytest.raises(ZeroDivisionError, match="of the policy"), closing(env):
        rollout(policy, env, 2, seed=0)
