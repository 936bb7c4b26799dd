"""Exported policies on a GPU: the actions of PyTorch on the CPU, in every form. Run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meam_export import export_policy
from meam_policy import MeamPolicy
from meam_policy.diagnosis.verify import verify_policy
from meam_training import OfflineDataset, TrainConfig, train

pytestmark = pytest.mark.gpu

VARIANTS = ("k2", "k3-ab2", "rtc", "best-of-4", "fp16", "int8")
BATCHES = (1, 7, 64)


@pytest.fixture(scope="module", autouse=True)
def _needs_onnxruntime_for_cuda() -> None:
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime was not built for CUDA: install onnxruntime-gpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with all variants, as wide as the small one of the benchmarks."""
    generator = np.random.default_rng(0)
    ends = np.arange(400) % 20 == 19
    data = OfflineDataset.from_arrays(
        observations=generator.normal(size=(400, 29)),
        actions=generator.uniform(-1, 1, size=(400, 2)),
        rewards=generator.normal(size=400),
        next_observations=generator.normal(size=(400, 29)),
        terminations=np.zeros(400, bool),
        truncations=ends,
    )
    sizes: dict[str, Any] = {"hidden_dims": (256, 256), "critic_hidden_dims": (64, 64), "num_critics": 2}
    config = TrainConfig.preset("me-am", sizes, steps=30, chunk_size=5, batch_size=64, device="cpu")
    root = tmp_path_factory.mktemp("gpu")
    checkpoint = train(config, data, root / "run")
    export_policy(checkpoint, root / "policy", variants=VARIANTS)
    return root / "policy"


def inputs(policy: MeamPolicy, batch: int) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(batch)
    spec = policy.spec
    best_of = spec.integration.best_of
    noise = (batch, best_of, spec.chunk_dim) if best_of > 1 else (batch, spec.chunk_dim)
    return {
        "observation": generator.normal(size=(batch, spec.observation_dim)).astype(np.float32),
        "noise": generator.normal(size=noise).astype(np.float32),
    }


@pytest.mark.parametrize("variant", [None, *VARIANTS])
@pytest.mark.parametrize("fixed_batch", [None, 1, 16])
def test_a_policy_on_cuda_acts_as_on_the_cpu(folder: Path, variant: str | None, fixed_batch: int | None) -> None:
    on_cpu = MeamPolicy.from_pretrained(folder, variant=variant, device="cpu")
    on_gpu = MeamPolicy.from_pretrained(folder, variant=variant, device="cuda", fixed_batch=fixed_batch)
    assert on_gpu.provider == "CUDAExecutionProvider"
    tolerance = {"fp16": 2e-2, "int8": 5e-2}.get(variant or "", 1e-4)
    for batch in BATCHES:
        for _ in range(3):  # the first run of a fixed batch is captured, later ones are replayed
            given = inputs(on_cpu, batch)
            expected, found = (policy.session.run_all(**given) for policy in (on_cpu, on_gpu))
            error = np.abs(found["actions"] - expected["actions"]).max(axis=(1, 2))
            # Of two chunks with nearly the same value another one may be chosen.
            assert np.mean(error <= tolerance) >= (0.95 if variant == "best-of-4" else 1), error.max()


def test_tf32_is_off_unless_asked_for(folder: Path) -> None:
    errors = []
    given = inputs(MeamPolicy.from_pretrained(folder, device="cpu"), 64)
    exact = MeamPolicy.from_pretrained(folder, device="cpu").session.run_all(**given)["actions"]
    for tf32 in (False, True):
        policy = MeamPolicy.from_pretrained(folder, device="cuda", tf32=tf32)
        errors.append(np.abs(policy.session.run_all(**given)["actions"] - exact).max())
    assert errors[0] <= 1e-4 < errors[1] <= 0.1


def test_the_golden_actions_are_met_on_cuda(folder: Path) -> None:
    verify_policy(folder, device="cuda", calls=5)  # raises for a graph that fails
