"""The dual variables of a KL budget: the temperature they give, and how they find it."""

import math

import pytest
import torch

from meam_training.config import Dual
from meam_training.networks.trust_region import (
    LARGEST_CORRECTION,
    TRUST_REGION_METRICS,
    TrustRegion,
    log_dual_step,
    mean_cost,
    mean_kl,
    reference_dual_step,
)

YES, NO = torch.tensor(True), torch.tensor(False)


def number(value):
    return torch.tensor(float(value), dtype=torch.float64)


def region(budget=0.5, dual: Dual = "log", entropy_coef=0.0, **state):
    made = TrustRegion(budget, dual, entropy_coef).double()
    for name, value in state.items():
        getattr(made, name).fill_(value)
    return made


def test_before_anything_is_known_of_the_values_the_policy_is_the_prior():
    tilt = region(entropy_coef=0.2).tilt()
    assert tilt.inverse_temperature == 0
    assert float(tilt.entropy_coef) == pytest.approx(0.2)


@pytest.mark.parametrize("budget", [0.05, 2.0])
@pytest.mark.parametrize("nu", [0.3, 1.0, 7.0])
def test_without_entropy_the_temperature_is_that_whose_leading_order_spends_the_budget_at_nu_1(budget, nu):
    cost = 40.0
    tilt = region(budget, nu=nu, unit_cost=cost).tilt()
    assert tilt.entropy_coef == 0
    assert cost * float(tilt.inverse_temperature) ** 2 == pytest.approx(budget / nu**2)


@pytest.mark.parametrize("entropy_coef", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dual", ["log", "reference"])
def test_temperature_and_entropy_maximise_the_value_less_mu_kl_plus_alpha_entropy(entropy_coef, dual):
    """On a grid of densities: the stationary point of E[Q] + alpha H - mu KL."""
    made = region(dual=dual, entropy_coef=entropy_coef, nu=1.3, unit_cost=7.0)
    tilt, mu = made.tilt(), made.mu
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    log_prior, q = torch.log_softmax(-((x - 0.2) ** 2), 0), 3 * x.sin()
    log_policy = torch.log_softmax((1 - tilt.entropy_coef) * log_prior + tilt.inverse_temperature * q, 0)
    alpha = mu * tilt.entropy_coef / (1 - tilt.entropy_coef)
    gradient = q - alpha * log_policy - mu * (log_policy - log_prior)
    torch.testing.assert_close(gradient, gradient.mean().expand_as(gradient))
    at_one = region(dual=dual, entropy_coef=entropy_coef, unit_cost=7.0).tilt()
    assert float(at_one.entropy_coef) == pytest.approx(entropy_coef)
    # alpha is a constant in units of value: where mu falls, it stays.
    other = region(dual=dual, entropy_coef=entropy_coef, nu=1.1, unit_cost=7.0)
    coef = other.tilt().entropy_coef
    torch.testing.assert_close(other.mu * coef / (1 - coef), alpha)


@pytest.mark.parametrize("entropy_coef", [0.1, 0.5, 0.8])
def test_the_entropy_coefficient_does_not_rise_however_large_the_budget(entropy_coef):
    made = region(entropy_coef=entropy_coef, unit_cost=1.0, nu=1e-3)
    assert float(made.tilt().entropy_coef) == pytest.approx(entropy_coef)
    made.nu.fill_(1e3)
    assert made.tilt().entropy_coef < entropy_coef


def test_a_change_of_the_values_scale_changes_the_temperature_inversely_and_nothing_else():
    plain, large = region(entropy_coef=0.2), region(entropy_coef=0.2)
    for kl, cost in ((0.1, 3.0), (0.9, 2.0), (0.4, 5.0), (2.0, 4.0)):
        first = plain.step(number(kl), number(cost), YES)
        second = large.step(number(kl), number(100**2 * cost), YES)
        for name in ("entropy_coef", "kl_average", "kl_target"):
            torch.testing.assert_close(first[name], second[name])
        torch.testing.assert_close(first["inverse_temperature"], 100 * second["inverse_temperature"])
    assert plain.nu == large.nu != 1
    assert plain.tilt().inverse_temperature > 0


def test_the_first_step_takes_the_cost_as_it_is_and_later_ones_average_it():
    made = region()
    made.step(number(0), number(3), YES)
    assert made.unit_cost == 3
    made.step(number(0), number(5), YES)
    assert made.unit_cost.item() == pytest.approx(3.02)


def test_the_mean_of_the_cost_rises_arithmetically_and_falls_geometrically():
    assert mean_cost(number(2), number(2)).item() == pytest.approx(2)
    assert mean_cost(number(2), number(22)).item() == pytest.approx(2.2)
    assert mean_cost(number(2), number(1e6)).item() == pytest.approx(1e6 / 16)  # tau is then too large by 4
    assert mean_cost(number(2), number(0.02)).item() == pytest.approx(2 * 10**-0.02)
    cost = number(1e4)
    for _ in range(500):  # an arithmetic mean would still be at 66
        cost = mean_cost(cost, number(1))
    assert 1 < cost < 1.1
    for value in (0.0, 1e-38, 1e30, 0.0):
        cost = mean_cost(cost.float(), torch.tensor(value))
        assert cost.isfinite()
        assert cost > 0


@pytest.mark.parametrize("dual", ["log", "reference"])
@pytest.mark.parametrize(
    ("kl", "cost", "moves"), [(1.0, 1.0, NO), (math.nan, 1.0, YES), (1.0, math.inf, YES), (math.inf, math.nan, NO)]
)
def test_nothing_moves_with_a_gradient_or_an_estimate_that_is_not_finite(dual, kl, cost, moves):
    made = region(dual=dual, nu=2.0, unit_cost=3.0, kl_average=0.7)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    made.step(number(kl), number(cost), moves)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_step_logs_what_the_update_used():
    made = region(entropy_coef=0.1, nu=0.8, unit_cost=2.0)
    tilt = made.tilt()
    metrics = made.step(number(0.3), number(4.0), YES)
    assert tuple(metrics) == TRUST_REGION_METRICS
    assert metrics["inverse_temperature"] == tilt.inverse_temperature
    assert metrics["entropy_coef"] == tilt.entropy_coef
    assert metrics["kl_average"].item() == pytest.approx(0.9 * 0.5 + 0.1 * 0.3)
    assert metrics["kl_target"].item() == pytest.approx(4 * float(tilt.inverse_temperature) ** 2)
    logged = metrics["kl_average"].clone()
    made.step(number(1.0), number(4.0), YES)
    assert metrics["kl_average"] == logged  # a number of that step, not the buffer itself


def test_the_running_mean_counts_estimates_from_zero_to_twice_the_budget():
    average = mean_kl(number(0.5).expand(4), torch.tensor([-3.0, 0.2, 1.0, 50.0], dtype=torch.float64), 0.5)
    expected = 0.45 + 0.1 * torch.tensor([0, 0.2, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(average, expected)


def test_the_multiplier_rises_above_the_budget_falls_below_it_and_stays_in_bounds():
    nu, average = number(1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for step in (log_dual_step, reference_dual_step):
        below, at, above = step(nu.expand(3), average, 0.5)
        assert below < at == 1 < above
    for bound in (1 / LARGEST_CORRECTION, LARGEST_CORRECTION):
        assert log_dual_step(number(bound), number(0.1 if bound < 1 else 1), 0.5) == bound
    assert reference_dual_step(number(0.01), number(0), 5.0) == 0.01


@pytest.mark.parametrize("costs", [(0.0, 0.0, 1.0), (1e-38, 1e15), (1e30, 1e-38, 1e-38)])
def test_no_cost_makes_a_temperature_that_is_not_finite(costs):
    made = TrustRegion(0.5, "log", 0.0)
    for cost in costs:
        metrics = made.step(torch.tensor(0.0), torch.tensor(cost), YES)
        assert all(math.isfinite(value) for value in (*metrics.values(), made.tilt().inverse_temperature))


def test_a_restart_forgets_the_divergence_and_keeps_the_temperature():
    made = region(nu=0.7, unit_cost=3.0, kl_average=0.1)
    tilt = made.tilt()
    made.restart()
    assert made.kl_average == 0.5
    assert made.tilt() == tilt


NOISE = (1e-9, 0.1, 1.0)


def looped(flat, entropy, after=4000, lag=500.0):
    """A model of the loop, whose critics are noise for `flat` updates, in which the policy cannot follow them.

    Afterwards its tilt follows tau with a lag, and the leading order is right: its divergence is tilt^2. One run for
    each size of the noise's gradient, as a share of that of the values.

    Returns:
        The divergence after each later update [after, runs], in budgets, and nu when these begin.
    """
    tilt, average, nu = torch.zeros(3).double(), torch.ones(3).double(), torch.ones(3).double()
    cost, found, begun = torch.tensor(NOISE).double().square(), [], nu
    for update in range(flat + after):
        scale = torch.ones(3).double() if update >= flat else torch.tensor(NOISE).double()
        cost = mean_cost(cost, scale.square())
        tau = 1 / ((nu + entropy) * cost.sqrt())
        tilt = tilt + (tau * (update >= flat) - tilt) / lag
        begun = nu if update == flat else begun
        average = mean_kl(average, tilt.square(), 1.0)
        nu = log_dual_step(nu, average, 1.0, entropy)
        found.append(tilt.square())
    return torch.stack(found[flat:]), begun


def test_a_temperature_is_not_wound_up_while_the_policy_has_nothing_to_follow():
    """Critics that tell nothing at first: after 5000 such updates, 63 budgets would be used, and too many for 3900."""
    kl, begun = looped(1500, entropy=1 / 9, after=2500)
    assert (1 / (begun + 1 / 9) ** 2 < 4.1).all()
    assert 1.5 < kl.max() < 3
    assert ((kl > 1.5).sum(0) < 800).all()
    torch.testing.assert_close(kl[-1], torch.ones(3).double(), rtol=0.2, atol=0)


def test_a_policy_that_follows_is_asked_for_as_much_as_it_takes():
    """At the faces of its box, or late: nu falls as far as ever while a tenth of the budget is used."""
    nu = number(1)
    for _ in range(2000):
        nu = log_dual_step(nu, number(0.11), 1.0)
    assert nu.log().item() == pytest.approx(-2e-3 * 0.89 * 2000)
    assert log_dual_step(nu, number(0.09), 1.0) == nu
    assert log_dual_step(nu, number(1.1), 1.0) > nu


@pytest.mark.parametrize("state", ["from the start", "after a while"])
def test_values_that_are_constant_leave_the_policy_at_the_prior_or_its_temperature_finite(state):
    made = region(1.0)
    if state == "after a while":
        made.step(number(0), number(1.0), YES)
    for _ in range(100):
        made.step(number(0), number(0), YES)
    tau = made.tilt().inverse_temperature
    assert tau == 0 if state == "from the start" else 0 < tau < math.inf
    made.step(number(0), number(9.0), YES)
    assert made.unit_cost >= 9 / 16


LAGS, CORRECTIONS = (50.0, 500.0), (0.1, 1.0, 10.0)


@pytest.mark.parametrize("budget", [0.05, 1.0])
def test_where_the_policy_follows_with_a_lag_the_log_step_ends_at_the_budget(budget):
    """A model of the loop: the policy's tilt follows tau with a lag, and its divergence is a multiple of tilt^2."""
    lag, correction = (v.double() for v in torch.cartesian_prod(torch.tensor(LAGS), torch.tensor(CORRECTIONS)).T)
    nu, average, tilt = torch.ones(6).double(), torch.full((6,), budget).double(), torch.zeros(6).double()
    kl = tilt
    for _ in range(5000):
        tilt = tilt + (budget**0.5 / nu - tilt) / lag
        kl = correction * tilt.square()
        average = mean_kl(average, kl, budget)
        nu = log_dual_step(nu, average, budget)
    torch.testing.assert_close(kl, torch.full((6,), budget).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(nu, correction.sqrt(), rtol=0.05, atol=0)
