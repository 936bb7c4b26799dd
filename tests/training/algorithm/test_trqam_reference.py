"""Number-for-number agreement with the public JAX implementation of TRQAM; see fixtures/README.md."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from meam_training.algorithm import adjoint_objective
from meam_training.algorithm.adjoint_objective import terminal_parts
from meam_training.algorithm.q_maximizer import pessimistic_value
from meam_training.algorithm.update import Losses, compute_losses, pretraining_losses, update_targets
from meam_training.flow.memoryless import (
    adjoint_matching_loss,
    lean_adjoint,
    memoryless_kl,
    memoryless_noise_scale,
    sample_memoryless_path,
)
from meam_training.flow.path import time_like
from meam_training.learning.learner import clip_gradients
from meam_training.networks.trust_region import mean_kl, reference_dual_step

TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-6}  # both implementations round in float32
SETTINGS = {
    "hidden_dims": "actor_hidden_dims",
    "critic_hidden_dims": "value_hidden_dims",
    "layer_norm": "actor_layer_norm",
    "num_critics": "num_qs",
    "nfe": "flow_steps",
    "chunk_size": "horizon_length",
    "discount": "discount",
    "kl_budget": "kl_budget",
    "pessimism": "rho",
    "polyak": "tau",
    "learning_rate": "lr",
}
"""Our settings, and their names in the reference."""


def gradient_where_it_is(n, features, x_1, config) -> Tensor:
    """The terminal condition with the critics' gradient at the action itself, not at the clipped one."""
    with torch.enable_grad():
        x = x_1.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(n.values(features, x).mean(dim=0).sum(), x)
    return -gradient[None]


@pytest.fixture(params=["chunk", "norm"])
def name(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def case(request, name, reference_arrays, make_case, monkeypatch):
    dtype = request.param
    found = {torch.float64: "f64", torch.float32: "f32"}[dtype]
    arrays = reference_arrays("trqam_reference.npz", f"f32/{name}/") | reference_arrays(
        "trqam_reference.npz", f"{found}/{name}/"
    )
    case = make_case(arrays, "trqam", SETTINGS, dtype, TOLERANCES[dtype])
    if not case.meta["clip_adj"]:  # an option of the reference; ours always clips
        monkeypatch.setattr(adjoint_objective, "terminal_parts", gradient_where_it_is)
    start(case)
    return case


def start(case) -> None:
    region, meta = case.networks.trust_region, case.meta
    region.unit = meta["lam_scale"]
    region.nu.fill_(meta["lam0"])
    region.kl_average.fill_(meta["kl_ema0"])


def losses(case) -> Losses:
    return compute_losses(case.networks, case.batch, case.noise, case.config)


def test_the_networks_agree(case):
    names = {"actor_slow": "prior", "actor_fast": "policy", "target_actor_slow": "target_prior"}
    for theirs, ours in names.items():
        velocity = getattr(case.networks, ours)(case.features, case.noise.flow_x_0, case.noise.flow_t)
        case.assert_same(velocity, f"vel/{theirs}")
    for critic in ("critic", "target_critic"):
        case.assert_same(getattr(case.networks, critic)(case.features, case.batch.actions), f"q/{critic}")


def test_the_parts_of_the_temporal_difference_target_agree(case):
    n, config = case.networks, case.config
    features = n.encoder(case.batch.next_observations)
    actions = n.act(features, case.noise.next_x_0)
    values = n.target_critic(features, actions)
    case.assert_same(actions, "next_actions")
    case.assert_same(values, "next_qs")
    next_value = pessimistic_value(values, config.pessimism)
    case.assert_same(next_value, "next_q")
    bootstrap = config.discount**config.chunk_size * case.batch.masks * next_value
    case.assert_same(case.batch.rewards + bootstrap, "target_q")


def test_the_path_its_adjoints_and_its_kl_divergence_agree(case):
    n, steps = case.networks, case.config.nfe
    prior, policy = n.target_prior.condition(case.features), n.policy.condition(case.features)
    path = sample_memoryless_path(policy, prior, case.noise.sde_x_0, case.noise.sde)
    case.assert_same(path[:-1], "xs")
    case.assert_same(path[-1], "x_K")
    scales = torch.tensor([memoryless_noise_scale(k, steps) for k in range(steps)], dtype=case.dtype)
    case.assert_same(scales[:, None, None].expand(steps, len(path[0]), 1), "g")
    mu = n.trust_region.mu
    case.assert_same(mu, "lambda_effective")
    case.assert_same(1 / mu.sqrt(), "sigma_scale")
    # Looked up in the module, where the fixture replaces it.
    terminal = adjoint_objective.terminal_parts(n, case.features, path[-1], case.config)[0]
    case.assert_same(terminal, "adj_K")
    adjoints = lean_adjoint(prior, path, terminal)
    case.assert_same(adjoints, "adjs")
    times = torch.stack([time_like(path[0], k / steps) for k in range(steps)])
    of_policy, of_prior = policy(path[:-1], times), prior(path[:-1], times)
    case.assert_same(of_policy, "vf_fine")
    case.assert_same(of_prior, "vf_base")
    kl = memoryless_kl(of_policy, of_prior)
    case.assert_same(kl, "kl_steps")
    case.assert_same(kl.sum(dim=0) / case.config.chunk_size, "kl_rows")
    # The published loss is QAM's at the inverse temperature 1 / mu, times mu.
    case.assert_same(mu * adjoint_matching_loss(of_policy, of_prior, adjoints / mu), "adj_loss")


def test_the_losses_and_the_estimate_agree(case):
    found = losses(case)
    for ours, theirs in {
        "critic_loss": "critic_loss",
        "prior_loss": "flow_loss",
        "policy_loss": "adj_loss",
        "path_kl": "path_kl",
    }.items():
        case.assert_same(found.metrics[ours], theirs)
    case.assert_same(found.total, "total_loss")
    case.assert_same(pretraining_losses(case.networks, case.batch, case.noise, critics=False).total, "bc_total_loss")


def test_the_estimate_counts_rows_that_are_not_valid(case):
    expected = losses(case).metrics["path_kl"]
    batch = case.batch._replace(valid=torch.zeros_like(case.batch.valid))
    assert torch.equal(compute_losses(case.networks, batch, case.noise, case.config).metrics["path_kl"], expected)


def test_the_gradient_of_every_parameter_agrees(case):
    losses(case).total.backward()
    expected = case.weights("out/grad/")
    trained = {name: p for name, p in case.networks.named_parameters() if p.requires_grad}
    assert trained.keys() == {key for key in expected if not key.startswith("target_")}
    for name, parameter in trained.items():
        assert parameter.grad is not None
        case.assert_equals(parameter.grad, expected[name].numpy(), name)
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained.values() if p.grad is not None])
    case.assert_same(norm, "grad_global_norm")


def test_the_dual_step_agrees(case):
    lam, average, kl = torch.tensor(case.arrays["in/dual_grid"], dtype=case.dtype).unbind(dim=1)
    average = mean_kl(average, kl, case.config.kl_budget)
    lam = reference_dual_step(lam, average, case.config.kl_budget)
    case.assert_same(torch.stack([lam, average], dim=1), "dual_grid")


def test_three_updates_agree(case):
    n, config = case.networks, case.config
    trained = [p for p in n.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.adam_rate, fused=True)
    held = {"lambda_path": [n.trust_region.nu.clone()], "kl_ema_path": [n.trust_region.kl_average.clone()]}
    found: dict[str, list[Tensor]] = {"path_kl_steps": [], "total_loss_steps": []}
    for update in (1, 2, 3):
        optimizer.zero_grad()
        total, metrics = losses(case)
        total.backward()
        clip_gradients(n, config.gradient_clip, config.joint_clip)
        update_targets(n, config.polyak)
        optimizer.step()
        n.trust_region.step(metrics["path_kl"], metrics["unit_cost"], torch.tensor(True))
        held["lambda_path"].append(n.trust_region.nu.clone())
        held["kl_ema_path"].append(n.trust_region.kl_average.clone())
        found["path_kl_steps"].append(metrics["path_kl"])
        found["total_loss_steps"].append(total)
        for name, expected in case.weights(f"out/params_after{update}/").items():
            case.assert_equals(n.state_dict()[name], expected.numpy(), f"{name} after {update}")
    for name, values in (held | found).items():
        case.assert_same(torch.stack(values), name)


def test_there_are_weights_to_compare_after_updates(reference_arrays):
    for prefix, updates in (("f64/chunk/out/", (1, 3)), ("f32/chunk/out/", (3,))):
        arrays = reference_arrays("trqam_reference.npz", prefix)
        for update in updates:
            assert any(key.startswith(f"params_after{update}/modules_actor_fast") for key in arrays)


def test_only_where_an_action_is_outside_the_box_does_clipping_matter(case):
    path = sample_memoryless_path(
        case.networks.policy.condition(case.features),
        case.networks.target_prior.condition(case.features),
        case.noise.sde_x_0,
        case.noise.sde,
    )
    clipped = terminal_parts(case.networks, case.features, path[-1], case.config)[0]
    plain = gradient_where_it_is(case.networks, case.features, path[-1], case.config)[0]
    inside = (path[-1].abs() <= 1).all(dim=1)
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(clipped[inside], plain[inside])
    assert not torch.allclose(clipped[~inside], plain[~inside])
