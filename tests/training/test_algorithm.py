import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_training.algorithm import (
    METRICS,
    ChunkBatch,
    MeamNetworks,
    _terminal_adjoint,
    compute_losses,
    draw_noise,
    pretraining_losses,
    update_targets,
)
from meam_training.checkpoint import build_networks
from meam_training.flow import score_from_velocity, time_like
from meam_training.trainer import make_spec

CPU = torch.device("cpu")
BATCH = 16


@pytest.fixture(scope="module")
def make_networks(dataset):
    """Networks of a config in float64, every parameter away from its initial value, so that targets differ too."""

    def make(config, seed=0) -> MeamNetworks:
        networks = build_networks(make_spec(config, dataset), config).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in networks.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return networks

    return make


def random_batch(seed=0, observed=3, act=4) -> ChunkBatch:
    generator = np.random.default_rng(seed)

    def put(values):
        return torch.tensor(np.asarray(values, np.float64))

    return ChunkBatch(
        observations=put(generator.normal(size=(BATCH, observed))),
        actions=put(generator.uniform(-1, 1, size=(BATCH, act))),
        rewards=put(generator.normal(size=BATCH)),
        next_observations=put(generator.normal(size=(BATCH, observed))),
        masks=put(generator.random(BATCH) < 0.7),
        valid=put(generator.random(BATCH) < 0.7),
    )


def noise_for(config, seed=0, act=4):
    drawn = draw_noise(BATCH, act, config, torch.Generator().manual_seed(seed), CPU)
    return type(drawn)(*(tensor.double() for tensor in drawn))


def gradients(networks, loss):
    networks.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()}


@given(
    batch=st.integers(1, 20),
    act=st.integers(1, 6),
    flow_steps=st.integers(1, 5),
    candidates=st.integers(1, 4),
    weight=st.floats(0, 0.99),
)
def test_the_noise_has_a_row_for_everything_that_is_random(make_config, batch, act, flow_steps, candidates, weight):
    config = make_config(flow_steps=flow_steps, ascent_candidates=candidates, mixture_weight=weight)
    noise = draw_noise(batch, act, config, torch.Generator(), CPU)
    mixed = max(1, round(weight * batch)) if weight else 0  # a mixture is never silently empty
    assert {name: tuple(tensor.shape) for name, tensor in noise._asdict().items()} == {
        "next_x_0": (batch, act),
        "flow_x_0": (batch, act),
        "flow_t": (batch, 1),
        "sde_x_0": (batch, act),
        "sde": (flow_steps - 1, batch, act),
        "candidates": (candidates - 1, mixed, act),
        "bandwidth": (mixed, act),
    }


def test_the_noise_is_standard_normal_and_its_times_uniform(make_config):
    noise = draw_noise(20_000, 2, make_config(), torch.Generator().manual_seed(0), CPU)
    for tensor in (noise.next_x_0, noise.flow_x_0, noise.sde_x_0, noise.sde, noise.bandwidth, noise.candidates):
        assert tensor.mean().item() == pytest.approx(0, abs=0.05)
        assert tensor.std().item() == pytest.approx(1, abs=0.05)
    assert 0 <= noise.flow_t.min() < 0.01
    assert 0.99 < noise.flow_t.max() <= 1
    assert noise.flow_t.mean().item() == pytest.approx(0.5, abs=0.02)


def test_without_entropy_and_mixture_me_am_is_qam_bit_for_bit(make_config, make_networks):
    results = []
    for config in (make_config("qam"), make_config("me-am", entropy_coef=0.0, mixture_weight=0.0)):
        networks = make_networks(config)
        losses = compute_losses(networks, random_batch(), noise_for(config), config)
        losses.total.backward()
        grads = {name: p.grad for name, p in networks.named_parameters() if p.requires_grad}
        results.append((losses.total, losses.metrics, grads))
    (total, metrics, grads), (other_total, other_metrics, other_grads) = results
    assert torch.equal(total, other_total)
    assert metrics.keys() == other_metrics.keys()
    assert grads.keys() == other_grads.keys()
    assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


def test_entropy_changes_only_the_policys_loss_and_mixture_only_the_priors(make_config, make_networks):
    base = make_config("me-am", entropy_coef=0.0, mixture_weight=0.0)
    networks, noise = make_networks(base), noise_for(make_config("me-am", mixture_weight=0.5))
    without = noise._replace(candidates=noise.candidates[:, :0], bandwidth=noise.bandwidth[:0])

    def losses(noise, **changes):
        metrics = compute_losses(networks, random_batch(), noise, dataclasses.replace(base, **changes)).metrics
        return {name: metrics[f"{name}_loss"].item() for name in ("critic", "prior", "policy")}

    plain, entropy = losses(without), losses(without, entropy_coef=0.5)
    mixture = losses(noise, mixture_weight=0.5)
    assert {name for name in plain if plain[name] != entropy[name]} == {"policy"}
    assert {name for name in plain if plain[name] != mixture[name]} == {"prior"}


def test_every_loss_trains_its_own_network_and_nothing_else(make_config, make_networks):
    config = make_config(mixture_weight=0.5)
    networks = make_networks(config)
    metrics = compute_losses(networks, random_batch(), noise_for(config), config).metrics
    for loss, prefix in (("critic_loss", "critic."), ("prior_loss", "prior."), ("policy_loss", "policy.")):
        own = {name for name, _ in networks.named_parameters() if name.startswith(prefix)}
        assert gradients(networks, metrics[loss]) == own


def test_the_total_is_the_sum_of_the_losses_and_metrics_are_named(make_config, make_networks):
    config = make_config(mixture_weight=0.5)
    losses = compute_losses(make_networks(config), random_batch(), noise_for(config), config)
    m = losses.metrics
    assert losses.total.item() == pytest.approx((m["critic_loss"] + m["prior_loss"] + m["policy_loss"]).item())
    assert set(m) == set(METRICS)


def test_bc_has_and_trains_only_the_prior(make_config, make_networks):
    config = make_config("bc")
    networks = make_networks(config)
    noise = noise_for(config)
    losses = compute_losses(networks, random_batch(), noise, config)
    assert {name.split(".")[0] for name, _ in networks.named_parameters()} == {"prior"}
    assert networks.deployed is networks.prior
    assert torch.equal(losses.total, pretraining_losses(networks, random_batch(), noise).total)
    assert list(losses.metrics) == ["prior_loss"]
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    update_targets(networks, 0.5)
    networks.start_policy_from_prior()
    assert all(torch.equal(before[name], value) for name, value in networks.state_dict().items())


@pytest.mark.parametrize("method", ["qam", "me-am"])
def test_the_deployed_field_is_the_policy(make_config, make_networks, method):
    networks = make_networks(make_config(method))
    assert networks.deployed is networks.policy


def test_targets_start_equal_and_then_follow_at_the_polyak_rate(make_config, dataset):
    config = make_config()
    networks = build_networks(make_spec(config, dataset), config)
    pairs = [(networks.prior, networks.target_prior), (networks.critic, networks.target_critic)]
    for online, target in pairs:
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, q)
            assert not q.requires_grad
            p.data += 1
    update_targets(networks, 0.25)
    for online, target in pairs:
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            torch.testing.assert_close(q.data, p.data - 0.75)


def test_after_pretraining_the_policy_and_the_averaged_prior_are_the_prior(make_config, make_networks):
    networks = make_networks(make_config())
    critic = {name: value.clone() for name, value in networks.critic.state_dict().items()}
    networks.start_policy_from_prior()
    assert networks.policy is not None
    for name, value in networks.prior.state_dict().items():
        assert torch.equal(networks.policy.state_dict()[name], value)
        assert torch.equal(networks.target_prior.state_dict()[name], value)
    assert all(torch.equal(critic[name], value) for name, value in networks.critic.state_dict().items())


@settings(max_examples=25)
@given(weight=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_the_mixture_replaces_exactly_its_share_of_rows(make_config, make_networks, weight, seed):
    # Without a search, the Q-maximised chunk is the data's, blurred by the bandwidth.
    config = make_config(mixture_weight=weight, ascent_candidates=1, ascent_steps=0, mixture_bandwidth=0.3)
    networks, batch, noise = make_networks(config), random_batch(seed), noise_for(config, seed)
    loss = compute_losses(networks, batch, noise, config).metrics["prior_loss"].item()
    mixed = len(noise.bandwidth)
    assert mixed == (max(1, round(weight * BATCH)) if weight else 0)
    x_1, row_weights = batch.actions.clone(), batch.valid
    x_1[:mixed] = (x_1[:mixed] + 0.3 * noise.bandwidth).clamp(-1, 1)
    x_t = (1 - noise.flow_t) * noise.flow_x_0 + noise.flow_t * x_1
    with torch.no_grad():
        predicted = networks.prior(networks.encoder(batch.observations), x_t, noise.flow_t)
    expected = ((predicted - x_1 + noise.flow_x_0).square().mean(dim=1) * row_weights).sum() / BATCH
    assert loss == pytest.approx(expected.item(), rel=1e-9)


def test_the_search_makes_the_mixture_better_than_the_data(make_config, make_networks):
    config = make_config(mixture_weight=0.5, mixture_bandwidth=1e-9)
    networks = make_networks(config)
    metrics = compute_losses(networks, random_batch(), noise_for(config), config).metrics
    assert metrics["mixture_gain"] > 0.01
    assert metrics["mixture_distance"] > 0.01


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1000),
    spread=st.floats(0.1, 5),
    entropy_coef=st.floats(0.01, 0.99),
    score_limit=st.floats(0.1, 100),
    score_eps=st.floats(0.01, 0.5),
)
def test_the_entropy_term_is_bounded_and_never_pushes_out_of_the_box(
    make_config, make_networks, seed, spread, entropy_coef, score_limit, score_eps
):
    config = make_config(entropy_coef=entropy_coef, score_limit=score_limit, score_eps=score_eps)
    networks = make_networks(config, seed=3)
    features = networks.encoder(random_batch(seed).observations)
    x_1 = spread * torch.randn(BATCH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x_1[0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    of_q = _terminal_adjoint(networks, features, x_1, dataclasses.replace(config, entropy_coef=0.0))
    of_entropy = _terminal_adjoint(networks, features, x_1, config) - of_q
    slack = 1e-9 * (1 + of_q.abs().max().item())
    assert of_entropy.abs().max() <= entropy_coef * score_limit + slack
    # The policy moves against the adjoint.
    outward = -of_entropy * x_1.sign()
    assert (outward[x_1.abs() >= 1] <= slack).all()
    # Inside, nothing is confined but the score's size.
    with torch.no_grad():
        clipped = x_1.clamp(-1, 1)
        t = 1 - score_eps
        score = score_from_velocity(clipped, networks.target_prior(features, clipped, time_like(clipped, t)), t)
    expected = entropy_coef * score.clamp(-score_limit, score_limit)
    inside = x_1.abs() < 1
    torch.testing.assert_close(of_entropy[inside], expected[inside], rtol=1e-7, atol=1e-7)


def test_the_value_term_is_the_scaled_gradient_of_the_mean_critic_and_vanishes_outside_the_box(
    make_config, make_networks
):
    config = make_config("qam", inverse_temperature=2.5)
    networks = make_networks(config)
    features = networks.encoder(random_batch().observations)
    x_1 = 1.5 * random_batch(seed=4).actions
    adjoint = _terminal_adjoint(networks, features, x_1, config)
    step = 1e-6
    for i in range(x_1.shape[1]):
        ends = []
        for sign in (1, -1):
            moved = x_1.clone()
            moved[:, i] += sign * step
            with torch.no_grad():
                ends.append(networks.target_critic(features, moved.clamp(-1, 1)).mean(dim=0))
        expected = -2.5 * (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(adjoint[:, i], expected, rtol=1e-5, atol=1e-7)
    outside = x_1.abs() > 1
    assert outside.any()
    assert not adjoint[outside].any()


@pytest.mark.parametrize(("loss", "network"), [("critic_loss", "critic"), ("prior_loss", "prior")])
def test_the_gradients_of_the_critic_and_prior_losses_are_right(make_config, make_networks, loss, network):
    config = make_config(
        mixture_weight=0.5, hidden_dims=(3,), critic_hidden_dims=(3,), num_critics=1, flow_steps=2, ascent_steps=1
    )
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    parameters = tuple(getattr(networks, network).parameters())
    # gradcheck moves the parameters themselves.
    assert torch.autograd.gradcheck(lambda *_: compute_losses(networks, batch, noise, config).metrics[loss], parameters)


def test_invalid_chunks_train_neither_critic_nor_prior(make_config, make_networks):
    config = make_config("qam")
    networks, noise = make_networks(config), noise_for(config)
    batch = random_batch()
    changed = torch.where(batch.valid[:, None] == 0, torch.zeros_like(batch.actions), batch.actions)
    first, second = (
        compute_losses(networks, b, noise, config).metrics for b in (batch, batch._replace(actions=changed))
    )
    assert not torch.equal(batch.actions, changed)
    assert torch.equal(first["critic_loss"], second["critic_loss"])
    assert torch.equal(first["prior_loss"], second["prior_loss"])
    assert first["critic_loss"] > 0


def test_after_a_termination_nothing_more_is_earned(make_config, make_networks):
    config = make_config("qam")
    networks, noise, batch = make_networks(config), noise_for(config), random_batch()
    ended = batch._replace(masks=torch.zeros(BATCH, dtype=torch.float64))
    loss = compute_losses(networks, ended, noise, config).metrics["critic_loss"]
    values = networks.critic(networks.encoder(batch.observations), batch.actions)
    expected = ((values - batch.rewards) ** 2 * batch.valid).mean()
    torch.testing.assert_close(loss, expected)
