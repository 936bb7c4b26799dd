import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meam_policy.spec import Integration
from meam_training.algorithm.head_losses import distill_loss, edit_loss
from meam_training.flow.ode import integrate
from meam_training.networks.critic_ensemble import CriticEnsemble
from meam_training.networks.edit_policy import EditPolicy, apply_edit
from meam_training.networks.one_step_policy import OneStepPolicy

SCALES = st.floats(0.01, 2.0)
SHAPES = st.tuples(*(st.integers(1, n) for n in (5, 4, 3)))  # batch, obs, act


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomized(module, seed=0, scale=0.5):
    """The module in float64, with every parameter normal."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def constant(mean, log_std, dtype=torch.float64):
    """An edit policy with the same Gaussian everywhere."""
    policy = randomized(EditPolicy(1, len(mean), (4,))).to(dtype)
    with torch.no_grad():
        policy.log_alpha.zero_()
        for layer, bias in ((policy.mean, mean), (policy.log_std, log_std)):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(bias, dtype=dtype))
    return policy


def quadratic(peak):
    """A value with its maximum, 0, where every component is at the peak."""
    return lambda actions: -(actions - peak).square().sum(dim=-1)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normal_log_density(x, mean, std):
    return -0.5 * np.square((x - mean) / std) - np.log(std * np.sqrt(2 * np.pi))


def linear(layer, x):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def descend(loss, parameters, steps, learning_rate):
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def test_an_edit_policy_is_a_perceptron_with_a_mean_and_a_clipped_log_std():
    policy = randomized(EditPolicy(4, 2, (6, 5)))
    with torch.no_grad():
        policy.log_std.weight.mul_(-100)
    features, action = normal(50, 4), normal(50, 2, seed=2)
    mean, log_std = (x.detach().numpy() for x in policy(features, action))
    hidden = np.concatenate([features, action], axis=1)
    for layer in policy.layers:
        hidden = gelu(linear(layer, hidden))
    np.testing.assert_allclose(mean, linear(policy.mean, hidden), rtol=1e-10, atol=1e-12)
    unclipped = linear(policy.log_std, hidden)
    np.testing.assert_allclose(log_std, unclipped.clip(-20, 2), rtol=1e-10, atol=1e-12)
    assert unclipped.min() < -20
    assert unclipped.max() > 2
    np.testing.assert_allclose(policy.mode(features, action).detach(), np.tanh(mean), rtol=1e-12)


def test_a_one_step_policy_is_a_perceptron_of_features_and_noise():
    policy = randomized(OneStepPolicy(4, 2, (6, 5)))
    features, x_0 = normal(7, 4), normal(7, 2, seed=2)
    hidden = np.concatenate([features, x_0], axis=1)
    for layer in list(policy.layers)[:2]:
        hidden = gelu(linear(layer, hidden))
    expected = linear(policy.layers[2], hidden)
    np.testing.assert_allclose(policy(features, x_0).detach(), expected, rtol=1e-10, atol=1e-12)


def test_new_heads_have_xavier_weights_no_biases_and_temperature_one():
    torch.manual_seed(0)
    edit, one_step = EditPolicy(100, 28, (256,)), OneStepPolicy(100, 28, (256,))
    named = {**dict(edit.named_parameters("edit")), **dict(one_step.named_parameters("one_step"))}
    shapes = {name: tuple(p.shape) for name, p in named.items() if name.endswith("weight")}
    assert shapes == {
        "edit.layers.0.weight": (256, 128),
        "edit.mean.weight": (28, 256),
        "edit.log_std.weight": (28, 256),
        "one_step.layers.0.weight": (256, 128),
        "one_step.layers.1.weight": (28, 256),
    }
    for name, shape in shapes.items():
        bound = np.sqrt(6 / sum(shape))
        assert 0.99 * bound < named[name].abs().max() <= bound
        assert named[name].std().item() == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not any(p.any() for name, p in named.items() if name.endswith("bias"))
    assert edit.alpha == 1


@settings(max_examples=30)
@given(SHAPES, st.integers(0, 99))
def test_the_log_density_is_the_normal_one_of_the_inverse_tanh_over_its_slope(shape, seed):
    batch, obs, act = shape
    policy = randomized(EditPolicy(obs, act, (4,)), seed)
    features, action, noise = normal(batch, obs), normal(batch, act, seed=2), normal(batch, act, seed=seed)
    edit, log_prob = (x.detach().numpy() for x in policy.sample(features, action, noise))
    assume(np.abs(edit).max() < 1 - 1e-7)  # beyond, the inverse tanh loses its digits
    mean, log_std = (x.detach().numpy() for x in policy(features, action))
    expected = normal_log_density(np.arctanh(edit), mean, np.exp(log_std)) - np.log1p(-(edit**2))
    assert log_prob.shape == (batch,)
    np.testing.assert_allclose(log_prob, expected.sum(axis=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-1000.0, -30.0, -9.0, 0.0, 9.0, 30.0, 1000.0])
def test_the_log_density_and_its_gradient_are_right_where_the_tanh_rounds_to_one(mean, dtype):
    policy = constant([mean, 0.5], [0.1, -1.0], dtype)
    noise = normal(20, 2).to(dtype)
    edit, log_prob = policy.sample(torch.zeros(20, 1, dtype=dtype), torch.zeros(20, 2, dtype=dtype), noise)
    std = np.exp([0.1, -1.0])
    u = np.array([mean, 0.5]) + std * noise.double().numpy()
    # d tanh(u) / du = cosh(u)^-2, with cosh(u) = (e^u + e^-u) / 2
    log_slope = -2 * (np.logaddexp(u, -u) - np.log(2))
    expected = (normal_log_density(u, [mean, 0.5], std) - log_slope).sum(axis=1)
    np.testing.assert_allclose(log_prob.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-9)
    assert edit.abs().max() <= 1
    (gradient,) = torch.autograd.grad(log_prob.sum(), policy.mean.bias)
    np.testing.assert_allclose(gradient, 2 * np.tanh(u).sum(axis=0), rtol=1e-4)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.7, -2.0), (-2.0, 0.5), (1.0, 0.7)])
def test_the_density_of_a_single_edit_integrates_to_one(mean, log_std):
    noise = torch.linspace(-9, 9, 20001, dtype=torch.float64)[:, None]
    edit, log_prob = constant([mean], [log_std]).sample(torch.zeros_like(noise), torch.zeros_like(noise), noise)
    y, density = edit[:, 0].detach().numpy(), log_prob.exp().detach().numpy()
    assert (np.diff(y) >= 0).all()
    assert np.sum(np.diff(y) * (density[1:] + density[:-1]) / 2) == pytest.approx(1, abs=1e-5)


@settings(max_examples=30)
@given(SHAPES, SCALES, st.integers(0, 99))
def test_edited_actions_stay_in_the_box_and_within_the_scale_of_the_flows(shape, scale, seed):
    batch, obs, act = shape
    policy = randomized(EditPolicy(obs, act, (4,)), seed, scale=3.0)
    flow = normal(batch, act, seed=seed).clamp(-1, 1)
    edit, _ = policy.sample(normal(batch, obs), flow, normal(batch, act, seed=2))
    for edited in (apply_edit(flow, edit, scale), apply_edit(flow, policy.mode(normal(batch, obs), flow), scale)):
        assert edited.abs().max() <= 1
        assert (edited - flow).abs().max() <= scale * (1 + 1e-12)


@settings(max_examples=30)
@given(SHAPES, SCALES, st.floats(-3, 1))
def test_the_edit_loss_is_that_of_its_formula(shape, scale, target):
    batch, obs, act = shape
    policy = randomized(EditPolicy(obs, act, (4,)))
    inputs = normal(batch, obs), normal(batch, act, seed=2).clamp(-1, 1), normal(batch, act, seed=3)
    loss, metrics = edit_loss(policy, quadratic(0.3), *inputs, scale, target)
    edit, log_prob = (x.detach().numpy() for x in policy.sample(*inputs))
    q = -np.square(np.clip(inputs[1].numpy() + scale * edit, -1, 1) - 0.3).sum(axis=1)
    alpha = np.exp(policy.log_alpha.item())
    entropy = -log_prob.mean()
    expected = -q.mean() + (alpha * log_prob).mean() + alpha * (entropy - target)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    logged = {name: metric.item() for name, metric in metrics.items()}
    assert logged == pytest.approx({"edit_value": q.mean(), "edit_entropy": entropy, "edit_alpha": alpha})


@settings(max_examples=30)
@given(SHAPES, SCALES)
def test_the_distillation_loss_is_that_of_its_formula(shape, coef):
    batch, obs, act = shape
    policy = randomized(OneStepPolicy(obs, act, (4,)))
    inputs = normal(batch, obs), normal(batch, act, seed=2), normal(batch, act, seed=3)
    mu = policy(*inputs[:2]).detach().numpy()
    error = np.mean((mu - inputs[2].numpy()) ** 2)
    q = -np.square(mu.clip(-1, 1) - 0.3).sum(axis=1).mean()
    loss, metrics = distill_loss(policy, quadratic(0.3), *inputs, coef)
    assert loss.item() == pytest.approx(coef * error - q, rel=1e-9)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({"distill_loss": error, "one_step_value": q})
    loss, metrics = distill_loss(policy, None, *inputs, coef)
    assert loss.item() == pytest.approx(coef * error, rel=1e-9)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx({"distill_loss": error})


def test_the_gradient_of_the_edit_loss_is_that_at_constant_temperature_and_constant_entropy():
    policy = randomized(EditPolicy(3, 2, (4,)))
    inputs = normal(6, 3), normal(6, 2, seed=2).clamp(-1, 1), normal(6, 2, seed=3)
    _, at_start = edit_loss(policy, quadratic(0.3), *inputs, 0.4, -1.0)

    def loss(*_):  # gradcheck moves the parameters themselves
        total, metrics = edit_loss(policy, quadratic(0.3), *inputs, 0.4, -1.0)
        # Differences see alpha in -alpha H and H in alpha H change; the gradient must not. This undoes their change.
        seen = metrics["edit_alpha"] * at_start["edit_entropy"] - at_start["edit_alpha"] * metrics["edit_entropy"]
        return total + seen

    assert torch.autograd.gradcheck(loss, tuple(policy.parameters()))


@pytest.mark.parametrize("value", [quadratic(0.3), None], ids=["with a value", "alone"])
def test_the_gradient_of_the_distillation_loss_is_right(value):
    policy = randomized(OneStepPolicy(3, 2, (4,)))
    inputs = normal(6, 3), normal(6, 2, seed=2), normal(6, 2, seed=3)
    assert (policy(*inputs[:2]).abs() > 1).any()
    parameters = tuple(policy.parameters())
    assert torch.autograd.gradcheck(lambda *_: distill_loss(policy, value, *inputs, 2.5)[0], parameters)


def test_the_losses_train_neither_a_frozen_critic_nor_the_flow():
    edit_policy, one_step = randomized(EditPolicy(3, 2, (4,))), randomized(OneStepPolicy(3, 2, (4,)))
    critic = randomized(CriticEnsemble(3, 2, (5, 4), num_critics=3))
    features, flow = normal(6, 3), normal(6, 2, seed=2).mul(0.3).requires_grad_()
    frozen = {name: parameter.detach() for name, parameter in critic.named_parameters()}

    def value(actions):
        return torch.func.functional_call(critic, frozen, (features, actions)).mean(dim=0)

    def thawed(actions):
        return critic(features, actions).mean(dim=0)

    def gradients(value):
        edit, _ = edit_loss(edit_policy, value, features, flow, normal(6, 2, seed=3), 0.4, -1.0)
        distilled, _ = distill_loss(one_step, value, features, normal(6, 2, seed=4), flow, 2.0)
        heads = [*edit_policy.parameters(), *one_step.parameters()]
        others = [flow, *critic.parameters()]
        got = torch.autograd.grad(edit + distilled, heads + others, allow_unused=True)
        return got[: len(heads)], got[len(heads) :]

    ours, theirs = gradients(value)
    assert all(gradient is None for gradient in theirs)
    torch.testing.assert_close(ours, gradients(thawed)[0])
    assert all(gradient.any() for gradient in ours)


@pytest.mark.parametrize(("target", "sign"), [(-5.0, -1), (1.0, 1)])
def test_the_temperature_falls_while_the_entropy_exceeds_its_target_and_rises_below(target, sign):
    policy = constant([0.0], [-0.5])
    before, parameters = policy.alpha.item(), [policy.log_alpha]
    inputs = torch.zeros(64, 1).double(), torch.zeros(64, 1).double(), normal(64, 1)
    entropy = edit_loss(policy, quadratic(0.0), *inputs, 0.4, target)[1]["edit_entropy"].item()
    assert np.sign(target - entropy) == sign
    descend(lambda _: edit_loss(policy, quadratic(0.0), *inputs, 0.4, target)[0], parameters, 1, 1e-2)
    assert policy.alpha.item() == pytest.approx(before * math.exp(sign * 1e-2))


def test_training_brings_the_entropy_to_its_target_and_the_actions_up_the_value():
    policy = constant([0.0, 0.0], [0.0, 0.0])
    features, flow = torch.zeros(1000, 1).double(), torch.tensor([0.5, -0.5]).double().expand(1000, 2)
    inputs = features, flow, normal(1000, 2)
    parameters = [policy.mean.bias, policy.log_std.bias, policy.log_alpha]
    descend(lambda _: edit_loss(policy, quadratic(0.0), *inputs, 0.4, -1.0)[0], parameters, 300, 1e-1)
    assert -policy.sample(*inputs)[1].mean().item() == pytest.approx(-1, abs=0.05)
    edited = apply_edit(flow, policy.mode(features, flow), 0.4)[0].detach()
    # The last 0.1 to the peak is out of reach.
    assert 0.1 < edited[0] < 0.3
    assert -0.3 < edited[1] < -0.1


@pytest.mark.slow
def test_a_linear_flow_is_distilled_into_one_evaluation():
    torch.manual_seed(0)
    policy = OneStepPolicy(2, 2, (32,))
    pull, shift = torch.tensor([[-1.0, 0.4], [-0.4, -1.0]]), torch.tensor([[0.5, 0.0], [0.2, -0.3]])

    def teacher(features, x_0):
        return integrate(lambda x, _: x @ pull.T + features @ shift.T, x_0, Integration(10))

    data = torch.randn(2, 300, 64, 2)
    held_out, held_out_x_0 = torch.randn(2, 500, 2)

    def loss(step):
        features, x_0 = data[0, step], data[1, step]
        return distill_loss(policy, None, features, x_0, teacher(features, x_0), 1.0)[0]

    descend(loss, policy.parameters(), 300, 1e-2)
    target = teacher(held_out, held_out_x_0)
    error = (policy(held_out, held_out_x_0) - target).square().mean() / target.var(dim=0).mean()
    assert error < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("coef", [0.5, 2.0, 8.0])
def test_the_value_moves_a_distilled_action_from_the_flows_towards_the_peak(coef):
    policy = randomized(OneStepPolicy(1, 1, ()))
    features, x_0, flow = torch.zeros(16, 1).double(), normal(16, 1), torch.full((16, 1), -0.5).double()
    descend(
        lambda _: distill_loss(policy, quadratic(0.6), features, x_0, flow, coef)[0], policy.parameters(), 400, 2e-2
    )
    # coef (mu + 0.5)^2 + (mu - 0.6)^2 is least at the weighted mean.
    expected = (coef * -0.5 + 0.6) / (coef + 1)
    np.testing.assert_allclose(policy(features, x_0).detach(), expected, atol=1e-3)


def test_the_value_does_not_push_an_action_further_out_of_the_box():
    policy = randomized(OneStepPolicy(1, 1, (4,)))
    with torch.no_grad():
        list(policy.parameters())[-1].add_(20.0)
    inputs = normal(6, 1), normal(6, 1, seed=2), normal(6, 1, seed=3)
    assert (policy(*inputs[:2]) > 1).all()
    gradients = [
        torch.autograd.grad(distill_loss(policy, value, *inputs, 1.0)[0], tuple(policy.parameters()))
        for value in (quadratic(50.0), None)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
