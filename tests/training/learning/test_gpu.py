"""Training on a GPU: the same numbers as on the CPU, captured updates, and exact resume. Run by `make gpu-check`."""

from __future__ import annotations

import math
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from meam_training import train
from meam_training.algorithm.batch import ChunkBatch, MeamNoise, draw_noise
from meam_training.algorithm.update import compute_losses
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.learner import Learner
from meam_training.networks.meam_networks import build_networks
from meam_training.trainer import make_spec

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
METHODS = {
    "bc": ("bc", {}),
    "qam": ("qam", {}),
    "qam-edit": ("qam-edit", {}),
    "trqam": ("trqam", {}),
    "two scale": ("me-am", {}),
    "two scale, one temperature": ("me-am", {"kl_budget": None}),
    "reweighted": ("me-am", {"objective": "reweighted"}),
    "ancestral, distilled": ("me-am", {"objective": "adjoint", "distill_coef": 1.0}),
    "target score": ("me-am", {"objective": "target_score"}),
}
ILL_CONDITIONED = {"target score": 0.02}
"""Largest difference of a gradient, as a share of its largest component; elsewhere 0.001. A score near t = 1 divides
rounding errors by 1 - t."""


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_the_cpu(make_config, dataset, method):
    preset, settings = METHODS[method]
    config = make_config(preset, {"pretrain_steps": 0}, **settings)
    spec = make_spec(config, dataset)
    generator = torch.Generator().manual_seed(1)
    batch = DeviceChunks(config, dataset, spec, CPU).sample(config.batch_size, generator)
    noise = draw_noise(config.batch_size, batch.actions.shape[1], config, generator, CPU)
    torch.manual_seed(0)
    networks = build_networks(spec, config)
    found = []
    for device in (CPU, CUDA):
        networks = networks.to(device)
        here = ChunkBatch(*(rows.to(device) for rows in batch)), MeamNoise(*(rows.to(device) for rows in noise))
        losses = compute_losses(networks, *here, config, False)
        trained = [p for p in networks.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.total, trained, allow_unused=True)
        found.append((losses.total.item(), [None if g is None else g.cpu() for g in gradients]))
    (total, expected), (on_gpu, gradients) = found
    assert math.isclose(total, on_gpu, rel_tol=1e-3, abs_tol=1e-5)
    largest = max(g.abs().max().item() for g in expected if g is not None)
    for one, other in zip(expected, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert other is not None
            share = ILL_CONDITIONED.get(method, 1e-3)
            assert (one - other).abs().max() <= share * one.abs().max() + 1e-5 * largest


def weights_after(make_config, dataset, updates: int, **settings) -> list[torch.Tensor]:
    config = make_config(settings.pop("preset"), device="cuda", **settings)
    spec = make_spec(config, dataset)
    learner, chunks = Learner(spec, config, CUDA), DeviceChunks(config, dataset, spec, CUDA)
    for step in range(1, updates + 1):
        learner.update(chunks, step)
    return [p.detach().cpu().clone() for p in learner.networks.parameters()]


@pytest.mark.parametrize("preset", ["qam", "me-am"])
def test_captured_updates_are_uncompiled_ones_with_new_noise_each_time(make_config, dataset, preset):
    """Five updates in each of the two stages: three to warm up, the captured one, and a replay."""
    settings = {"preset": preset, "pretrain_steps": 5, "learning_rate": 1e-4}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # a failed compilation or capture is only a warning
        eager, captured = (weights_after(make_config, dataset, 10, compile=c, **settings) for c in (False, True))
        start = weights_after(make_config, dataset, 0, compile=False, **settings)
    moved = max((one - other).abs().max().item() for one, other in zip(start, eager, strict=True))
    apart = max((one - other).abs().max().item() for one, other in zip(eager, captured, strict=True))
    assert moved >= 5e-4
    assert apart <= 0.05 * moved  # Adam divides by tiny second moments, which magnifies rounding


def test_an_update_in_bf16_goes_where_that_in_float32_goes(make_config, dataset):
    settings = {"preset": "qam", "pretrain_steps": 0, "compile": True, "hidden_dims": (64, 64)}
    start, single, half = (
        torch.cat([w.flatten() for w in weights_after(make_config, dataset, steps, precision=precision, **settings)])
        for steps, precision in ((0, "float32"), (8, "float32"), (8, "bf16"))
    )
    assert torch.cosine_similarity(single - start, half - start, dim=0) > 0.9


@pytest.mark.parametrize("compiled", [False, True])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(make_config, dataset, tmp_path, compiled):
    config = make_config("me-am", device="cuda", compile=compiled, steps=14, pretrain_steps=4, checkpoint_every=7)
    whole = train(config, dataset, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000014")
    resumed = train(config, dataset, tmp_path / "cut", resume=True)
    one, other = (load_file(checkpoint.path / "model.safetensors") for checkpoint in (whole, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
