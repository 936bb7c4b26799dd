"""How a policy is trained, against closed forms: priors, policies and targets that are Gaussians."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meam_policy.spec import BoxSpec, Integration, PolicySpec
from meam_training.algorithm import adjoint_objective, reweighted_objective
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.algorithm.sample_matching import importance_weights
from meam_training.algorithm.update import compute_losses
from meam_training.config import TrainConfig
from meam_training.flow.ancestral import sample_ancestral_path
from meam_training.flow.path import time_like
from meam_training.flow.velocity import Velocity
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.networks.velocity_field import VelocityField

OBS, ACT = 2, 2
OBJECTIVES = [
    ("reweighted", "ancestral"),
    ("target_score", "ancestral"),
    ("adjoint", "ancestral"),
    ("adjoint", "reference"),
]
PEAK, CURVATURE = 0.3, 3.0


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
        mean = self.centre(features)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            slope = (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + (t * self.std) ** 2)
            moved = self.theta[0] + self.theta[1] * x + self.theta[2] * t + self.theta[3] * x * t
            return mean + slope * (x - t * mean) + moved

        return velocity

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
    )


def make_noise(config: TrainConfig, rows: int, seed: int = 0) -> MeamNoise:
    drawn = draw_noise(rows, ACT, config, torch.Generator().manual_seed(seed), torch.device("cpu"))
    return MeamNoise(*(tensor.double() for tensor in drawn))


def policy_loss(
    networks: MeamNetworks, config: TrainConfig, rows: int, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    losses = compute_losses(networks, make_batch(rows, seed), make_noise(config, rows, seed), config)
    return losses.metrics["policy_loss"], losses.metrics


# The reweighted objective


@pytest.mark.parametrize("confine", [False, True])
@pytest.mark.parametrize("probes", [1, ACT])
def test_the_reweighted_loss_is_that_of_its_definition(confine: bool, probes: int) -> None:
    """All of it again in NumPy: samples, likelihoods, weights, regression."""
    config = make_config(confine=confine, divergence_probes=probes, entropy_coef=0.3, inverse_temperature=2.0)
    networks = gaussian_networks(config, std=0.6)  # wide, so that the box matters
    other = GaussianField(torch.full((ACT,), -0.1, dtype=torch.float64), 0.1 * normal(2, OBS, ACT), 0.5)
    networks.target_policy = other
    batch, noise = make_batch(16), make_noise(config, 16)
    metrics = compute_losses(networks, batch, noise, config).metrics
    observations = batch.observations.numpy()[:4]
    fields = [f for f in (networks.target_prior, other) if isinstance(f, GaussianField)]
    means = [field.centre(torch.tensor(observations)).numpy() for field in fields]

    def velocity(i: int, x: np.ndarray, t: float) -> np.ndarray:
        v = fields[i].numpy(means[i], x, t)
        return ((x + (1 - t) * v).clip(-1, 1) - x) / (1 - t) if confine else v

    def sample(i: int, x: np.ndarray) -> np.ndarray:
        for k in (0, 1):  # four evaluations
            middle = x + velocity(i, x, k / 2) / 4
            x = x + velocity(i, middle, k / 2 + 1 / 4) / 2
        return x.clip(-1, 1)

    def log_density(i: int, x: np.ndarray) -> np.ndarray:
        steps, expansion = config.likelihood_steps, np.zeros(x.shape[:-1])
        directions = noise.probes.numpy()
        for k in reversed(range(steps)):
            t = (k + 0.5) / steps
            middle = x - fields[i].numpy(means[i], x, (k + 1) / steps) / (2 * steps)
            x = x - fields[i].numpy(means[i], middle, t) / steps
            # The Jacobian is a multiple of the identity.
            expansion += ACT / len(directions) * fields[i].slope_at(t) * (directions**2).sum() / steps
        return -0.5 * (x**2 + np.log(2 * np.pi)).sum(axis=-1) - expansion

    starts = noise.sample_x_0.numpy()
    x_1 = np.concatenate([sample(0, starts[:1]), sample(1, starts[1:])])
    log_prior, log_policy = log_density(0, x_1), log_density(1, x_1)
    mixture = 0.25 * np.exp(log_prior) + 0.75 * np.exp(log_policy)
    weights = np.exp(0.7 * log_prior + 2.0 * -CURVATURE * ((x_1 - PEAK) ** 2).sum(axis=-1)) / mixture
    weights /= weights.sum(axis=0)
    assert metrics["effective_samples"].item() == pytest.approx((1 / (weights**2).sum(axis=0)).mean() / 4, rel=1e-9)
    assert weights.max() > 0.3
    policy = networks.policy
    assert isinstance(policy, GaussianField)
    x_0, t = noise.match_x_0.numpy(), noise.match_t.numpy()
    predicted = policy.numpy(policy.centre(torch.tensor(observations)).numpy(), (1 - t) * x_0 + t * x_1, t)
    errors = ((predicted - (x_1 - x_0)) ** 2).mean(axis=-1)
    assert metrics["policy_loss"].item() == pytest.approx((4 * weights * errors).mean(), rel=1e-9)


def test_a_quarter_of_the_candidates_comes_from_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def spy(*args: Any) -> Tensor:
        seen.append(args[3])
        return importance_weights(*args)

    monkeypatch.setattr(reweighted_objective, "importance_weights", spy)
    for candidates in (4, 7, 8, 16):
        config = make_config(candidates=candidates)
        networks = gaussian_networks(config)
        drawn: list[int] = []
        monkeypatch.setattr(
            MeamNetworks, "flow", lambda self, field, features, x_0, drawn=drawn: (drawn.append(len(x_0)), 0.1 * x_0)[1]
        )
        policy_loss(networks, config, 16)
        assert drawn == [candidates // 4, candidates - candidates // 4]
    assert seen == [1 / 4, 1 / 7, 1 / 4, 1 / 4]


def test_where_nothing_is_to_change_all_weights_are_equal() -> None:
    config = make_config(entropy_coef=0.0, inverse_temperature=0.0)
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
    config = make_config(entropy_coef=entropy_coef, inverse_temperature=inverse_temperature)
    networks = make_networks(config, seed).float()
    with torch.no_grad():
        networks.target_critic.weights[-1].mul_(size)
    noise = MeamNoise(*(tensor.float() for tensor in make_noise(config, 16, seed)))
    features = networks.encoder(make_batch(16, seed).observations.float())
    loss, metrics = reweighted_objective.reweighted_loss(networks, features, noise, config)
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
@pytest.mark.parametrize("objective", ["reweighted", "target_score"])
def test_the_tilted_gaussian_is_the_fixed_point(objective: str, entropy_coef: float) -> None:
    config = make_config(
        objective=objective,
        entropy_coef=entropy_coef,
        inverse_temperature=4.0,
        nfe=20,
        **({"likelihood_steps": 12, "candidates": 16} if objective == "reweighted" else {"score_eps": 1e-4}),
    )
    networks = gaussian_networks(config)
    rows = 16 * 48 if objective == "reweighted" else 12_000
    mean, error = expected_gradient(networks, config, rows, 16)
    networks.policy = networks.target_prior
    at_prior, _ = expected_gradient(networks, config, rows, 4)
    # As a share of the gradient at the prior, noise and mean are small; over 200 batches the mean is below 1 %.
    assert error.norm() < 0.04 * at_prior.norm()
    assert mean.norm() < 0.06 * at_prior.norm()


@pytest.mark.slow
def test_at_the_fixed_point_the_weights_are_nearly_equal() -> None:
    config = make_config(entropy_coef=0.3, inverse_temperature=4.0, nfe=20, likelihood_steps=12, candidates=16)
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
@pytest.mark.parametrize(("objective", "sde"), OBJECTIVES)
def test_the_gradient_of_the_policys_loss_is_right(objective: str, sde: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(objective=objective, sde=sde, hidden_dims=(3,), entropy_coef=0.4, batch_size=4)
    networks = make_networks(config)
    freeze_path(monkeypatch, networks, config, 4)
    assert networks.policy is not None
    parameters = tuple(networks.policy.parameters())
    assert torch.autograd.gradcheck(lambda *_: policy_loss(networks, config, 4)[0], parameters)


@pytest.mark.parametrize(("objective", "sde"), OBJECTIVES)
def test_the_policys_loss_trains_only_the_policy(objective: str, sde: str) -> None:
    config = make_config(objective=objective, sde=sde, entropy_coef=0.4)
    networks = make_networks(config)
    policy_loss(networks, config, 16)[0].backward()
    moved = {name for name, p in networks.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in networks.named_parameters() if name.startswith("policy.")}


# Symmetries

AXIS_OF_ROWS = {  # of every field of the noise
    **dict.fromkeys(("next_x_0", "next_edit", "flow_x_0", "flow_t", "sde_x_0", "bandwidth", "accept", "head_x_0"), 0),
    **dict.fromkeys(("sde", "sample_x_0", "ascent_x_0"), 1),
    **dict.fromkeys(("match_x_0", "match_t"), 2),
    "edit": 0,
    "probes": None,
}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "sde"), OBJECTIVES)
@pytest.mark.parametrize("edited", [False, True])
@settings(max_examples=4)
@given(seed=st.integers(0, 1000))
def test_the_order_of_a_batch_changes_no_loss(objective: str, sde: str, edited: bool, seed: int) -> None:
    common: dict[str, Any] = {"objective": objective, "best_of": 2, "distill_coef": 1.0}
    if objective == "adjoint":
        common["sde"] = sde
    if edited:
        common |= {"method": "qam-edit", "solver": "midpoint", "confine": True, "edit_scale": 0.2}
    else:
        common |= {"mixture_weight": 0.25, "adaptive_mixture": True}
    config = make_config(**common)
    networks = make_networks(config, seed=3)
    batch, noise = make_batch(16, seed), make_noise(config, 16, seed)
    # The first four rows are those with Q-maximised chunks, and those on which the policy is reweighted.
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(4), 4 + generator.permutation(12)])
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
    config = make_config(candidates=8)
    networks, batch, noise = make_networks(config), make_batch(16), make_noise(config, 16)
    order = torch.tensor([1, 0, 4, 2, 7, 6, 5, 3])
    moved = noise._replace(
        sample_x_0=noise.sample_x_0[order], match_x_0=noise.match_x_0[:, order], match_t=noise.match_t[:, order]
    )
    plain, permuted = (compute_losses(networks, batch, n, config).metrics["policy_loss"] for n in (noise, moved))
    torch.testing.assert_close(permuted, plain, rtol=1e-12, atol=1e-12)


def test_probes_of_any_orthonormal_basis_give_the_same_loss() -> None:
    config = make_config(divergence_probes=10)
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
