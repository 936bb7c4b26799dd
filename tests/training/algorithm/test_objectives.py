"""How a policy is trained, against closed forms: priors, policies and targets that are Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meam_policy.spec import BoxSpec, Integration, PolicySpec
from meam_training.algorithm import adjoint_objective, reweighted_objective, two_scale_objective
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.algorithm.policy_samples import draw_policy_samples
from meam_training.algorithm.sample_matching import importance_weights
from meam_training.algorithm.update import compute_losses
from meam_training.config import TrainConfig
from meam_training.flow.ancestral import sample_ancestral_path
from meam_training.flow.path import time_like
from meam_training.flow.velocity import Velocity
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.velocity_field import VelocityField

OBS, ACT = 2, 2
OBJECTIVES: dict[str, dict[str, Any]] = {
    "two scale": {"objective": "two_scale"},
    "reweighted": {"objective": "reweighted"},
    "target score": {"objective": "target_score"},
    "ancestral": {"objective": "adjoint"},
    "reference": {"objective": "adjoint", "sde": "reference"},
    "bridge": {"objective": "bridge"},
    "scalar bridge": {"objective": "bridge", "bridge_adjoint": "scalar"},
}
PEAK, CURVATURE = 0.3, 3.0


class DiagonalJacobian:
    """A Jacobian with this diagonal [..., act]."""

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal

    def transposed_product(self, index: int | slice, covector: Tensor) -> Tensor:
        return self._diagonal[index] * covector

    def product(self, vectors: Tensor) -> Tensor:
        return torch.stack([self._diagonal * vector for vector in vectors])


class GaussianVelocity:
    """The velocity of a Gaussian field about some means; to differentiate it automatically takes far longer."""

    def __init__(self, field: GaussianField, mean: Tensor) -> None:
        self._field, self._mean = field, mean

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        theta = self._field.theta
        moved = theta[0] + theta[1] * x + theta[2] * t + theta[3] * x * t
        return self._mean + self._field.slope_at(t) * (x - t * self._mean) + moved

    @torch.no_grad()
    def linearize(self, x: Tensor, t: Tensor) -> tuple[Tensor, DiagonalJacobian]:
        theta = self._field.theta
        return self(x, t), DiagonalJacobian((self._field.slope_at(t) + theta[1] + theta[3] * t).expand_as(x))


class GaussianField(VelocityField):
    """The exact velocity to N(m(s), std²), m linear in the features, with parameters that may move it away."""

    def __init__(self, mean: Tensor, slope: Tensor, std: float) -> None:
        nn.Module.__init__(self)
        self.mean, self.slope, self.std = mean, slope, std
        # Added to the velocity: theta_0 + theta_1 x + theta_2 t + theta_3 x t, for every component.
        self.theta = nn.Parameter(torch.zeros(4, ACT, dtype=torch.float64))

    def centre(self, features: Tensor) -> Tensor:
        return self.mean + features @ self.slope

    def condition(self, features: Tensor) -> Velocity:  # pyright: ignore[reportIncompatibleMethodOverride]
        return GaussianVelocity(self, self.centre(features))

    def numpy(self, mean: np.ndarray, x: np.ndarray, t: Any) -> np.ndarray:
        return mean + self.slope_at(t) * (x - t * mean)

    def slope_at(self, t: Any) -> Any:
        return (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + (t * self.std) ** 2)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def make_config(**changes: Any) -> TrainConfig:
    small: dict[str, Any] = {
        "batch_size": 16,
        "hidden_dims": (4,),
        "critic_hidden_dims": (4,),
        "num_critics": 2,
        "nfe": 4,
        "candidates": 4,
        "mixture_weight": 0.0,
        "score_limit": 1e9,
        "device": "cpu",
        "kl_budget": None,
    }
    method = changes.pop("method", "me-am")
    return TrainConfig.preset(method, small, **changes)


def make_networks(config: TrainConfig, seed: int = 0) -> MeamNetworks:
    unit = BoxSpec((ACT,), "float32", (-1.0,) * ACT, (1.0,) * ACT)
    spec = PolicySpec(
        integration=Integration(nfe=config.nfe, solver=config.solver),
        observation=(BoxSpec((OBS,), "float32", (-math.inf,) * OBS, (math.inf,) * OBS),),
        action=unit,
        chunk_size=1,
        execute_steps=1,
        observation_mean=(0.0,) * OBS,
        observation_std=(1.0,) * OBS,
        action_offset=(0.0,) * ACT,
        action_scale=(1.0,) * ACT,
        method=config.method,
    )
    torch.manual_seed(seed)
    networks = MeamNetworks(spec, config).double()
    with torch.no_grad():
        for i, parameter in enumerate(networks.parameters()):
            parameter += 0.3 * normal(1000 * seed + i, *parameter.shape)
    return networks


def known_value(observations: Tensor, actions: Tensor) -> Tensor:
    """Q = -3 |a - 0.3|², whatever the observation."""
    return -CURVATURE * (actions - PEAK).square().sum(dim=-1)


def gaussian_networks(config: TrainConfig, mean: float = 0.0, std: float = 0.2) -> MeamNetworks:
    """A Gaussian prior, and the policy and its target network at the prior's exact target."""
    networks = make_networks(config)
    networks.known_value = known_value
    slope = 0.05 * normal(1, OBS, ACT)
    prior = GaussianField(torch.full((ACT,), mean, dtype=torch.float64), slope, std)
    # N(m, s²)^(1 - lambda) exp(-tau c (a - p)²)
    precision = (1 - config.entropy_coef) / std**2 + 2 * config.inverse_temperature * CURVATURE
    share = (1 - config.entropy_coef) / std**2 / precision
    target = GaussianField(share * prior.mean + (1 - share) * PEAK, share * slope, precision**-0.5)
    networks.target_prior = networks.prior = prior
    networks.policy, networks.target_policy = target, target
    return networks


def make_batch(rows: int, seed: int = 0) -> ChunkBatch:
    return ChunkBatch(
        observations=normal(seed, rows, OBS),
        actions=normal(seed + 1, rows, ACT).clamp(-1, 1),
        rewards=normal(seed + 2, rows),
        next_observations=normal(seed + 3, rows, OBS),
        masks=(normal(seed + 4, rows) > -1).double(),
        valid=(normal(seed + 5, rows) > -1).double(),
        returns=normal(seed + 6, rows),
        known=normal(seed + 7, rows).abs().clamp(max=1),
        within=(normal(seed + 8, rows, ACT) > -1).double(),
    )


def make_noise(config: TrainConfig, rows: int, seed: int = 0) -> MeamNoise:
    drawn = draw_noise(rows, ACT, config, torch.Generator().manual_seed(seed), torch.device("cpu"))
    return MeamNoise(*(tensor.double() for tensor in drawn))


def policy_loss(
    networks: MeamNetworks, config: TrainConfig, rows: int, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    losses = compute_losses(networks, make_batch(rows, seed), make_noise(config, rows, seed), config)
    return losses.metrics["policy_loss"], losses.metrics


# The objectives that draw samples, all of them again in NumPy


class NumpyFlow:
    """The flow of a Gaussian field at given observations, by its definition."""

    def __init__(self, field: Any, observations: np.ndarray, config: TrainConfig) -> None:
        assert isinstance(field, GaussianField)
        self._field, self._config = field, config
        self._mean = field.centre(torch.tensor(observations)).numpy()

    def velocity(self, x: np.ndarray, t: Any) -> np.ndarray:
        return self._field.numpy(self._mean, x, t)

    def slope(self, t: Any) -> Any:
        """The Jacobian of the velocity is this multiple of the identity."""
        return self._field.slope_at(t)

    def end(self, x: np.ndarray) -> np.ndarray:
        for k in (0, 1):  # four evaluations
            middle = x + self._confined(x, k / 2) / 4
            x = x + self._confined(middle, k / 2 + 1 / 4) / 2
        return x.clip(-1, 1) if self._config.confine else x

    def log_density(self, x: np.ndarray, directions: np.ndarray) -> np.ndarray:
        steps, expansion = self._config.likelihood_steps, np.zeros(x.shape[:-1])
        for k in reversed(range(steps)):
            t = (k + 0.5) / steps
            middle = x - self.velocity(x, (k + 1) / steps) / (2 * steps)
            x = x - self.velocity(middle, t) / steps
            expansion += ACT / len(directions) * self.slope(t) * (directions**2).sum() / steps
        return -0.5 * (x**2 + np.log(2 * np.pi)).sum(axis=-1) - expansion

    def _confined(self, x: np.ndarray, t: float) -> np.ndarray:
        v = self.velocity(x, t)
        return ((x + (1 - t) * v).clip(-1, 1) - x) / (1 - t) if self._config.confine else v


def numpy_gradient(x: np.ndarray) -> np.ndarray:
    """Gradient of the known value at the clipped action."""
    return np.where(np.abs(x) <= 1, -2 * CURVATURE * (x - PEAK), 0.0)


def beside_the_target(config: TrainConfig) -> MeamNetworks:
    """Gaussians, all different, and so wide that the box matters."""
    networks = gaussian_networks(config, std=0.6)
    networks.target_policy = GaussianField(
        torch.full((ACT,), -0.1, dtype=torch.float64), 0.1 * normal(2, OBS, ACT), 0.5
    )
    return networks


def numpy_candidates(
    prior: NumpyFlow, policy: NumpyFlow, noise: MeamNoise, entropy_coef: float, tau: float
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates, of which the first is the prior's, and their weights."""
    starts, directions = noise.sample_x_0.numpy(), noise.probes.numpy()
    x_1 = np.concatenate([prior.end(starts[:1]), policy.end(starts[1:])]).clip(-1, 1)
    log_prior, log_policy = prior.log_density(x_1, directions), policy.log_density(x_1, directions)
    share = 1 / len(starts)
    mixture = share * np.exp(log_prior) + (1 - share) * np.exp(log_policy)
    value = -CURVATURE * ((x_1 - PEAK) ** 2).sum(axis=-1)
    weights = np.exp((1 - entropy_coef) * log_prior + tau * value) / mixture
    return x_1, weights / weights.sum(axis=0)


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("probes", [1, ACT])
def test_the_reweighted_loss_is_that_of_its_definition(confine: bool, probes: int) -> None:
    config = make_config(
        objective="reweighted", confine=confine, divergence_probes=probes, entropy_coef=0.3, inverse_temperature=2.0
    )
    networks, batch, noise = beside_the_target(config), make_batch(16), make_noise(config, 16)
    metrics = compute_losses(networks, batch, noise, config).metrics
    observations = batch.observations.numpy()[:4]
    prior, other, policy = (
        NumpyFlow(field, observations, config)
        for field in (networks.target_prior, networks.target_policy, networks.policy)
    )
    x_1, weights = numpy_candidates(prior, other, noise, 0.3, 2.0)
    assert metrics["effective_samples"].item() == pytest.approx((1 / (weights**2).sum(axis=0)).mean() / 4, rel=1e-9)
    assert weights.max() > 0.3
    x_0, t = noise.match_x_0.numpy(), noise.match_t.numpy()
    assert len(x_0) == 4
    predicted = policy.velocity((1 - t) * x_0 + t * x_1, t)
    errors = ((predicted - (x_1 - x_0)) ** 2).mean(axis=-1)
    assert metrics["policy_loss"].item() == pytest.approx((4 * weights * errors).mean(), rel=1e-9)


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("switch_time", [0.4, 0.7])
def test_the_two_scale_loss_is_that_of_its_definition(confine: bool, switch_time: float) -> None:
    config = make_config(
        confine=confine,
        switch_time=switch_time,
        divergence_probes=1,
        entropy_coef=0.3,
        inverse_temperature=2.0,
        candidates=6,
        batch_size=48,
    )
    assert config.objective == "two_scale"
    networks, batch, noise = beside_the_target(config), make_batch(48), make_noise(config, 48)
    metrics = compute_losses(networks, batch, noise, config).metrics
    observations = batch.observations.numpy()
    fields = (networks.target_prior, networks.target_policy, networks.policy)

    # Early: half of the batch's rows are candidates, each with two points.
    prior, other, policy = (NumpyFlow(field, observations[:4], config) for field in fields)
    x_1, weights = numpy_candidates(prior, other, noise, 0.3, 2.0)
    assert metrics["effective_samples"].item() == pytest.approx((1 / (weights**2).sum(axis=0)).mean() / 6, rel=1e-9)
    x_0, t = noise.match_x_0.numpy(), switch_time * noise.match_t.numpy()
    assert x_0.shape == (2, 6, 4, ACT)
    x_t, denoised = (1 - t) * x_0 + t * x_1, np.zeros_like(x_0)
    for draw, source, row in np.ndindex(x_0.shape[:3]):
        time = t[draw, source, row, 0]
        squares = ((x_t[draw, source, row] - time * x_1[:, row]) ** 2).sum(axis=-1)
        posterior = weights[:, row] * np.exp(-squares / (2 * (1 - time) ** 2))
        denoised[draw, source, row] = posterior @ x_1[:, row] / posterior.sum()
    errors = ((policy.velocity(x_t, t) - (denoised - x_t) / (1 - t)) ** 2).mean(axis=-1)
    early = (6 * weights * errors).mean()
    assert metrics["early_loss"].item() == pytest.approx(early, rel=1e-9)

    # Late: every row, one point.
    prior, other, policy = (NumpyFlow(field, observations, config) for field in fields)
    x_1 = other.end(noise.acted_x_0.numpy()).clip(-1, 1)
    x_0, t = noise.bridge_x_0.numpy()[0], 1 - (1 - switch_time) * noise.bridge_t.numpy()[0]
    assert x_0.shape == (48, ACT)
    assert switch_time < t.min() < t.max() < 1
    x_t = (1 - t) * x_0 + t * x_1
    v = prior.velocity(x_t, t)
    jacobian = np.broadcast_to(1 + (1 - t) * prior.slope(t), x_t.shape)
    if confine:
        clipped = np.abs(x_t + (1 - t) * v) > 1
        assert 0 < clipped.mean() < 0.5
        jacobian = np.where(clipped, 0.0, jacobian)
    target = 0.7 * v + 0.3 * (x_1 - x_0) + jacobian * ((1 - t) / t * 2.0 * numpy_gradient(x_1) + 0.3 * x_0)
    if confine:
        target = ((x_t + (1 - t) * target).clip(-1, 1) - x_t) / np.maximum(1 - t, 1e-3)
    late = ((policy.velocity(x_t, t) - target) ** 2).mean()
    assert (1 - t).min() > 1e-3
    assert metrics["late_loss"].item() == pytest.approx(late, rel=1e-9)
    both = switch_time * early + (1 - switch_time) * late
    assert metrics["policy_loss"].item() == pytest.approx(both, rel=1e-9)


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("adjoint", ["denoiser", "scalar"])
def test_the_bridge_loss_is_that_of_its_definition(adjoint: str, confine: bool) -> None:
    config = make_config(
        objective="bridge",
        bridge_adjoint=adjoint,
        confine=confine,
        entropy_coef=0.3,
        inverse_temperature=2.0,
        score_eps=0.2,
    )
    networks, batch, noise = beside_the_target(config), make_batch(16), make_noise(config, 16)
    metrics = compute_losses(networks, batch, noise, config).metrics
    prior, other, policy = (
        NumpyFlow(field, batch.observations.numpy(), config)
        for field in (networks.target_prior, networks.target_policy, networks.policy)
    )
    x_1 = other.end(noise.acted_x_0.numpy())
    # -tau grad Q + lambda score, which no longer pushes outwards from the box's faces
    inside = x_1.clip(-1, 1)
    score = (0.8 * prior.velocity(inside, 0.8) - inside) / 0.2
    score = np.where((np.abs(x_1) >= 1) & (score * x_1 < 0), 0.0, score)
    terminal = -2.0 * numpy_gradient(x_1) + 0.3 * score
    total, largest = 0.0, 0.0
    for k in range(4):
        t = (k + 1) / 4
        x_t = (1 - t) * noise.bridge_x_0.numpy()[k] + t * x_1
        v = prior.velocity(x_t, t)
        if adjoint == "scalar":
            a = t * terminal
        else:
            passed = np.abs(x_t + (1 - t) * v) <= 1 if confine else 1.0
            a = (1 + (1 - t) * prior.slope(t)) * passed * terminal
        sigma = math.sqrt(2 * (1 - t + 2 / 4) / t)  # that of the interval that ends at t
        total += ((2 / sigma * (policy.velocity(x_t, t) - v) + sigma * a) ** 2).sum(axis=-1).mean()
        largest = np.abs(a).max()
    assert metrics["policy_loss"].item() == pytest.approx(total, rel=1e-9)
    assert metrics["adjoint_max"].item() == pytest.approx(largest, rel=1e-12)


# Weights


@pytest.mark.parametrize(("objective", "part"), [("reweighted", 4), ("two_scale", 8)])
def test_a_fixed_part_of_the_candidates_and_at_least_one_comes_from_the_prior(
    objective: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def spy(*args: Any) -> Tensor:
        seen.append(args[3])
        return importance_weights(*args)

    module = {"reweighted": reweighted_objective, "two_scale": two_scale_objective}[objective]
    monkeypatch.setattr(module, "importance_weights", spy)
    counts, expected = (4, 7, 8, 16), []
    for candidates in counts:
        config = make_config(objective=objective, candidates=candidates, batch_size=32)
        networks = gaussian_networks(config)
        drawn: list[tuple[int, ...]] = []
        monkeypatch.setattr(
            MeamNetworks,
            "flow",
            lambda self, field, features, x_0, drawn=drawn: (drawn.append(x_0.shape), 0.1 * x_0)[1],
        )
        policy_loss(networks, config, 32)
        expected.append(max(1, candidates // part))
        rows = 32 // candidates if objective == "reweighted" else 16 // candidates
        of_policy = (candidates - expected[-1]) * rows
        # The penalty and the late part share a sample for every row, drawn together with the policy's candidates.
        late = 32 if objective == "two_scale" or config.value_penalty else 0
        assert drawn == [(late + of_policy, ACT), (expected[-1], rows, ACT)]
    assert seen == [of_prior / candidates for of_prior, candidates in zip(expected, counts, strict=True)]


@pytest.mark.parametrize("objective", ["two_scale", "reweighted"])
def test_where_nothing_is_to_change_all_weights_are_equal(objective: str) -> None:
    config = make_config(objective=objective, entropy_coef=0.0, inverse_temperature=0.0)
    networks = make_networks(config)
    networks.target_policy.load_state_dict(networks.target_prior.state_dict())  # pyright: ignore[reportOptionalMemberAccess]
    _, metrics = policy_loss(networks, config, 16)
    assert metrics["effective_samples"].item() == pytest.approx(1, abs=1e-12)
    networks.target_policy.load_state_dict(make_networks(config, seed=1).prior.state_dict())  # pyright: ignore[reportOptionalMemberAccess]
    _, metrics = policy_loss(networks, config, 16)
    assert metrics["effective_samples"] < 0.99


@pytest.mark.slow
@settings(max_examples=20)
@given(
    seed=st.integers(0, 100),
    entropy_coef=st.floats(0, 0.95),
    inverse_temperature=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    size=st.sampled_from([1.0, 1e4, 1e20]),
)
def test_the_reweighted_loss_cannot_diverge(
    seed: int, entropy_coef: float, inverse_temperature: float, size: float
) -> None:
    config = make_config(objective="reweighted", entropy_coef=entropy_coef, inverse_temperature=inverse_temperature)
    networks = make_networks(config, seed).float()
    with torch.no_grad():
        networks.target_critic.weights[-1].mul_(size)
    noise = MeamNoise(*(tensor.float() for tensor in make_noise(config, 16, seed)))
    batch = ChunkBatch(*(tensor.float() for tensor in make_batch(16, seed)))
    features = networks.encoder(batch.observations)
    samples = draw_policy_samples(networks, features, batch, noise, config)
    loss, metrics = reweighted_objective.reweighted_loss(networks, features, samples, noise, config)
    loss.backward()
    assert networks.policy is not None
    # The actions lie in the box and the weights' mean is one: no loss exceeds that of the worst sample.
    x_0, t = noise.match_x_0, noise.match_t
    worst = 0.0
    for corner in (-1.0, 1.0):
        predicted = networks.policy.condition(features[: x_0.shape[-2]])((1 - t) * x_0 + t * corner, t)
        worst = max(worst, (predicted.abs() + x_0.abs() + 1).square().max().item())
    assert 0 <= loss.item() < 10 * worst
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.policy.parameters())
    assert 0.25 * (1 - 1e-6) <= metrics["effective_samples"].item() <= 1 + 1e-6


# Fixed points


def expected_gradient(networks: MeamNetworks, config: TrainConfig, rows: int, batches: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the policy's gradient, over independent batches."""
    policy = networks.policy
    assert isinstance(policy, GaussianField)
    found = []
    for seed in range(batches):
        policy.theta.grad = None
        policy_loss(networks, config, rows, 100 * seed)[0].backward()
        assert policy.theta.grad is not None
        found.append(policy.theta.grad)
    gradients = torch.stack(found)
    return gradients.mean(dim=0), gradients.std(dim=0) / math.sqrt(batches)


@pytest.mark.slow
@pytest.mark.parametrize("entropy_coef", [0.0, 0.5])
@pytest.mark.parametrize("objective", ["two_scale", "reweighted", "target_score"])
def test_the_tilted_gaussian_is_the_fixed_point(objective: str, entropy_coef: float) -> None:
    weighs = objective != "target_score"
    config = make_config(
        objective=objective,
        entropy_coef=entropy_coef,
        inverse_temperature=4.0,
        nfe=20,
        **({"likelihood_steps": 12, "candidates": 16} if weighs else {"score_eps": 1e-4}),
    )
    networks = gaussian_networks(config)
    rows = {"two_scale": 32 * 24, "reweighted": 16 * 24, "target_score": 6_000}[objective]
    mean, error = expected_gradient(networks, config, rows, 16)
    networks.policy = networks.target_prior
    at_prior, _ = expected_gradient(networks, config, rows, 4)
    # As a share of the gradient at the prior, noise and mean are small; over 200 batches the mean is below 1 %.
    assert error.norm() < 0.04 * at_prior.norm()
    assert mean.norm() < 0.06 * at_prior.norm()


class TiltedBy(GaussianField):
    """The velocity of a Gaussian field, moved by share(t) times the gradient, carried back to t."""

    def __init__(self, field: GaussianField, gradient: float, share: Callable[[Tensor], Tensor]) -> None:
        super().__init__(field.mean, field.slope, field.std)
        self._gradient, self._share = gradient, share

    def condition(self, features: Tensor) -> Velocity:
        prior = super().condition(features)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return prior(x, t) + self._share(t) * (1 + (1 - t) * self.slope_at(t)) * self._gradient

        return velocity


@pytest.mark.parametrize("nfe", [4, 20])
def test_on_bridges_a_linear_value_moves_a_gaussian_exactly_but_for_the_shift_of_the_published_noise(nfe: int) -> None:
    """The exact share of the gradient is (1 - t) / t; with the noise scale of t - 1 / K, as published, 2 / (K t) more.

    So the policy goes too far, by a velocity of twice the gradient over K at the last step, for any prior.
    """
    config = make_config(objective="bridge", entropy_coef=0.0, inverse_temperature=0.5, confine=False, nfe=nfe)
    networks = gaussian_networks(config)
    networks.known_value = lambda observations, actions: 3 * actions.sum(dim=-1)
    prior = networks.target_prior
    assert isinstance(prior, GaussianField)
    networks.target_policy = prior  # well within the box
    losses = []
    for more in (2 / nfe, 0.0):
        networks.policy = TiltedBy(prior, 1.5, lambda t, more=more: (1 - t + more) / t)
        losses.append(policy_loss(networks, config, 16)[0].item())
    assert losses[0] == pytest.approx(0, abs=1e-20)
    assert losses[1] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["two_scale", "reweighted"])
def test_at_the_fixed_point_the_weights_are_nearly_equal(objective: str) -> None:
    config = make_config(
        objective=objective,
        entropy_coef=0.3,
        inverse_temperature=4.0,
        nfe=20,
        likelihood_steps=12,
        candidates=16,
    )
    networks = gaussian_networks(config)
    _, metrics = policy_loss(networks, config, 2048)
    at_target = metrics["effective_samples"].item()
    networks.target_policy = networks.target_prior
    _, metrics = policy_loss(networks, config, 2048)
    assert at_target > 0.85
    assert metrics["effective_samples"] < at_target - 0.05


# Gradients


def freeze_path(monkeypatch: pytest.MonkeyPatch, networks: MeamNetworks, config: TrainConfig, rows: int) -> None:
    """Let finite differences see what the gradient sees: the path of the SDE is held constant."""
    for name, uncontrolled in (("sample_ancestral_path", 0), ("sample_memoryless_path", 1)):
        real, paths = getattr(adjoint_objective, name), []

        def fixed(
            policy: Any, *args: Any, real: Any = real, paths: list[Tensor] = paths, uncontrolled: int = uncontrolled
        ) -> Tensor:
            if not paths:
                paths.append(real(policy, *args))
                return paths[0]
            steps = len(paths[0]) - 1
            for k in range(steps - uncontrolled):  # the loss learns from what is said on the way
                policy(paths[0][k], time_like(paths[0][k], k / steps))
            return paths[0]

        monkeypatch.setattr(adjoint_objective, name, fixed)
    policy_loss(networks, config, rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_gradient_of_the_policys_loss_is_right(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**OBJECTIVES[kind], hidden_dims=(2,), entropy_coef=0.4, batch_size=4)
    networks = make_networks(config)
    freeze_path(monkeypatch, networks, config, 4)
    assert networks.policy is not None
    parameters = tuple(networks.policy.parameters())
    assert torch.autograd.gradcheck(lambda *_: policy_loss(networks, config, 4)[0], parameters)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_policys_loss_trains_only_the_policy(kind: str) -> None:
    config = make_config(**OBJECTIVES[kind], entropy_coef=0.4)
    networks = make_networks(config)
    policy_loss(networks, config, 16)[0].backward()
    moved = {name for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in networks.named_parameters() if name.startswith("policy.")}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_known_prior_is_tilted_as_a_learned_one_that_equals_it(kind: str) -> None:
    """It is a function of raw observations, which the encoder shifts and scales here."""
    config = make_config(**OBJECTIVES[kind], entropy_coef=0.4)
    networks = gaussian_networks(config, mean=0.1)
    networks.encoder.mean += 2.0
    networks.encoder.std *= 3.0
    networks.policy = make_networks(config).policy
    exact, expected = networks.target_prior, policy_loss(networks, config, 16)
    networks.target_prior = make_networks(config, seed=1).prior
    assert policy_loss(networks, config, 16)[0] != expected[0]
    networks.known_prior = lambda observations, x, t: exact.condition((observations - 2.0) / 3.0)(x, t)
    loss, metrics = policy_loss(networks, config, 16)
    torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(metrics["policy_loss"], expected[1]["policy_loss"], rtol=1e-9, atol=0)


# Symmetries

AXIS_OF_ROWS = {  # of every field of the noise
    **dict.fromkeys(
        (
            "next_x_0",
            "next_edit",
            "acted_x_0",
            "acted_edit",
            "flow_x_0",
            "flow_t",
            "sde_x_0",
            "bandwidth",
        ),
        0,
    ),
    **dict.fromkeys(("accept", "head_x_0", "edit"), 0),
    **dict.fromkeys(("sde", "sample_x_0", "bridge_x_0", "bridge_t", "ascent_x_0"), 1),
    **dict.fromkeys(("match_x_0", "match_t"), 2),
    "probes": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("edited", [False, True])
@settings(max_examples=4)
@given(seed=st.integers(0, 1000))
def test_the_order_of_a_batch_changes_no_loss(kind: str, edited: bool, seed: int) -> None:
    common: dict[str, Any] = {**OBJECTIVES[kind], "best_of": 2, "distill_coef": 1.0}
    if edited:
        common |= {} if kind == "reference" or common["objective"] != "adjoint" else {"sde": "ancestral"}
        common |= {"method": "qam-edit", "solver": "midpoint", "confine": True, "edit_scale": 0.2}
    else:
        common |= {"mixture_weight": 0.25, "adaptive_mixture": True}
    config = make_config(**common)
    networks = make_networks(config, seed=3)
    batch, noise = make_batch(16, seed), make_noise(config, 16, seed)
    # The first four rows are those with Q-maximised chunks, and those on which the policy is reweighted; in two_scale
    # these are the first two.
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(2), 2 + generator.permutation(2), 4 + generator.permutation(12)])
    moved = {}
    for name, value in noise._asdict().items():
        axis = AXIS_OF_ROWS[name]
        if axis is None or value.shape[axis] == 0:
            moved[name] = value
        else:
            moved[name] = value.index_select(axis, torch.tensor(order[: value.shape[axis]]))
    plain = compute_losses(networks, batch, noise, config)
    permuted = compute_losses(networks, ChunkBatch(*(part[order] for part in batch)), MeamNoise(**moved), config)
    assert permuted.total.item() == pytest.approx(plain.total.item(), rel=1e-12, abs=1e-12)
    assert permuted.metrics.keys() == plain.metrics.keys()
    for name, value in plain.metrics.items():
        assert permuted.metrics[name].item() == pytest.approx(value.item(), rel=1e-11, abs=1e-12)


def test_the_order_of_the_samples_of_prior_and_policy_changes_nothing() -> None:
    config = make_config(objective="reweighted", candidates=8)
    networks, batch, noise = make_networks(config), make_batch(16), make_noise(config, 16)
    order = torch.tensor([1, 0, 4, 2, 7, 6, 5, 3])
    moved = noise._replace(
        sample_x_0=noise.sample_x_0[order], match_x_0=noise.match_x_0[:, order], match_t=noise.match_t[:, order]
    )
    plain, permuted = (compute_losses(networks, batch, n, config).metrics["policy_loss"] for n in (noise, moved))
    torch.testing.assert_close(permuted, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ["two_scale", "reweighted"])
def test_probes_of_any_orthonormal_basis_give_the_same_loss(objective: str) -> None:
    config = make_config(objective=objective, divergence_probes=10)
    networks, batch, noise = make_networks(config), make_batch(16), make_noise(config, 16)
    assert noise.probes.shape == (ACT, ACT)
    exact = noise._replace(probes=torch.eye(ACT, dtype=torch.float64))
    drawn, exact = (compute_losses(networks, batch, n, config).metrics["policy_loss"] for n in (noise, exact))
    torch.testing.assert_close(drawn, exact, rtol=1e-6, atol=1e-9)


def test_the_sde_takes_its_own_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(objective="adjoint", sde_steps=7)
    paths: list[Tensor] = []

    def spy(*args: Any) -> Tensor:
        paths.append(sample_ancestral_path(*args))
        return paths[-1]

    monkeypatch.setattr(adjoint_objective, "sample_ancestral_path", spy)
    policy_loss(make_networks(config), config, 16)
    assert [path.shape for path in paths] == [(8, 16, ACT)]
