import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from meam_training.algorithm.q_maximizer import maximize_q, pessimistic_value


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


@st.composite
def searches(draw):
    """A concave quadratic for every row, starts, number and length of the ascent steps."""
    count, batch, act = (draw(st.integers(1, n)) for n in (4, 5, 3))
    finite = st.floats(-3, 3, width=32)
    starts = draw(npst.arrays(np.float64, (count, batch, act), elements=finite))
    peaks = draw(npst.arrays(np.float64, (batch, act), elements=finite))
    curvatures = draw(npst.arrays(np.float64, act, elements=st.floats(0.01, 10)))

    def value(x):
        return -(tensor(curvatures) * (x - tensor(peaks)).square()).sum(dim=-1)

    return value, starts, draw(st.integers(0, 8)), draw(st.floats(0.01, 1.0))


@given(npst.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.floats(-9, 9)))
def test_the_pessimistic_value_is_mean_minus_population_deviations(values):
    for pessimism in (0.0, 0.5, 2.0):
        expected = values.mean(axis=0) - pessimism * values.std(axis=0)
        np.testing.assert_allclose(pessimistic_value(tensor(values), pessimism), expected, atol=1e-6)


def test_one_critic_is_never_doubted_and_has_a_finite_gradient():
    values = torch.ones(1, 3, requires_grad=True)
    pessimistic_value(values, 5.0).sum().backward()
    assert values.grad is not None
    np.testing.assert_array_equal(values.grad, 1)


@given(searches())
def test_the_result_stays_in_the_box(search):
    best, _ = maximize_q(search[0], tensor(search[1]), *search[2:])
    assert best.abs().max() <= 1


@given(searches())
def test_the_result_lies_within_reach_of_a_start(search):
    _, starts, steps, step_size = search
    best = maximize_q(search[0], tensor(starts), steps, step_size)[0].numpy()
    distances = np.sqrt(((best - starts.clip(-1, 1)) ** 2).mean(axis=-1))
    # The steps shrink linearly to zero.
    assert (distances.min(axis=0) <= sum(step_size * (1 - i / steps) for i in range(steps)) * (1 + 1e-9)).all()


@given(searches(), st.floats(1e-6, 3))
def test_the_result_lies_in_the_box_within_the_trust_radius_of_a_start(search, radius):
    value, starts, steps, step_size = search
    best = maximize_q(value, tensor(starts), steps, step_size, radius)[0].numpy()
    distances = np.sqrt(((best - starts.clip(-1, 1)) ** 2).mean(axis=-1))
    assert (distances.min(axis=0) <= radius * (1 + 1e-9)).all()
    assert np.abs(best).max() <= 1


@given(searches())
def test_a_trust_radius_beyond_reach_is_none(search):
    value, starts, steps, step_size = search
    free, bound = (maximize_q(value, tensor(starts), steps, step_size, r) for r in (math.inf, 4.0))
    torch.testing.assert_close(free, bound, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("peak", [(0.2, -0.3), (0.9, 0.1)])
@pytest.mark.parametrize("radius", [0.1, 0.5, math.inf])
def test_the_maximiser_of_a_concave_quadratic_is_found_as_near_as_the_trust_radius_allows(peak, radius):
    start, step_size = np.array([0.1, 0.1]), 0.1
    best = maximize_q(
        lambda x: -(x - tensor(peak)).square().sum(dim=-1), tensor(start)[None, None], 40, step_size, radius
    )[0][0]
    way = np.array(peak) - start
    length = np.sqrt((way**2).mean())
    expected = start + way * min(1, radius / length)
    # Far nearer than a step: the last ones are short.
    np.testing.assert_allclose(best, expected, atol=0.05 * step_size)


def test_the_maximiser_of_a_curved_value_is_found_far_more_precisely_than_a_step():
    scales = tensor([1.0, 10.0])
    for start in ([0.6, 0.6], [-0.5, 0.0]):
        best = maximize_q(
            lambda x: -(scales * (x - tensor([0.1, 0.3])).square()).sum(dim=-1), tensor([[start]]), 100, 0.05
        )[0][0]
        np.testing.assert_allclose(best, [0.1, 0.3], atol=0.1 * 0.05)


def test_steps_shrink_linearly():
    seen = []

    def value(x):
        seen.append(x.detach().clone())
        return x.sum(dim=-1)

    maximize_q(value, torch.full((1, 1, 3), -0.9, dtype=torch.float64), 4, 0.1)
    # Called at the starts, before each of the four steps, and at the end.
    lengths = np.diff([x[0, 0, 0].item() for x in seen[1:]])
    np.testing.assert_allclose(lengths, [0.1, 0.075, 0.05, 0.025])


@pytest.mark.slow
@given(searches())
def test_the_result_is_never_worse_than_any_start(search):
    value, starts, steps, step_size = search
    best, gain = maximize_q(value, tensor(starts), steps, step_size)
    start = value(tensor(starts).clamp(-1, 1))
    reached = value(best[None])[0]
    assert (reached >= start.max(dim=0).values).all()
    np.testing.assert_allclose(gain, reached - start[0], atol=1e-9)
    assert (gain >= 0).all()


@given(searches(), st.randoms(use_true_random=False))
def test_rows_are_searched_independently(search, random):
    _, starts, steps, step_size = search
    weights = tensor(np.random.default_rng(0).normal(size=starts.shape[-1]))

    def value(x):
        return (torch.sin(3 * x) * weights).sum(dim=-1)

    best, gain = maximize_q(value, tensor(starts), steps, step_size)
    order = list(range(starts.shape[1]))
    random.shuffle(order)
    permuted = maximize_q(value, tensor(starts[:, order]), steps, step_size)
    torch.testing.assert_close(permuted[0], best[order])
    torch.testing.assert_close(permuted[1], gain[order])


def test_a_step_has_its_length_however_steep_the_value_is():
    for steepness in (1e-6, 1.0, 1e6):
        best, _ = maximize_q(lambda x, s=steepness: s * x.sum(dim=-1), torch.zeros(1, 2, 4), 1, 0.1)
        np.testing.assert_allclose(best, 0.1, rtol=1e-5)


def test_a_flat_value_moves_nothing():
    starts = torch.tensor([[[0.25, -0.5]]])
    best, gain = maximize_q(lambda x: 0 * x.sum(dim=-1), starts, 5, 0.1)
    np.testing.assert_array_equal(best, starts[0])
    np.testing.assert_array_equal(gain, 0)


def test_the_best_of_several_hills_is_found_from_the_start_at_its_foot():
    def value(x):  # a low hill at -0.5, a high one at 0.5
        return (torch.exp(-20 * (x + 0.5) ** 2) + 2 * torch.exp(-20 * (x - 0.5) ** 2)).sum(dim=-1)

    best, gain = maximize_q(value, torch.tensor([[[-0.5]], [[0.3]]]), 10, 0.06)
    assert best.item() == pytest.approx(0.5, abs=0.01)
    assert gain.item() == pytest.approx(1, abs=0.01)


def test_the_result_is_detached():
    weight = torch.ones(2, requires_grad=True)
    best, gain = maximize_q(lambda x: x @ weight, torch.zeros(2, 3, 2), 2, 0.1)
    assert not best.requires_grad
    assert not gain.requires_grad
    assert weight.grad is None
