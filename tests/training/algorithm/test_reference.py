"""Number-for-number agreement with the public JAX implementation of QAM; see fixtures/README.md."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from meam_policy.spec import Integration
from meam_training.algorithm.adjoint_objective import terminal_adjoint
from meam_training.algorithm.batch import ChunkBatch, MeamNoise
from meam_training.algorithm.q_maximizer import pessimistic_value
from meam_training.algorithm.update import Losses, compute_losses, update_targets
from meam_training.flow.memoryless import (
    adjoint_matching_loss,
    lean_adjoint,
    memoryless_noise_scale,
    sample_memoryless_path,
)
from meam_training.flow.ode import integrate
from meam_training.flow.path import time_like
from meam_training.learning.compilation import compiled
from meam_training.learning.learner import clip_gradients

# Largest difference allowed, as a share of the array's largest number.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
NETWORKS = {"actor_slow": "prior", "actor_fast": "policy", "target_actor_slow": "target_prior"}
SETTINGS = {
    "hidden_dims": "actor_hidden",
    "critic_hidden_dims": "actor_hidden",
    "num_critics": "num_qs",
    "nfe": "flow_steps",
    "chunk_size": "horizon_length",
    "discount": "discount",
    "inverse_temperature": "inv_temp",
    "pessimism": "rho",
    "polyak": "tau",
    "learning_rate": "lr",
}
"""Our settings, and their names in the reference."""


@pytest.fixture(params=["base", "chunk"])
def name(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def case(request, name, reference_arrays, make_case):
    arrays = reference_arrays("qam_reference.npz", f"{name}/")
    return make_case(arrays, "qam", SETTINGS, request.param, TOLERANCES[request.param])


def total_loss(case) -> Losses:
    return compute_losses(case.networks, case.batch, case.noise, case.config)


def test_the_velocity_fields_agree(case):
    for theirs in ("actor_slow", "actor_fast", "target_actor_slow"):
        field = getattr(case.networks, NETWORKS[theirs])
        case.assert_same(field(case.features, case.input("probe_x"), case.input("probe_t")), f"vel/{theirs}")


def test_the_critics_agree(case):
    for name in ("critic", "target_critic"):
        case.assert_same(getattr(case.networks, name)(case.features, case.batch.actions), f"q/{name}")


def test_the_actions_of_the_ode_agree(case):
    policy = case.networks.policy.condition(case.features)
    actions = integrate(policy, case.input("gen_noise"), Integration(case.config.nfe)).clamp(-1, 1)
    case.assert_same(actions, "flow_actions/fast")


def test_the_parts_of_the_temporal_difference_target_agree(case):
    n, config = case.networks, case.config
    next_features = n.encoder(case.batch.next_observations)
    next_actions = integrate(n.policy.condition(next_features), case.noise.next_x_0, Integration(config.nfe)).clamp(
        -1, 1
    )
    case.assert_same(next_actions, "next_actions")
    case.assert_same(n.act(next_features, case.noise.next_x_0), "next_actions")
    values = n.target_critic(next_features, next_actions)
    case.assert_same(values, "next_qs")
    bootstrap = config.discount**config.chunk_size * case.batch.masks * pessimistic_value(values, config.pessimism)
    case.assert_same(case.batch.rewards + bootstrap, "target_q")


def test_the_path_its_adjoints_and_their_loss_agree(case):
    n, config = case.networks, case.config
    steps = config.nfe
    prior, policy = n.target_prior.condition(case.features), n.policy.condition(case.features)
    path = sample_memoryless_path(policy, prior, case.noise.sde_x_0, case.noise.sde)
    case.assert_same(path[:-1], "xs")
    case.assert_same(path[-1], "x_K")
    scales = torch.tensor([memoryless_noise_scale(k, steps) for k in range(steps)], dtype=case.dtype)
    case.assert_same(scales[:, None, None].expand(steps, len(path[0]), 1), "sigmas")
    terminal = terminal_adjoint(n, case.features, path[-1], config)
    case.assert_same(terminal, "adj_K")
    adjoints = lean_adjoint(prior, path, terminal)
    case.assert_same(adjoints, "adjs")
    times = torch.stack([time_like(path[0], k / steps) for k in range(steps)])
    case.assert_same(policy(path[:-1], times), "vf_fine")
    case.assert_same(prior(path[:-1], times), "vf_base")
    case.assert_same(adjoint_matching_loss(policy(path[:-1], times), prior(path[:-1], times), adjoints), "adj_loss")


def test_the_losses_agree(case):
    losses = total_loss(case)
    case.assert_same(losses.metrics["critic_loss"], "critic_loss")
    case.assert_same(losses.metrics["prior_loss"], "flow_loss")
    case.assert_same(losses.metrics["policy_loss"], "adj_loss")
    case.assert_same(losses.total, "total_loss")


def test_the_gradient_of_every_parameter_agrees(case):
    total_loss(case).total.backward()
    expected = case.weights("out/grad/")
    trained = {name: p for name, p in case.networks.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected)
    for name, parameter in trained.items():
        assert parameter.grad is not None
        case.assert_equals(parameter.grad, expected[name].numpy(), name)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
    case.assert_same(norm, "grad_global_norm")


@pytest.mark.parametrize("fused", [False, True])
def test_the_parameters_after_updates_agree(case, fused):
    trained = [p for p in case.networks.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=case.config.adam_rate, fused=fused)
    for update in (1, 2, 3):
        optimizer.zero_grad()
        total_loss(case).total.backward()
        clip_gradients(case.networks, case.config.gradient_clip, case.config.joint_clip)
        update_targets(case.networks, case.config.polyak)
        optimizer.step()
        if update == 2:
            continue
        expected = case.weights(f"out/params_after{update}/")
        ours = {k: v for k, v in case.networks.state_dict().items() if not k.startswith("encoder.")}
        assert set(ours) == set(expected)
        for name, parameter in ours.items():
            case.assert_equals(parameter, expected[name].numpy(), name)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["base"], indirect=True)  # chunks compile to the same code, but for more steps
@pytest.mark.parametrize("case", [torch.float32], indirect=True)
def test_compiled_losses_and_gradients_agree(case, monkeypatch):
    trained = {name: p for name, p in case.networks.named_parameters() if p.requires_grad}

    def gradients(batch: ChunkBatch, noise: MeamNoise) -> tuple[Tensor, ...]:
        total = compute_losses(case.networks, batch, noise, case.config).total
        return (total.detach(), *torch.autograd.grad(total, list(trained.values())))

    # PyTorch's kernels in one graph: compiling new ones for the reference's sizes takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    total, *found = compiled(gradients)(case.batch, case.noise)
    case.assert_same(total, "total_loss")
    expected = case.weights("out/grad/")
    for name, gradient in zip(trained, found, strict=True):
        case.assert_equals(gradient, expected[name].numpy(), name)
