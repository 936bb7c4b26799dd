"""Velocity fields with the velocity of a Gaussian built in."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meam_training.flow.path import time_like
from meam_training.flow.velocity import linearize
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.preconditioner import preconditioning
from meam_training.networks.velocity_field import VelocityField
from meam_training.trainer import make_spec

MEAN, STD = (0.4, -0.7), 0.3
CENTRE = torch.tensor(MEAN, dtype=torch.float64)
KNOWN = DataStatistics(action_mean=MEAN, action_std=STD)


def variance(t):
    return (1 - t) ** 2 + t**2 * STD**2


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field_of(statistics: DataStatistics | None = KNOWN, layer_norm=False, seed=0):
    """A field in float64 with nothing left at zero or one."""
    field = VelocityField(4, 2, (6, 5), layer_norm=layer_norm, statistics=statistics).double()
    if field.preconditioner is not None:  # they were rounded to float32
        exact = {"mean": CENTRE, "std": torch.tensor(STD, dtype=torch.float64)}
        field.preconditioner.load_state_dict(exact)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return field


def drawn(*more):
    return (
        normal(7, 4),
        normal(*more, 7, 2, seed=2),
        torch.rand(*more, 7, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )


@given(t=st.floats(0, 1), std=st.floats(1e-3, 2))
def test_the_coefficients_are_those_of_their_definition_and_the_same_for_numbers_and_tensors(t, std):
    variance = (1 - t) ** 2 + t**2 * std**2
    expected = (t * std**2 - (1 - t)) / variance, 1 / np.sqrt(variance), std / np.sqrt(variance)
    np.testing.assert_allclose(preconditioning(t, std), expected, rtol=1e-12)
    tensors = preconditioning(torch.tensor([t], dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    np.testing.assert_allclose(torch.cat(tensors), expected, rtol=1e-12)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_preconditioned_field_is_its_plain_network_between_the_coefficients(layer_norm):
    field, plain = field_of(layer_norm=layer_norm), field_of(None, layer_norm)
    features, x, t = drawn()
    with torch.no_grad():
        plain.load_state_dict(field.state_dict(), strict=False)
        v = CENTRE + (t * STD**2 - (1 - t)) / variance(t) * (x - t * CENTRE)
        v = v + STD / variance(t).sqrt() * plain(features, (x - t * CENTRE) / variance(t).sqrt(), t)
        torch.testing.assert_close(field(features, x, t), v, rtol=1e-12, atol=1e-12)
    assert {"preconditioner.mean", "preconditioner.std"} == field.state_dict().keys() - plain.state_dict().keys()


def test_a_network_that_outputs_nothing_leaves_the_exact_velocity_of_the_gaussian():
    field = field_of()
    with torch.no_grad():
        for parameter in field.layers[-1].parameters():
            parameter.zero_()
    features, x, t = drawn()
    # E[x_1 - x_0 | x_t], by the covariances of x_t = (1 - t) x_0 + t (m + std z)
    exact = CENTRE + (t * STD**2 - (1 - t)) / variance(t) * (x - t * CENTRE)
    torch.testing.assert_close(field(features, x, t), exact, rtol=1e-12, atol=1e-12)
    # From noise to action: the flow's exact map is x_1 = m + std x_0.
    steps, point = 1500, x
    for k in range(steps):
        middle = point + field(features, point, torch.full_like(t, k / steps)) / (2 * steps)
        point = point + field(features, middle, torch.full_like(t, (k + 0.5) / steps)) / steps
    torch.testing.assert_close(point.detach(), CENTRE + STD * x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_inputs_and_regression_targets_of_the_network_have_unit_variance(t):
    generator, draws = np.random.default_rng(0), 200_000
    x_0, x_1 = generator.normal(size=draws), MEAN[0] + STD * generator.normal(size=draws)
    c, centred = preconditioning(t, STD), (1 - t) * x_0 + t * (x_1 - MEAN[0])
    assert (c.scale * centred).std() == pytest.approx(1, rel=0.01)
    target = (x_1 - x_0 - MEAN[0] - c.skip * centred) / c.gain
    assert target.std() == pytest.approx(1, rel=0.01)
    assert target.mean() == pytest.approx(0, abs=0.01)
    # And nothing linear in the input is left in it.
    assert np.corrcoef(target, centred)[0, 1] == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("more", [(), (3,)])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_jacobian_of_a_preconditioned_field_is_that_of_autograd(layer_norm, more):
    field = field_of(layer_norm=layer_norm)
    features, x, t = drawn(*more)
    velocity, jacobian = field.condition(features).linearize(x, t)
    plain = field.condition(features)
    by_autograd, expected = linearize(lambda x, t: plain(x, t), x, t)  # not the field: no closed form
    torch.testing.assert_close(velocity, by_autograd, rtol=1e-12, atol=1e-12)
    directions = normal(5, 2, seed=4)
    torch.testing.assert_close(jacobian.product(directions), expected.product(directions), rtol=1e-10, atol=1e-12)
    covector = normal(*x.shape, seed=5)
    for index in (slice(None), 1) if more else (slice(None),):
        torch.testing.assert_close(
            jacobian.transposed_product(index, covector[index]),
            expected.transposed_product(index, covector[index]),
            rtol=1e-10,
            atol=1e-12,
        )
    several = normal(2, *x.shape, seed=6)
    torch.testing.assert_close(
        jacobian.transposed_product(slice(None), several),
        expected.transposed_product(slice(None), several),
        rtol=1e-10,
        atol=1e-12,
    )


def test_statistics_are_built_into_prior_and_policy_unless_the_settings_say_otherwise(dataset, make_config):
    known = DataStatistics((0.1, 0.2, 0.1, 0.2), 0.4, -3.0, 2.0)
    for config, preconditioned, normalised in (
        (make_config(), True, True),
        (make_config(precondition=False), False, True),
        (make_config(normalise_values=False), True, False),
        (make_config("qam"), False, False),
    ):
        networks = build_networks(make_spec(config, dataset), config, known)
        fields = networks.prior, networks.policy, networks.target_prior
        for preconditioner in (field.preconditioner for field in fields if field is not None):
            assert (preconditioner is not None) == preconditioned
            if preconditioner is not None:
                torch.testing.assert_close(preconditioner.mean, torch.tensor(known.action_mean))
                assert preconditioner.std.item() == pytest.approx(0.4)
        for critic in (networks.critic, networks.target_critic):
            assert (critic.offset.item(), critic.scale.item()) == ((-3.0, 2.0) if normalised else (0.0, 1.0))
    cloned = build_networks(make_spec(make_config("bc"), dataset), make_config("bc"), known)
    assert cloned.prior.preconditioner is not None


def test_a_preconditioned_field_starts_close_to_the_data_and_a_plain_one_does_not():
    torch.manual_seed(0)
    narrow = DataStatistics((0.6,) * 4, 0.05)
    errors = []
    for statistics in (narrow, None):
        field = VelocityField(4, 4, (64, 64), statistics=statistics).double()
        features, x = normal(200, 4), normal(200, 4, seed=2)
        with torch.no_grad():
            for k in range(10):
                x = x + field(features, x, torch.full((200, 1), k / 10, dtype=torch.float64)) / 10
        errors.append((x - 0.6).square().mean().sqrt().item())
    assert errors[0] < 0.15
    assert errors[1] > 0.5


def test_a_copied_field_that_loads_other_statistics_acts_with_them():
    copied, other = copy.deepcopy(field_of(DataStatistics(action_mean=MEAN, action_std=0.9))), field_of()
    copied.load_state_dict(other.state_dict())
    features, x = normal(7, 4), normal(7, 2, seed=2)
    assert torch.equal(copied.condition(features)(x, 0.3), other.condition(features)(x, 0.3))


@given(t=st.floats(0, 1), preconditioned=st.booleans(), leading=st.booleans())
def test_one_time_of_all_rows_is_the_same_time_at_every_row(t, preconditioned, leading):
    velocity = field_of(KNOWN if preconditioned else None).condition(normal(5, 4))
    x = normal(3, 5, 2) if leading else normal(5, 2)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(velocity(x, t), velocity(x, time_like(x, t)))
    (v, jacobian), (v_of_rows, of_rows) = velocity.linearize(x, t), velocity.linearize(x, time_like(x, t))
    close(v, v_of_rows)
    close(jacobian.product(normal(2, 2)), of_rows.product(normal(2, 2)))
    close(jacobian.transposed_product(slice(None), x), of_rows.transposed_product(slice(None), x))
