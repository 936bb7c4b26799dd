import dataclasses
from typing import Annotated, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy.spec import Integration
from meam_training.algorithm import batch as batch_module
from meam_training.algorithm import prior_loss
from meam_training.algorithm.adjoint_objective import ADJOINT_METRICS, terminal_adjoint
from meam_training.algorithm.batch import (
    ROW_AXES,
    ChunkBatch,
    MeamNoise,
    RowAxis,
    draw_noise,
    orthonormal,
    row_axes,
)
from meam_training.algorithm.bridge_objective import BRIDGE_METRICS
from meam_training.algorithm.critic_loss import CRITIC_METRICS
from meam_training.algorithm.head_losses import HEAD_METRICS, distill_loss, edit_loss, head_losses
from meam_training.algorithm.policy_samples import draw_policy_samples
from meam_training.algorithm.prior_loss import MIXTURE_METRICS
from meam_training.algorithm.reweighted_objective import REWEIGHTED_METRICS
from meam_training.algorithm.target_score_objective import TARGET_SCORE_METRICS
from meam_training.algorithm.two_scale_objective import TWO_SCALE_METRICS
from meam_training.algorithm.update import METRICS, compute_losses, pretraining_losses, update_targets
from meam_training.config import TrainConfig
from meam_training.flow.ode import integrate
from meam_training.flow.path import score_from_velocity, time_like
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.meam_networks import MeamNetworks, build_networks
from meam_training.trainer import make_spec

CPU = torch.device("cpu")
BATCH = 16


@pytest.fixture(scope="module")
def make_config(make_config):
    """Settings of a run that takes a fraction of a second, with a constant temperature but for trqam."""

    def make(method="me-am", **overrides):
        return make_config(method, {"kl_budget": None} if method == "me-am" else {}, **overrides)

    return make


@pytest.fixture(scope="module")
def make_networks(dataset):
    """Networks of a config in float64, all parameters changed, so that target networks differ too."""

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
        returns=put(generator.normal(size=BATCH)),
        known=put(generator.random(BATCH)),
        within=put(generator.random((BATCH, act)) < 0.7),
    )


def noise_for(config, seed=0, act=4):
    drawn = draw_noise(BATCH, act, config, torch.Generator().manual_seed(seed), CPU)
    return type(drawn)(*(tensor.double() for tensor in drawn))


def gradients(networks, loss):
    networks.zero_grad()
    loss.backward(retain_graph=True)
    return {name for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()}


OBJECTIVES = ["two_scale", "reweighted", "target_score", "adjoint", "bridge"]
PUBLISHED = {"sde": "reference", "solver": "euler", "confine": False, "joint_clip": True}
PUBLISHED |= {"precondition": False, "normalise_values": False}


@given(
    batch=st.integers(1, 20),
    act=st.integers(1, 6),
    half=st.integers(1, 4),
    settings=st.fixed_dictionaries(
        {
            "objective": st.sampled_from(OBJECTIVES),
            "ascent_starts": st.integers(1, 4),
            "mixture_weight": st.floats(0, 0.99),
            "adaptive_mixture": st.booleans(),
            "candidates": st.integers(4, 9),
            "divergence_probes": st.integers(1, 7),
            "best_of": st.integers(1, 3),
            "sde_steps": st.none() | st.integers(2, 9),
            "distill_coef": st.sampled_from([0.0, 1.0]),
            "value_penalty": st.sampled_from([0.0, 1.0]),
        }
    ),
    edits=st.booleans(),
)
def test_the_noise_has_a_row_for_everything_that_is_random(make_config, batch, act, half, settings, edits):
    if edits:
        settings = {**settings, "mixture_weight": 0.0, "edit_scale": 0.3}
    config = TrainConfig.preset("qam-edit" if edits else "me-am", {"nfe": 2 * half, "batch_size": 16, **settings})
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_module, "orthonormal", lambda vectors: (drawn.append(vectors), orthonormal(vectors))[1])
        noise = draw_noise(batch, act, config, torch.Generator(), CPU)
    weight, objective = config.mixture_weight, config.objective
    mixed = max(1, round(weight * batch)) if weight else 0  # a mixture is never silently empty
    sde = batch if objective == "adjoint" else 0
    # As many samples as the batch has rows, or a little fewer, by observation; half as many where each row of the
    # batch has a bridge too, but never none.
    draws, *samples = {
        "two_scale": (2, config.candidates, max(1, batch // (2 * config.candidates))),
        "reweighted": (4, config.candidates, batch // config.candidates),
        "target_score": (4, 1, batch),
        "adjoint": (0, 1, 0),
        "bridge": (0, 1, 0),
    }[objective]
    points = {"two_scale": 1, "bridge": 2 * half}.get(objective, 0)
    bridges = batch if points else 0
    probes = min(config.divergence_probes, act) if objective in ("two_scale", "reweighted") else 0
    heads = batch if edits or config.distill_coef else 0
    penalised = batch if config.value_penalty else 0
    assert {name: tuple(tensor.shape) for name, tensor in noise._asdict().items()} == {
        "next_x_0": (batch, config.best_of * act),
        "next_edit": (batch if edits else 0, config.best_of * act),
        "acted_x_0": (max(penalised, bridges), (config.best_of if penalised else 1) * act),
        "acted_edit": (penalised if edits else 0, config.best_of * act),
        "flow_x_0": (batch, act),
        "flow_t": (batch, 1),
        "sde_x_0": (sde, act),
        "sde": ((config.sde_steps or 2 * half) - 1, sde, act),
        "sample_x_0": (*samples, act),
        "match_x_0": (draws, *samples, act),
        "match_t": (draws, *samples, 1),
        "bridge_x_0": (points, bridges, act),
        "bridge_t": (points, bridges, 1),
        "probes": (probes, act),
        "ascent_x_0": (config.ascent_starts - 1, mixed, act),
        "bandwidth": (mixed, act),
        "accept": (mixed if config.adaptive_mixture else 0,),
        "head_x_0": (heads, act),
        "edit": (batch if edits else 0, act),
    }
    if probes:  # Gram-Schmidt loses what nearly dependent vectors lose; ordinary ones stay well within 1e-5
        lost = 1e-6 * np.linalg.cond(drawn[0].double())
        np.testing.assert_allclose(noise.probes @ noise.probes.T, np.eye(probes), atol=lost)


@pytest.mark.parametrize("method", ["qam-edit", "me-am"])
def test_the_row_axis_of_every_noise_grows_with_the_batch(make_config, method):
    settings = {"adaptive_mixture": True, "mixture_weight": 0.5} if method == "me-am" else {}
    config = make_config(method, distill_coef=1.0, **settings)
    small, large = (draw_noise(rows, 3, config, torch.Generator(), CPU)._asdict() for rows in (8, 16))
    for name, axis in ROW_AXES.items():
        sizes = list(large[name].shape)
        if axis is not None:
            sizes[axis] //= 2
        assert list(small[name].shape) == sizes, name
    assert tuple(ROW_AXES) == MeamNoise._fields


@pytest.mark.parametrize("hint", [torch.Tensor, Annotated[torch.Tensor, 0], Annotated[int, RowAxis(0), RowAxis(1)]])
def test_noise_without_one_row_axis_is_refused(hint):
    class Noise(NamedTuple):
        known: Annotated[torch.Tensor, RowAxis(1)]
        forgotten: hint  # pyright: ignore[reportInvalidTypeForm]

    with pytest.raises(TypeError, match=r"Noise\.forgotten declares [02] row axes; expected one"):
        row_axes(Noise)


def test_the_noise_is_standard_normal_and_its_times_uniform(make_config):
    common = {"distill_coef": 1.0, "best_of": 2, "value_penalty": 1.0}
    seen = set()
    for config in (
        make_config(mixture_weight=0.5, adaptive_mixture=True, **common),
        make_config("qam-edit", objective="adjoint", **common),
    ):
        noise = draw_noise(20_000, 2, config, torch.Generator().manual_seed(0), CPU)
        for name, tensor in noise._asdict().items():
            if name == "probes" or not tensor.numel():
                continue
            seen.add(name)
            if name in ("flow_t", "match_t", "bridge_t", "accept"):
                assert 0 <= tensor.min() < 0.01
                assert 0.99 < tensor.max() <= 1
                assert tensor.mean().item() == pytest.approx(0.5, abs=0.02)
            else:
                assert tensor.mean().item() == pytest.approx(0, abs=0.05)
                assert tensor.std().item() == pytest.approx(1, abs=0.05)
    assert seen == set(MeamNoise._fields) - {"probes"}


@pytest.mark.slow
def test_directions_of_the_divergence_are_unbiased(make_config):
    # On average over the draws the projection act / probes Q Q^T is the identity.
    config, generator = make_config(divergence_probes=2), torch.Generator().manual_seed(0)
    mean = torch.zeros(5, 5)
    for _ in range(400):
        probes = draw_noise(1, 5, config, generator, CPU).probes
        mean += 5 / 2 * probes.T @ probes / 400
    np.testing.assert_allclose(mean, np.eye(5), atol=0.15)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("published", [True, False])
def test_without_entropy_and_mixture_me_am_is_qam_bit_for_bit(make_config, make_networks, objective, published):
    scheme = PUBLISHED if published else {"sde": "ancestral", "solver": "midpoint", "confine": True}
    if not published:
        scheme |= {"precondition": True, "normalise_values": True}
    if objective != "adjoint":
        scheme = {name: value for name, value in scheme.items() if name != "sde"}
    results = []
    for config in (
        make_config("qam", **{"objective": objective, **({} if published else scheme)}),
        make_config("me-am", objective=objective, entropy_coef=0.0, mixture_weight=0.0, value_penalty=0.0, **scheme),
    ):
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_entropy_changes_only_the_policys_loss_and_mixture_only_the_priors(make_config, make_networks, objective):
    base = make_config("me-am", objective=objective, entropy_coef=0.0, mixture_weight=0.0)
    networks = make_networks(base)
    noise = noise_for(make_config("me-am", objective=objective, mixture_weight=0.5))
    without = noise._replace(ascent_x_0=noise.ascent_x_0[:, :0], bandwidth=noise.bandwidth[:0])

    def losses(noise, **changes):
        metrics = compute_losses(networks, random_batch(), noise, dataclasses.replace(base, **changes)).metrics
        return {name: metrics[f"{name}_loss"].item() for name in ("critic", "prior", "policy")}

    plain, entropy = losses(without), losses(without, entropy_coef=0.5)
    mixture = losses(noise, mixture_weight=0.5)
    assert {name for name in plain if plain[name] != entropy[name]} == {"policy"}
    assert {name for name in plain if plain[name] != mixture[name]} == {"prior"}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["qam-edit", "me-am"])
def test_every_loss_trains_its_own_network_and_nothing_else(make_config, make_networks, method, objective):
    mixture = {} if method == "qam-edit" else {"mixture_weight": 0.5}
    config = make_config(method, objective=objective, distill_coef=1.0, **mixture)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    losses = compute_losses(networks, batch, noise, config)
    features = networks.encoder(batch.observations)
    samples = draw_policy_samples(networks, features, batch, noise, config)
    heads, _ = head_losses(networks, features, samples, noise, config)
    of_heads = ("edit_policy.", "one_step.") if method == "qam-edit" else ("one_step.",)
    for loss, prefixes in (
        (losses.metrics["critic_loss"], ("critic.",)),
        (losses.metrics["prior_loss"], ("prior.",)),
        (losses.metrics["policy_loss"], ("policy.",)),
        (heads, of_heads),
        (losses.total, ("critic.", "prior.", "policy.", *of_heads)),
    ):
        own = {name for name, _ in networks.named_parameters() if name.startswith(prefixes)}
        assert gradients(networks, loss) == own


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_total_is_the_sum_of_the_losses_and_metrics_are_named(make_config, make_networks, objective):
    named = {"mixture_gain", "mixture_distance", "mixture_outside", "mixture_disagreement", "mixture_kept"}
    named |= {"critic_loss", "prior_loss", "policy_loss", "distill_loss", "one_step_value"}
    named |= {"value_mean", "value_std", "value_excess"}
    named |= {
        "two_scale": {"effective_samples", "early_loss", "late_loss"},
        "reweighted": {"effective_samples"},
        "bridge": {"adjoint_max"},
        "target_score": {"adjoint_max"},
        "adjoint": {"adjoint_max", "outside_box"},
    }[objective]
    config = make_config(objective=objective, mixture_weight=0.5, adaptive_mixture=True, distill_coef=3.0)
    losses = compute_losses(make_networks(config), random_batch(), noise_for(config), config)
    m = losses.metrics
    parts = m["critic_loss"] + m["prior_loss"] + m["policy_loss"] + 3 * m["distill_loss"] - m["one_step_value"]
    assert losses.total.item() == pytest.approx(parts.item())
    assert set(m) == named <= set(METRICS)


def test_the_penalty_stays_within_the_returns_spread_where_the_temperature_is_above_it(make_config, make_networks):
    noise, batch, found = None, random_batch(), []
    for tau in (1e-6, 1e-4):
        config = make_config("me-am", kl_budget=None, inverse_temperature=tau)
        networks, noise = make_networks(config), noise or noise_for(config)
        assert tau * networks.critic.scale < 1
        found.append(compute_losses(networks, batch, noise, config).metrics["critic_loss"].item())
    assert found[0] == found[1]


@pytest.mark.parametrize("budget", [{"kl_budget": None, "inverse_temperature": 5.0}, {"kl_budget": 1.0}])
def test_the_penalty_is_how_far_the_policys_actions_are_valued_above_the_datas(make_config, make_networks, budget):
    plain, penalised = (make_config("me-am", value_penalty=weight, **budget) for weight in (0.0, 0.7))
    networks, batch, noise = make_networks(penalised), random_batch(), noise_for(penalised)
    if networks.trust_region is not None:
        networks.trust_region.unit_cost.fill_(0.3)
    found = [compute_losses(networks, batch, noise, config).metrics for config in (plain, penalised)]
    with torch.no_grad():
        features = networks.encoder(batch.observations)
        acted = networks.critic(features, networks.act(features, noise.acted_x_0))
        excess = ((acted - networks.critic(features, batch.actions)) * batch.valid).mean()
    assert found[1]["value_excess"].item() == pytest.approx(excess.item(), rel=1e-9)
    resting = penalised.discount**penalised.chunk_size * batch.masks
    assert 0 < resting.mean() < resting.max()
    penalty = ((acted - networks.critic(features, batch.actions)) * batch.valid * resting).mean()
    added = found[1]["critic_loss"] - found[0]["critic_loss"]
    tau = float(networks.tilt(penalised).inverse_temperature)
    assert added.item() == pytest.approx(0.7 * penalty.item() / (tau * networks.critic.scale.item() ** 2), rel=1e-6)


def test_where_values_rest_on_rewards_alone_nothing_is_penalised(make_config, make_networks):
    plain, penalised = (
        make_config("me-am", value_penalty=weight, kl_budget=None, inverse_temperature=5.0) for weight in (0.0, 0.7)
    )
    networks, noise = make_networks(penalised), noise_for(penalised)
    ended = random_batch()._replace(masks=torch.zeros_like(random_batch().masks))
    found = [compute_losses(networks, ended, noise, config).metrics for config in (plain, penalised)]
    assert found[0]["critic_loss"] == found[1]["critic_loss"]
    assert found[1]["value_excess"] != 0


def test_while_nothing_is_known_of_the_values_nothing_is_penalised(make_config, make_networks):
    for budget in ({"kl_budget": None, "inverse_temperature": 0.0}, {"kl_budget": 1.0}):
        plain, penalised = (make_config("me-am", value_penalty=weight, **budget) for weight in (0.0, 0.7))
        networks, batch, noise = make_networks(penalised), random_batch(), noise_for(penalised)
        found = [compute_losses(networks, batch, noise, config).metrics for config in (plain, penalised)]
        assert found[0]["critic_loss"] == found[1]["critic_loss"]


def metrics_of(make_config, make_networks, method, **changes):
    config = make_config(method, **changes)
    return set(compute_losses(make_networks(config), random_batch(), noise_for(config), config).metrics)


def test_every_metric_is_one_of_some_run(make_config, make_networks):
    mixture = {"adaptive_mixture": True, "mixture_weight": 0.5}
    mixed = metrics_of(make_config, make_networks, "me-am", distill_coef=1.0, value_penalty=1.0, **mixture)
    held = metrics_of(make_config, make_networks, "trqam")
    assert mixed | held | metrics_of(make_config, make_networks, "qam-edit") == set(METRICS)
    assert len(set(METRICS)) == len(METRICS)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_loss_logs_what_its_module_names(make_config, make_networks, objective):
    of_policy = {
        "two_scale": TWO_SCALE_METRICS,
        "reweighted": REWEIGHTED_METRICS,
        "target_score": TARGET_SCORE_METRICS,
        "adjoint": ADJOINT_METRICS,
        "bridge": BRIDGE_METRICS,
    }
    always = {"critic_loss", "prior_loss", "policy_loss", *CRITIC_METRICS, *of_policy[objective]}
    common = {"objective": objective, "distill_coef": 1.0, "value_penalty": 1.0}
    assert metrics_of(make_config, make_networks, "qam-edit", **common) == always | set(HEAD_METRICS)
    mixture = {"adaptive_mixture": True, "mixture_weight": 0.5}
    of_mixture = metrics_of(make_config, make_networks, "me-am", **common, **mixture) - always
    assert of_mixture - set(HEAD_METRICS) == set(MIXTURE_METRICS)


def test_bc_has_and_trains_only_the_prior(make_config, make_networks):
    config = make_config("bc")
    networks = make_networks(config)
    noise = noise_for(config)
    losses = compute_losses(networks, random_batch(), noise, config)
    assert {name.split(".")[0] for name, _ in networks.named_parameters()} == {"prior"}
    assert networks.deployed is networks.prior
    assert torch.equal(losses.total, pretraining_losses(networks, random_batch(), noise, critics=False).total)
    assert list(losses.metrics) == ["prior_loss"]
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    update_targets(networks, 0.5)
    networks.start_from_pretraining()
    assert all(torch.equal(before[name], value) for name, value in networks.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_deployed_field_is_the_policy_or_its_average_if_there_is_one(make_config, make_networks, objective):
    networks = make_networks(make_config(objective=objective))
    assert networks.deployed is (networks.policy if objective == "adjoint" else networks.target_policy)
    assert networks.deployed is not None
    assert (networks.target_policy is None) == (objective == "adjoint")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_targets_start_equal_and_then_follow_at_the_polyak_rate(make_config, dataset, objective):
    config = make_config(objective=objective)
    networks = build_networks(make_spec(config, dataset), config)
    pairs = [(networks.prior, networks.target_prior), (networks.critic, networks.target_critic)]
    if objective != "adjoint":
        pairs.append((networks.policy, networks.target_policy))
    for online, target in pairs:
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            assert torch.equal(p, q)
            assert not q.requires_grad
            p.data += 1
    update_targets(networks, 0.25)
    for online, target in pairs:
        for p, q in zip(online.parameters(), target.parameters(), strict=True):
            torch.testing.assert_close(q.data, p.data - 0.75)


def assert_same_weights(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_after_pretraining_the_policy_and_the_targets_are_the_prior(make_config, make_networks, objective):
    networks = make_networks(make_config(objective=objective))
    critic = {name: value.clone() for name, value in networks.critic.state_dict().items()}
    networks.start_from_pretraining()
    for copied in (networks.policy, networks.target_prior, networks.deployed):
        assert_same_weights(networks.prior, copied)
    assert_same_weights(networks.critic, networks.target_critic)
    assert all(torch.equal(critic[name], value) for name, value in networks.critic.state_dict().items())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_later_stage_of_mirror_descent_has_the_deployed_policy_as_its_prior_and_leaves_it(
    make_config, make_networks, objective
):
    config = make_config(objective=objective, mixture_weight=0.5)
    networks = make_networks(config)
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    networks.start_mirror_stage()
    for copied in (networks.prior, networks.target_prior):
        assert_same_weights(networks.deployed, copied)
    kept = [name for name in before if not name.startswith(("prior.", "target_prior."))]
    assert all(torch.equal(before[name], networks.state_dict()[name]) for name in kept)
    losses = compute_losses(networks, random_batch(), noise_for(config), config, later_stage=True)
    assert "prior_loss" not in losses.metrics
    moved = gradients(networks, losses.total)
    assert {name.split(".")[0] for name in moved} == {"critic", "policy"}


@pytest.mark.slow
@settings(max_examples=25)
@given(weight=st.floats(0, 0.99), seed=st.integers(0, 100))
def test_the_mixture_replaces_exactly_its_share_of_rows(make_config, make_networks, weight, seed):
    # Without a search, the Q-maximised chunk is the data's, blurred by the bandwidth.
    search = {"ascent_starts": 1, "ascent_steps": 0, "mixture_bandwidth": 0.3} if weight else {}
    config = make_config(mixture_weight=weight, **search)
    networks, batch, noise = make_networks(config), random_batch(seed), noise_for(config, seed)
    loss = compute_losses(networks, batch, noise, config).metrics["prior_loss"].item()
    mixed = len(noise.bandwidth)
    assert mixed == (max(1, round(weight * BATCH)) if weight else 0)
    x_1 = batch.actions.clone()
    x_1[:mixed] = (x_1[:mixed] + 0.3 * noise.bandwidth).clamp(-1, 1)
    x_t = (1 - noise.flow_t) * noise.flow_x_0 + noise.flow_t * x_1
    with torch.no_grad():
        predicted = networks.prior(networks.encoder(batch.observations), x_t, noise.flow_t)
    expected = ((predicted - x_1 + noise.flow_x_0).square() * batch.within).sum() / batch.actions.numel()
    assert loss == pytest.approx(expected.item(), rel=1e-9)


def test_the_search_makes_the_mixture_better_than_the_data(make_config, make_networks):
    config = make_config(mixture_weight=0.5, mixture_bandwidth=1e-9)
    networks = make_networks(config)
    metrics = compute_losses(networks, random_batch(), noise_for(config), config).metrics
    assert metrics["mixture_gain"] > 0.01
    assert metrics["mixture_distance"] > 0.01


@pytest.mark.slow
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
    config = make_config(
        objective="target_score", entropy_coef=entropy_coef, score_limit=score_limit, score_eps=score_eps
    )
    networks = make_networks(config, seed=3)
    features = networks.encoder(random_batch(seed).observations)
    x_1 = spread * torch.randn(BATCH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x_1[0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    of_q = terminal_adjoint(networks, features, x_1, dataclasses.replace(config, entropy_coef=0.0))
    of_entropy = terminal_adjoint(networks, features, x_1, config) - of_q
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
    adjoint = terminal_adjoint(networks, features, x_1, config)
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


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "network"), [("critic_loss", "critic"), ("prior_loss", "prior")])
def test_the_gradients_of_the_critic_and_prior_losses_are_right(make_config, make_networks, loss, network):
    config = make_config(
        objective="adjoint",
        mixture_weight=0.5,
        hidden_dims=(3,),
        critic_hidden_dims=(3,),
        num_critics=1,
        nfe=2,
        ascent_steps=1,
    )
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    parameters = tuple(getattr(networks, network).parameters())
    # gradcheck moves the parameters themselves.
    assert torch.autograd.gradcheck(lambda *_: compute_losses(networks, batch, noise, config).metrics[loss], parameters)


def test_invalid_chunks_train_neither_critic_nor_prior(make_config, make_networks):
    config = make_config("qam")
    networks, noise = make_networks(config), noise_for(config)
    batch = random_batch()
    batch = batch._replace(within=batch.valid[:, None].expand_as(batch.actions))
    changed = torch.where(batch.valid[:, None] == 0, torch.zeros_like(batch.actions), batch.actions)
    first, second = (
        compute_losses(networks, b, noise, config).metrics for b in (batch, batch._replace(actions=changed))
    )
    assert not torch.equal(batch.actions, changed)
    assert torch.equal(first["critic_loss"], second["critic_loss"])
    assert torch.equal(first["prior_loss"], second["prior_loss"])
    assert first["critic_loss"] > 0


def test_actions_past_the_end_of_an_episode_are_not_imitated(make_config, make_networks):
    config = make_config("bc")
    networks, noise, batch = make_networks(config), noise_for(config), random_batch()
    x_t = (1 - noise.flow_t) * noise.flow_x_0 + noise.flow_t * batch.actions
    with torch.no_grad():
        predicted = networks.prior(networks.encoder(batch.observations), x_t, noise.flow_t).numpy()
    errors = (predicted - (batch.actions - noise.flow_x_0).numpy()) ** 2
    found = compute_losses(networks, batch, noise, config).metrics["prior_loss"].item()
    assert found == pytest.approx(errors[batch.within.numpy() == 1].sum() / errors.size, rel=1e-12)


def test_after_a_termination_the_target_is_the_reward_alone(make_config, make_networks):
    config = make_config("qam")
    networks, noise, batch = make_networks(config), noise_for(config), random_batch()
    ended = batch._replace(masks=torch.zeros(BATCH, dtype=torch.float64))
    loss = compute_losses(networks, ended, noise, config).metrics["critic_loss"]
    values = networks.critic(networks.encoder(batch.observations), batch.actions)
    expected = ((values - batch.rewards) ** 2 * batch.valid).mean()
    torch.testing.assert_close(loss, expected)


# How the policy acts


def flow_of(networks, config, features, x_0):
    """The flow and its clipping, row by row, from the definition."""
    return integrate(
        networks.deployed.condition(features), x_0, Integration(config.nfe, config.solver), config.confine
    ).clamp(-1, 1)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scheme", [{"solver": "euler", "confine": False}, {"solver": "midpoint", "confine": True}])
def test_a_chunk_is_the_clipped_end_of_the_deployed_flow(make_config, make_networks, objective, scheme):
    config = make_config(objective=objective, **scheme)
    networks = make_networks(config)
    features, x_0 = networks.encoder(random_batch().observations), 2 * random_batch(seed=1).actions
    acted = networks.act(features, x_0)
    torch.testing.assert_close(acted, flow_of(networks, config, features, x_0))
    assert acted.abs().max() <= 1


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("edited", [False, True])
def test_of_several_chunks_the_one_with_the_highest_mean_value_is_taken(make_config, make_networks, count, edited):
    config = make_config(*(["qam-edit"] if edited else []), best_of=count, **({"edit_scale": 0.4} if edited else {}))
    networks = make_networks(config)
    features = networks.encoder(random_batch().observations)
    noise, edit_noise = torch.randn(2, BATCH, count * 4, generator=torch.Generator().manual_seed(1)).double()
    for drawn in (None, edit_noise) if edited else (None,):
        chunks, values = [], []
        for i in range(count):
            part = slice(4 * i, 4 * (i + 1))
            chunk = flow_of(networks, config, features, noise[:, part])
            if edited:
                policy = networks.edit_policy
                mean, log_std = policy(features, chunk)
                edit = torch.tanh(mean if drawn is None else mean + log_std.exp() * drawn[:, part])
                chunk = (chunk + 0.4 * edit).clamp(-1, 1)
            chunks.append(chunk.detach().numpy())
            values.append(networks.target_critic(features, chunk).detach().numpy().mean(axis=0))
        best = np.argmax(values, axis=0)
        expected = np.array(chunks)[best, np.arange(BATCH)]
        np.testing.assert_allclose(networks.act(features, noise, drawn).detach(), expected, rtol=1e-9, atol=1e-12)
        assert count == 1 or len(set(best)) > 1


def test_more_chunks_to_choose_from_have_higher_values(make_config, make_networks):
    means = []
    noise = torch.randn(BATCH, 16 * 4, generator=torch.Generator().manual_seed(1)).double()
    for count in (1, 4, 16):
        config = make_config(best_of=count)
        networks = make_networks(config)
        features = networks.encoder(random_batch().observations)
        acted = networks.act(features, noise[:, : count * 4])
        means.append(networks.target_critic(features, acted).mean().item())
    assert means == sorted(means)
    assert means[0] < means[2]


def test_the_td_target_acts_as_the_policy_does(make_config, make_networks):
    config = make_config("qam-edit", best_of=2, pessimism=0.7, discount=0.9)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    loss = compute_losses(networks, batch, noise, config).metrics["critic_loss"]
    with torch.no_grad():
        features = networks.encoder(batch.next_observations)
        actions = networks.act(features, noise.next_x_0, noise.next_edit)
        values = networks.target_critic(features, actions)
        following = values.mean(dim=0) - 0.7 * values.std(dim=0, correction=0)
        target = batch.rewards + 0.9**2 * batch.masks * following
        predicted = networks.critic(networks.encoder(batch.observations), batch.actions)
    torch.testing.assert_close(loss, ((predicted - target).square() * batch.valid).mean())
    other = noise._replace(next_edit=-noise.next_edit)
    assert compute_losses(networks, batch, other, config).metrics["critic_loss"] != loss


def test_the_critics_learn_in_units_of_the_datas_returns_and_speak_in_units_of_reward(make_config, dataset):
    """With rewards and values in other units, the same networks have the same loss and gradients."""
    units = []
    for offset, scale in ((0.0, 1.0), (-30.0, 8.0)):
        config = make_config(pessimism=0.7, value_penalty=0.3, inverse_temperature=2 / scale)
        known = DataStatistics(value_offset=offset, value_scale=scale)
        networks = build_networks(make_spec(config, dataset), config, known).double()
        batch, discount = random_batch(), config.discount**config.chunk_size
        # With V' = offset + scale V the target r' + gamma^H mask V' has to be offset + scale (r + gamma^H mask V).
        rewards = offset + scale * batch.rewards - discount * batch.masks * offset
        losses = compute_losses(networks, batch._replace(rewards=rewards), noise_for(config), config)
        losses.metrics["critic_loss"].backward()
        units.append((losses.metrics, [p.grad for p in networks.critic.parameters()]))
        assert set(networks.critic.state_dict()) > {"offset", "scale"}
    (plain, gradients_of_plain), (other, gradients_of_other) = units
    torch.testing.assert_close(other["critic_loss"], plain["critic_loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients_of_other, gradients_of_plain, rtol=1e-6, atol=1e-7)
    assert plain["critic_loss"] > 0.1
    torch.testing.assert_close(other["value_mean"], -30 + 8 * plain["value_mean"])
    torch.testing.assert_close(other["value_std"], 8 * plain["value_std"])


# Pretraining


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (-30.0, 8.0)])
def test_pretraining_fits_critics_to_the_returns_as_far_as_they_are_known(make_config, dataset, offset, scale):
    config, batch = make_config(), random_batch()
    known = DataStatistics(value_offset=offset, value_scale=scale)
    networks = build_networks(make_spec(config, dataset), config, known).double()
    noise = noise_for(config)
    losses = pretraining_losses(networks, batch, noise, critics=True)
    assert list(losses.metrics) == ["prior_loss", "critic_loss"]
    values = networks.critic(networks.encoder(batch.observations), batch.actions).detach().numpy()
    weight = batch.valid.numpy() * batch.known.numpy()
    expected = np.mean([weight * ((row - batch.returns.numpy()) / scale) ** 2 for row in values])
    assert losses.metrics["critic_loss"].item() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(losses.total, losses.metrics["prior_loss"] + losses.metrics["critic_loss"])
    trained = gradients(networks, losses.total)
    assert {name.split(".")[0] for name in trained} == {"prior", "critic"}


def test_where_values_are_known_only_the_prior_is_pretrained(make_config, make_networks):
    config, networks = make_config(), make_networks(make_config())
    networks.known_value = lambda observations, actions: actions.sum(dim=-1)
    losses = pretraining_losses(networks, random_batch(), noise_for(config), critics=True)
    assert list(losses.metrics) == ["prior_loss"]


# A known value


def test_a_known_value_takes_the_place_of_the_critics(make_config, make_networks):
    config = make_config(best_of=3, mixture_weight=0.5, distill_coef=1.0, fourier_features=4)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    seen = []

    def value(observations, actions):
        seen.append(observations)
        return -(actions - observations.mean(dim=-1, keepdim=True)).square().sum(dim=-1)

    networks.known_value = value
    losses = compute_losses(networks, batch, noise, config)
    assert not {"critic_loss", "value_mean", "value_std"} & set(losses.metrics)
    assert gradients(networks, losses.total) == {
        name for name, _ in networks.named_parameters() if name.startswith(("prior.", "policy.", "one_step."))
    }
    # It is given raw observations, those of the batch.
    known = {tuple(row) for row in batch.observations.numpy().round(6)}
    assert {tuple(row) for given in seen for row in given.detach().numpy().round(6)} <= known
    features = networks.encoder(batch.observations)
    torch.testing.assert_close(networks.values(features, batch.actions), value(batch.observations, batch.actions)[None])
    acted = networks.act(features, noise.next_x_0)
    single = [networks.flow(networks.deployed, features, x).clamp(-1, 1) for x in noise.next_x_0.split(4, dim=1)]
    best = torch.stack([value(batch.observations, chunk) for chunk in single]).max(dim=0).values
    torch.testing.assert_close(value(batch.observations, acted), best)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_critics_do_not_matter_where_the_value_is_known(make_config, make_networks, objective):
    config = make_config(objective=objective, mixture_weight=0.5)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    networks.known_value = lambda observations, actions: actions.sum(dim=-1)
    before = compute_losses(networks, batch, noise, config).total
    with torch.no_grad():
        for parameter in (*networks.critic.parameters(), *networks.target_critic.parameters()):
            parameter.mul_(-3)
    assert torch.equal(compute_losses(networks, batch, noise, config).total, before)


# The mixture


def test_the_mixtures_figures_are_those_of_their_definitions(make_config, make_networks, monkeypatch):
    config = make_config(mixture_weight=0.5, num_critics=3)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    generator = np.random.default_rng(3)
    best, gain = generator.uniform(-1, 1, size=(8, 4)), generator.random(8)
    monkeypatch.setattr(prior_loss, "maximize_q", lambda *args: (torch.tensor(best), torch.tensor(gain)))
    metrics = compute_losses(networks, batch, noise, config).metrics
    data = batch.actions.numpy()
    distance = np.sqrt(((best[:, None] - data[None]) ** 2).mean(axis=-1)).min(axis=1)
    outside = (best < data.min(axis=0)) | (best > data.max(axis=0))
    with torch.no_grad():
        values = networks.target_critic(networks.encoder(batch.observations)[:8], torch.tensor(best)).numpy()
    assert 0 < outside.mean() < 1
    assert metrics["mixture_gain"].item() == pytest.approx(gain.mean())
    assert metrics["mixture_distance"].item() == pytest.approx(distance.mean())
    assert metrics["mixture_outside"].item() == pytest.approx(outside.mean())
    assert metrics["mixture_disagreement"].item() == pytest.approx(values.std(axis=0).mean())


def searched_from(networks, batch, noise, config, monkeypatch):
    """The starts that the ascent to Q-maximised chunks is given, and its limits."""
    given = []

    def spy(value, starts, *limits):
        given.append((starts, limits))
        return starts[0], starts[0, :, 0]

    monkeypatch.setattr(prior_loss, "maximize_q", spy)
    compute_losses(networks, batch, noise, config)
    ((starts, limits),) = given
    return starts, limits


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_search_starts_at_the_data_samples_of_the_prior_and_copies_of_the_data(
    make_config, make_networks, monkeypatch, count
):
    spread = {"ascent_spread": 0.3} if count > 2 else {}
    config = make_config(mixture_weight=0.5, ascent_starts=count, trust_radius=0.7, **spread)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    starts, limits = searched_from(networks, batch, noise, config, monkeypatch)
    assert limits == (config.ascent_steps, config.ascent_step_size, 0.7)
    features, data = networks.encoder(batch.observations)[:8], batch.actions[:8]
    with torch.no_grad():
        flowed = [networks.flow(networks.target_prior, features, x_0) for x_0 in noise.ascent_x_0[::2]]
    copies = [data + 0.3 * x for x in noise.ascent_x_0[1::2]]
    assert len(flowed) == count // 2
    torch.testing.assert_close(starts, torch.stack([data, *flowed, *copies]))


@pytest.mark.slow
@settings(max_examples=20)
@given(seed=st.integers(0, 100), radius=st.floats(0.01, 0.3), spread=st.floats(0, 2), step=st.floats(0.01, 1))
def test_q_maximised_chunks_lie_in_the_box_within_the_trust_radius_of_their_starts(
    make_config, make_networks, seed, radius, spread, step
):
    config = make_config(
        mixture_weight=0.5, trust_radius=radius, ascent_spread=spread, ascent_step_size=step, mixture_bandwidth=1e-12
    )
    networks, batch, noise = make_networks(config), random_batch(seed), noise_for(config, seed)
    with pytest.MonkeyPatch.context() as patch:
        starts, _ = searched_from(networks, batch, noise, config, patch)
    features = networks.encoder(batch.observations)
    found, _ = prior_loss._q_maximized(networks, features[:8], batch.actions, noise, config)
    assert found.abs().max() <= 1
    distance = (found - starts.clamp(-1, 1)).square().mean(dim=-1).sqrt()
    assert (distance.amin(dim=0) <= radius + 1e-9).all()


def disagreeing(networks, disagreement):
    """Give two critics the values ± disagreement(action)."""
    networks.values = lambda features, actions: torch.stack([disagreement(actions), -disagreement(actions)])


@settings(max_examples=20)
@given(seed=st.integers(0, 100))
def test_a_chunk_is_kept_with_the_probability_of_the_variances(make_config, make_networks, seed):
    config = make_config(mixture_weight=0.5, adaptive_mixture=True, mixture_bandwidth=1e-12)
    networks, batch, noise = make_networks(config), random_batch(seed), noise_for(config, seed)
    generator = np.random.default_rng(seed)
    best = generator.uniform(-1, 1, size=(8, 4))
    disagreeing(networks, lambda actions: actions.square().sum(dim=-1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prior_loss, "maximize_q", lambda *args: (torch.tensor(best), torch.zeros(8)))
        features = networks.encoder(batch.observations)[:8]
        found, metrics = prior_loss._q_maximized(networks, features, batch.actions, noise, config)
    variances = (best**2).sum(axis=1) ** 2
    seen = ((batch.actions[:8].numpy() ** 2).sum(axis=1) ** 2).mean()
    kept = noise.accept.numpy() < np.minimum(1, seen / variances)
    np.testing.assert_allclose(found.numpy(), np.where(kept[:, None], best, batch.actions[:8]), atol=1e-9)
    assert metrics["mixture_kept"].item() == pytest.approx(kept.mean())


@pytest.mark.parametrize(
    ("seen", "unseen", "kept"), [(1.0, 1.0, 1.0), (1.0, 0.1, 1.0), (1.0, 1e6, 0.0), (0.0, 1.0, 0.0)]
)
def test_chunks_are_kept_where_the_critics_agree_and_dropped_where_they_do_not(
    make_config, make_networks, monkeypatch, seen, unseen, kept
):
    # An objective that takes no gradients: these values have none.
    config = make_config(objective="reweighted", mixture_weight=0.5, adaptive_mixture=True)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    monkeypatch.setattr(prior_loss, "maximize_q", lambda *args: (torch.full((8, 4), 0.125).double(), torch.zeros(8)))
    disagreeing(networks, lambda actions: torch.where(actions[:, 0] == 0.125, unseen, seen).sqrt())
    assert compute_losses(networks, batch, noise, config).metrics["mixture_kept"].item() == kept


def test_a_known_value_distrusts_nothing(make_config, make_networks):
    # It has no variance anywhere: there is nothing that it has not seen.
    config = make_config(mixture_weight=0.5, adaptive_mixture=True)
    networks = make_networks(config)
    networks.known_value = lambda observations, actions: actions.sum(dim=-1)
    metrics = compute_losses(networks, random_batch(), noise_for(config), config).metrics
    assert metrics["mixture_kept"].item() == 1


# The heads


def test_the_heads_learn_from_the_deployed_flow(make_config, make_networks):
    config = make_config("qam-edit", objective="reweighted", distill_coef=2.0, edit_target_entropy=-3.0)
    networks, batch, noise = make_networks(config), random_batch(), noise_for(config)
    features = networks.encoder(batch.observations)
    samples = draw_policy_samples(networks, features, batch, noise, config)
    total, metrics = head_losses(networks, features, samples, noise, config)
    flowed = flow_of(networks, config, features, noise.head_x_0).detach()
    assert networks.edit_policy is not None
    assert networks.one_step is not None

    def value(actions):
        return networks.target_critic(features, actions).mean(dim=0)

    edit, logged = edit_loss(networks.edit_policy, value, features, flowed, noise.edit, 0.1, -3.0)
    distill, more = distill_loss(networks.one_step, value, features, noise.head_x_0, flowed, 2.0)
    torch.testing.assert_close(total, edit + distill)
    assert metrics.keys() == {*logged, *more}
    default = dataclasses.replace(config, edit_target_entropy=None)
    half = edit_loss(networks.edit_policy, value, features, flowed, noise.edit, 0.1, -0.5 * 4)[0]
    torch.testing.assert_close(head_losses(networks, features, samples, noise, default)[0], half + distill)


def test_networks_have_only_the_heads_of_their_settings(make_config, make_networks):
    heads = {"edit_policy", "one_step"}
    for method, changes, expected in (
        ("me-am", {}, set()),
        ("me-am", {"distill_coef": 1.0}, {"one_step"}),
        ("qam-edit", {}, {"edit_policy"}),
        ("bc", {}, set()),
    ):
        networks = make_networks(make_config(method, **changes))
        assert {name.split(".")[0] for name, _ in networks.named_parameters()} & heads == expected
