"""Compiled updates, in a process without the shape checks, which cannot be traced; and life without a compiler."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.compilation import WARM_UPS, CapturedUpdate, compiled
from meam_training.learning.learner import Learner
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.trust_region import TRUST_REGION_METRICS
from meam_training.trainer import make_spec

CPU = torch.device("cpu")
SHORT = {"nfe": 2, "likelihood_steps": 1, "ascent_steps": 1, "batch_size": 8, "pretrain_steps": 0}
CONSTANT = {"kl_budget": None}
SHALLOW = {"hidden_dims": (8,), "critic_hidden_dims": (8,)}
"""Every layer takes kernels of its own, and so does every step that carries gradients: less of both compiles faster."""
METHODS = {
    "two scale budget": ("me-am", {}, "inductor"),
    "reweighted": ("me-am", {"objective": "reweighted", "precondition": False}, "aot_eager"),
    "bridge": ("me-am", {**CONSTANT, "objective": "bridge", "layer_norm": True}, "aot_eager"),
    "ancestral": ("me-am", {"objective": "adjoint", "distill_coef": 1.0}, "aot_eager"),
    "target score": ("me-am", {**CONSTANT, "objective": "target_score", "best_of": 2}, "aot_eager"),
    "edit": ("qam-edit", {}, "aot_eager"),
    "published budget": ("trqam", {}, "aot_eager"),
}
"""Preset, settings, and the backend: "aot_eager" makes the same single graph of update and gradients, but takes
PyTorch's kernels instead of compiling new ones, most of a minute each.
"""

QUICKLY = {"AOT_INDUCTOR_DEBUG_COMPILE": "1", "TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Kernels that are neither optimised nor vectorised compile in a fraction of the time, and compute the same; a pool of
compiling processes only takes the core of the other tests.
"""


@pytest.mark.slow
def test_everything_marked_compiled_passes_without_shape_checks():
    tests = Path(__file__).parents[2]
    # Only these files: collecting all the others a second time takes longer than many a test.
    marked = [
        str(file) for file in sorted(tests.rglob("test_*.py")) if "@pytest.mark.compiled" in file.read_text("utf-8")
    ]
    options = ["-q", "-m", "compiled", "-p", "no:cacheprovider", "-p", "no:xdist", "--show-capture=no", "--timeout=0"]
    environment = {**os.environ, "MEAM_WITHOUT_SHAPE_CHECKS": "1", **QUICKLY}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *marked],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tests.parent,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def learner(make_config, dataset, preset, **settings):
    config = make_config(preset, {**SHORT, **SHALLOW}, **settings)
    spec = make_spec(config, dataset)
    return Learner(spec, config, CPU), DeviceChunks(config, dataset, spec, CPU)


@pytest.mark.compiled
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_update_is_an_eager_one_and_the_later_ones_follow_the_temperature(
    make_config, dataset, method, monkeypatch
):
    preset, settings, backend = METHODS[method]
    torch._dynamo.reset()  # one function may be compiled anew only so many times in a process
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    results = []
    for compile_ in (False, True):
        ours, chunks = learner(make_config, dataset, preset, compile=compile_, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            metrics = ours.update(chunks, 1)
        gradients = {name: p.grad for name, p in ours.networks.named_parameters() if p.grad is not None}
        region = []
        if ours.networks.trust_region is not None:
            later = [metrics, ours.update(chunks, 2), ours.update(chunks, 3)]
            region = [torch.stack([m[name] for m in later]) for name in TRUST_REGION_METRICS]
            assert later[1]["inverse_temperature"] != later[2]["inverse_temperature"]
        results.append((metrics, gradients, region))
    (eager, expected, followed), (found, gradients, region) = results
    torch.testing.assert_close(region, followed, rtol=1e-3, atol=1e-6)
    assert set(found) == set(eager)
    for name, value in eager.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max() + 1e-6
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * scale, name


@pytest.mark.compiled
def test_two_compiled_learners_do_not_share_their_weights(make_config, dataset, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    (first, chunks), (second, _) = (learner(make_config, dataset, "bc", compile=True, seed=seed) for seed in (1, 2))
    first.update(chunks, 1)
    before = [p.clone() for p in first.networks.parameters()]
    second.update(chunks, 1)
    assert all(torch.equal(p, q) for p, q in zip(first.networks.parameters(), before, strict=True))
    untouched = build_networks(make_spec(second.config, dataset), second.config)
    pairs = zip(second.networks.prior.parameters(), untouched.prior.parameters(), strict=True)
    assert not any(torch.equal(trained, first) for trained, first in pairs)


def test_without_a_compiler_the_function_runs_as_it_is_and_says_so_once(monkeypatch):
    def refuse(*args, **kwargs):
        raise BackendCompilerFailed("inductor", RuntimeError("No C++ compiler found"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    doubled = compiled(lambda x: 2 * x)
    with pytest.warns(RuntimeWarning, match=r"cannot be compiled here .*C\+\+ compiler.*compile=False"):
        assert doubled(torch.ones(1)) == 2
    assert doubled(torch.ones(1)) == 2  # a second warning would be an error


def test_a_mistake_in_the_function_itself_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def broken(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        compiled(broken)(torch.ones(1))


def test_a_graph_that_cannot_be_captured_leaves_the_work_as_it_is(monkeypatch):
    class Refusing:
        def register_generator_state(self, generator):
            raise RuntimeError("no such thing here")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    runs = []

    def work():
        runs.append(1)
        return {"loss": torch.tensor(float(len(runs)))}

    update = CapturedUpdate(work, torch.Generator())
    found = [update()["loss"].item() for _ in range(WARM_UPS)]
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph .*no such thing here"):
        found.append(update()["loss"].item())
    found.append(update()["loss"].item())
    assert found == [1, 2, 3, 4, 5]
