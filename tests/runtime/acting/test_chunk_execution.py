"""A slot acts to the bit as a policy for it alone, whichever way its numbers take."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy import ActionError, BoxSpec, Health, MeamPolicy, ObservationError, PolicySpec, SafetySettings
from meam_policy.acting.safety import SafetyShell
from meam_policy.robot import RobotContract
from meam_policy.robot.contract import ActionNumber
from meam_policy.spec import Integration

INF = math.inf
COUNTS = [field.name for field in dataclasses.fields(Health) if field.type == "int" and field.name != "inferences"]


class RowByRow:
    """A session whose chunks are the same numbers however many rows are computed at once; some are beyond all bounds.

    An observation with a first number above 2 gives NaN.
    """

    takes_prefix, provider = False, "none"

    def __init__(self, spec):
        self.spec = spec

    def run_all(self, observation, noise, prefix=None, prefix_weight=None):
        chunks = np.array([row.sum() + 2 * draws for row, draws in zip(observation, noise, strict=True)], np.float32)
        chunks[observation[:, 0] > 2, -1] = np.nan
        return {"actions": chunks.reshape(len(chunks), self.spec.chunk_size, self.spec.action_dim)}


@st.composite
def policies(draw):
    """Makes policies of one kind, all alike."""
    numbers = draw(st.sampled_from([1, 3, 60]))  # more than are judged one by one
    dtype, low, high = draw(
        st.sampled_from(
            [
                ("float32", -1.0, 1.0),
                ("float32", -INF, INF),
                ("float32", -0.3, 0.7),
                ("float64", -0.3, 0.7),
                ("float16", -0.3, 0.7),
                ("int8", -2.0, 3.0),
            ]
        )
    )
    chunk_size = draw(st.integers(1, 4))
    mean, std = (
        draw(st.lists(st.floats(least, 2), min_size=numbers, max_size=numbers).map(tuple)) for least in (-2, 0.1)
    )
    spec = PolicySpec(
        observation=(BoxSpec((numbers,), "float32", (-INF,) * numbers, (INF,) * numbers),),
        action=BoxSpec((2,), dtype, (low,) * 2, (high,) * 2),
        chunk_size=chunk_size,
        execute_steps=draw(st.integers(1, chunk_size)),
        observation_mean=mean,
        observation_std=std,
        action_offset=(0.1,) * 2,
        action_scale=(1.0,) * 2,
        integration=Integration(1),
        method="by hand",
    )
    instead = st.sampled_from(["hold", "neutral"])
    safety = SafetySettings(
        on_bad_observation=draw(instead),
        on_bad_action=draw(instead),
        on_unfamiliar=draw(st.none() | instead),
        unfamiliarity_limit=draw(st.sampled_from([3.0, INF])),
        rate_limit=draw(st.sampled_from([None, 0.25])),
    )
    numbers = tuple(ActionNumber(name, "extra/number", "1", lower=-0.25, upper=0.5) for name in "ab")
    robot = RobotContract(action=numbers) if dtype != "int8" and draw(st.booleans()) else None
    return lambda seed: MeamPolicy(spec, RowByRow(spec), seed, safety=safety, robot=robot)


def observations(numbers, draw):
    row = draw(st.lists(st.floats(-4, 4, width=32), min_size=numbers, max_size=numbers))
    if draw(st.integers(0, 4)) == 0:
        row[draw(st.integers(0, numbers - 1))] = draw(st.sampled_from([math.nan, INF, -INF, 1e300, 100.0]))
    return np.array(row)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_slot_acts_to_the_bit_as_a_policy_for_it_alone(data):
    make, slots = data.draw(policies()), data.draw(st.integers(1, 3))
    together, alone = make(None), [make(None) for _ in range(slots)]
    together.reset(seed=list(range(slots)))
    for slot, policy in enumerate(alone):
        policy.reset(seed=[slot])
    numbers = together.spec.observation_dim
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.integers(0, 3)) == 0:
            # Slots that begin at different times are no longer in step.
            mask = np.array(data.draw(st.lists(st.booleans(), min_size=slots, max_size=slots)))
            seeds = data.draw(st.none() | st.integers(0, 99).map(lambda first: [first + slot for slot in range(slots)]))
            together.reset(seed=seeds, mask=mask)
            for slot in np.flatnonzero(mask).tolist():
                alone[slot].reset(seed=None if seeds is None else [seeds[slot]])
        rows = np.stack([observations(numbers, data.draw) for _ in range(slots)])
        deterministic = data.draw(st.sampled_from([None, True, False]))
        found = together.act(rows, deterministic=deterministic)
        for slot, (policy, row) in enumerate(zip(alone, rows, strict=True)):
            with np.errstate(over="ignore"):
                forms = [row, row.astype(np.float32), row.astype(">f8"), row.tolist(), row[None]]
            expected = policy.act(data.draw(st.sampled_from(forms)), deterministic=deterministic)
            np.testing.assert_array_equal(found[slot], np.squeeze(expected))
            assert found.dtype == expected.dtype == together.spec.action.dtype
    health, single = together.health(), [policy.health() for policy in alone]
    for name in COUNTS:
        assert getattr(health, name) == sum(getattr(each, name) for each in single), name
    known = [each.max_unfamiliarity for each in single if each.max_unfamiliarity is not None]
    assert health.max_unfamiliarity == max(known, default=None)


@settings(max_examples=100, deadline=None)
@given(make=policies(), steps=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_chunk_is_executed_as_its_actions_are_limited_one_by_one(make, steps, seed):
    policy, spec = make(seed), make(seed).spec
    limits = make(seed)  # whose shell sees the actions alone
    observation = np.array(spec.observation_mean, np.float32)
    found = [policy.act(observation, deterministic=False) for _ in range(steps)]
    draws, chunks = make(seed), []
    for _ in range(0, steps, spec.execute_steps):
        noise = draws._execution.noise.draw(np.arange(1))
        chunks += [*draws.predict_action_chunk(observation, noise=noise[0])[: spec.execute_steps]]
    expected = [limits.limit_action(action) for action in chunks[:steps]]
    np.testing.assert_array_equal(found, expected)
    assert policy.health().limited == limits.health().limited
    assert policy.health().rate_limited == limits.health().rate_limited


@settings(max_examples=100, deadline=None)
@given(data=st.data(), numbers=st.sampled_from([1, 4, 60]))
def test_one_observation_is_judged_to_the_bit_as_a_batch_of_it(data, numbers):
    number = st.floats(-1e3, 1e3)
    mean = data.draw(st.lists(number, min_size=numbers, max_size=numbers).map(tuple))
    std = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=numbers, max_size=numbers).map(tuple))
    box, unit = BoxSpec((numbers,), "float32", (-INF,) * numbers, (INF,) * numbers), ((0.0,), (1.0,))
    spec = PolicySpec((box,), BoxSpec((1,), "float32", *unit), 1, 1, mean, std, *unit, Integration(1), "by hand")
    row = data.draw(st.lists(st.floats(width=32), min_size=numbers, max_size=numbers))
    rows, healths, found = np.array([row], np.float32), (Health(), Health()), []
    for health, count in zip(healths, (1, 2), strict=True):
        settings_ = SafetySettings(on_bad_observation="hold", on_unfamiliar="neutral")
        found.append(SafetyShell(spec, settings_, health).judge(np.repeat(rows, count, axis=0)))
    assert found[1] == {slot: how for slot in range(2) for how in found[0].values()}
    assert healths[0].unfamiliarity == healths[1].unfamiliarity


@pytest.mark.parametrize("reaction", [None, "raise"])
def test_nothing_of_a_refused_observation_or_chunk_is_queued(reaction):
    box = BoxSpec((1,), "float32", (-INF,), (INF,))
    spec = PolicySpec((box,), box, 4, 4, (0.0,), (1.0,), (0.0,), (1.0,), Integration(1), "by hand")
    settings_ = {"on_bad_action": "raise" if reaction else "neutral", "on_bad_observation": reaction or "neutral"}
    policy = MeamPolicy(spec, RowByRow(spec), 0, safety=SafetySettings(**settings_))
    for bad, error in ((np.array([np.nan], np.float32), ObservationError), (np.array([3], np.float32), ActionError)):
        if reaction:
            with pytest.raises(error):
                policy.act(bad)
        else:
            assert policy.act(bad) == 0
        runs = policy.inferences
        assert policy.act(np.array([1], np.float32), deterministic=True) == 1
        assert policy.inferences == runs + 1
        policy.reset()
