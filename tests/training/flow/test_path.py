import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_training.flow.path import flow_matching_loss, interpolate, score_from_velocity, time_like

TIMES = st.floats(0.0, 0.99)


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def test_the_interpolant_runs_from_noise_to_action():
    x_0, x_1 = tensor([[1.0, 2.0]] * 3), tensor([[5.0, -2.0]] * 3)
    x_t = interpolate(x_0, x_1, tensor([[0.0], [0.25], [1.0]]))
    np.testing.assert_allclose(x_t, [[1, 2], [2, 1], [5, -2]])


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_a_time_is_repeated_for_every_row(shape):
    times = time_like(torch.zeros(shape), 0.3)
    assert times.shape == (*shape[:-1], 1)
    assert (times == torch.tensor(0.3)).all()


def test_the_flow_matching_loss_is_the_weighted_mean_squared_error_of_the_velocity():
    generator = np.random.default_rng(0)
    predicted, x_0, x_1 = generator.normal(size=(3, 5, 2))
    weight = np.array([1.0, 0.0, 1.0, 0.5, 0.0])
    squares = (predicted - (x_1 - x_0)) ** 2
    expected = np.mean(squares.mean(axis=1) * weight)
    loss = flow_matching_loss(tensor(predicted), tensor(x_0), tensor(x_1), tensor(weight)[:, None])
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    within = np.array([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    loss = flow_matching_loss(tensor(predicted), tensor(x_0), tensor(x_1), tensor(within))
    assert loss.item() == pytest.approx(squares[within == 1].sum() / 10, rel=1e-12)


def test_the_gradient_of_the_flow_matching_loss_is_right():
    x_0, x_1 = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = tensor([1.0, 0.0, 2.0, 1.0])[:, None]
    predicted = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: flow_matching_loss(p, x_0, x_1, weight), (predicted,))


def gaussian(x, t, mean, std):
    """Density, velocity and score at time t of the flow from N(0, 1) to N(mean, std²), in one dimension."""
    variance = (1 - t) ** 2 + (t * std) ** 2
    offset = x - t * mean
    density = np.exp(-(offset**2) / (2 * variance)) / np.sqrt(variance)
    velocity = mean + (t * std**2 - (1 - t)) / variance * offset
    return density, velocity, -offset / variance


@given(t=TIMES, mean=st.floats(-2, 2), std=st.floats(0.05, 2))
def test_the_score_of_a_gaussian_follows_from_its_velocity(t, mean, std):
    x = np.linspace(-3, 3, 13)
    _, velocity, score = gaussian(x, t, mean, std)
    found = score_from_velocity(tensor(x)[:, None], tensor(velocity)[:, None], t)[:, 0]
    np.testing.assert_allclose(found, score, rtol=1e-8, atol=1e-8)


@given(t=TIMES, share=st.floats(0.01, 0.99), gap=st.floats(0.0, 2.0))
def test_the_score_of_a_mixture_follows_from_its_velocity(t, share, gap):
    x = np.linspace(-2, 2, 13)
    parts = [gaussian(x, t, -gap / 2, 0.3), gaussian(x, t, gap / 2, 0.5)]
    weights = np.array([share, 1 - share])[:, None] * [density for density, _, _ in parts]
    weights = weights / weights.sum(axis=0)
    velocity, score = (sum(w * part[i] for w, part in zip(weights, parts, strict=True)) for i in (1, 2))
    found = score_from_velocity(tensor(x)[:, None], tensor(velocity)[:, None], t)[:, 0]
    np.testing.assert_allclose(found, score, rtol=1e-8, atol=1e-8)
