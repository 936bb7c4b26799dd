"""One update: what a precision changes, and what a bad update leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from meam_policy.errors import DivergedError
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.learner import Learner
from meam_training.networks.critic_ensemble import CriticEnsemble
from meam_training.networks.velocity_field import VelocityField
from meam_training.trainer import make_spec, train

CPU = torch.device("cpu")
METHODS = {"qam": {}, "me-am": {}, "bc": {}, "qam-edit": {}}


def learner_of(config, dataset):
    spec = make_spec(config, dataset)
    return Learner(spec, config, CPU), DeviceChunks(config, dataset, spec, CPU)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_gradients_point_where_float32_gradients_do(make_config, dataset, method):
    critics = {} if method == "bc" else {"critic_hidden_dims": (64, 64, 64)}
    config = make_config(method, hidden_dims=(64, 64, 64), batch_size=64, **critics)
    flat = []
    for precision in ("float32", "bf16"):
        learner, chunks = learner_of(dataclasses.replace(config, precision=precision), dataset)
        metrics = learner.update(chunks, 1)
        assert all(p.dtype == torch.float32 for p in learner.networks.parameters())
        assert metrics["gradient_norm"].dtype == torch.float32
        flat.append(
            {
                name: torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None])
                for name, part in learner.networks.named_children()
                if any(p.grad is not None for p in part.parameters())
            }
        )
    exact, rounded = flat
    assert set(exact) == set(rounded)
    for name in exact:
        assert torch.cosine_similarity(exact[name], rounded[name], dim=0) > 0.99, name
        assert not torch.equal(exact[name], rounded[name]), f"{name} was not computed in bf16"
        assert rounded[name].norm().item() == pytest.approx(exact[name].norm().item(), rel=0.1), name


def test_bf16_outputs_are_not_rounded_to_bf16():
    torch.manual_seed(0)
    velocity = VelocityField(3, 2, (32, 32), "bf16")
    critic = CriticEnsemble(3, 2, (32, 32), 2, "bf16")
    features, actions, t = torch.randn(64, 3), torch.randn(64, 2), torch.rand(64, 1)
    for output in (velocity(features, actions, t), critic(features, actions)):
        assert output.dtype == torch.float32
        assert not torch.equal(output, output.bfloat16().float())


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", [(1, 4), (5, 4)])
def test_the_derivative_of_a_velocity_field_is_that_of_automatic_differentiation(shape, normalised):
    torch.manual_seed(0)
    network = VelocityField(3, 2, (16, 16, 16), layer_norm=normalised).double()
    for norm in network.norms:
        torch.nn.init.normal_(norm.weight)  # pyright: ignore[reportArgumentType]
    field = network.condition(torch.randn(4, 3, dtype=torch.float64))
    x, t = torch.randn(*shape, 2, dtype=torch.float64), torch.rand(*shape, 1, dtype=torch.float64)
    velocity, jacobian = field.linearize(x, t)
    torch.testing.assert_close(velocity, field(x, t).detach(), rtol=1e-12, atol=1e-12)
    vectors = torch.randn(3, 2, dtype=torch.float64)
    for vector, product in zip(vectors, jacobian.product(vectors), strict=True):
        expected = torch.func.jvp(lambda x: field(x, t), (x,), (vector.expand_as(x),))[1]
        torch.testing.assert_close(product, expected.detach(), rtol=1e-10, atol=1e-12)
    covector = torch.randn(*shape, 2, dtype=torch.float64)
    both = torch.stack([covector[0], -2 * covector[0]])
    single = jacobian.transposed_product(0, covector[0])
    torch.testing.assert_close(jacobian.transposed_product(0, both), torch.stack([single, -2 * single]))
    inputs = x.requires_grad_()
    (expected,) = torch.autograd.grad(field(inputs, t), inputs, covector)
    for index in range(shape[0]):
        found = jacobian.transposed_product(index, covector[index])
        torch.testing.assert_close(found, expected[index], rtol=1e-10, atol=1e-12)


def test_the_policy_trained_in_bf16_is_deployed_in_float32(make_config, dataset, tmp_path):
    checkpoint = train(make_config("me-am", precision="bf16", steps=2), dataset, tmp_path)
    networks = checkpoint.load_networks()
    assert checkpoint.config.precision == "bf16"
    assert networks.prior.precision == networks.critic.precision == "float32"


def test_an_update_that_diverges_leaves_what_is_trained_as_it_was(make_config, dataset):
    learner, chunks = learner_of(make_config(pretrain_steps=0, inverse_temperature=1e38, objective="adjoint"), dataset)
    before = {name: p.clone() for name, p in learner.networks.named_parameters() if p.requires_grad}
    with pytest.raises(DivergedError, match="update 1 "):
        learner.update(chunks, 1)
    for name, parameter in learner.networks.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, before[name]), name


def test_within_in_float32_nothing_is_computed_in_bf16(make_config, dataset):
    learner, _ = learner_of(make_config("me-am", precision="bf16"), dataset)
    networks = learner.networks
    with networks.in_float32():
        assert networks.prior.precision == networks.target_critic.precision == "float32"
    assert networks.prior.precision == networks.target_critic.precision == "bf16"


def test_a_generator_of_another_kind_of_device_is_seeded_anew(make_config, dataset, tmp_path):
    checkpoint = train(make_config("bc", steps=2), dataset, tmp_path)
    file = checkpoint.path / "trainer.safetensors"
    save_file({**load_file(file), "generator": torch.zeros(16, dtype=torch.uint8)}, file)  # CUDA's are of 16 bytes
    (checkpoint.path / "hashes.json").unlink()
    resumed = train(make_config("bc", steps=4), dataset, tmp_path, resume=True)
    assert resumed.step == 4


@pytest.mark.parametrize(
    ("settings", "pretrained"),
    [({}, 37), ({"pretrain_critics": False}, 0), ({"pretrain_steps": 20}, 20), ({"batch_size": 60}, 10)],
)
def test_critics_see_the_data_five_times_in_pretraining(make_config, dataset, settings, pretrained):
    learner, chunks = learner_of(make_config(**{"steps": 60, "pretrain_steps": 40, **settings}), dataset)
    assert len(chunks) == 120
    told = ["critic_loss" in learner.update(chunks, step) for step in range(1, learner.config.pretraining + 1)]
    assert told == [True] * pretrained + [False] * (learner.config.pretraining - pretrained)
    # All targets start from what was learned.
    for critic, target in zip(
        learner.networks.critic.parameters(), learner.networks.target_critic.parameters(), strict=True
    ):
        assert torch.equal(critic, target)
