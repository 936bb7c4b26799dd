"""Does the ONNX graph compute what the PyTorch policy computes?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from meam_export.graph import PolicyModule
from meam_policy.errors import ParityError
from meam_policy.session import PolicySession
from meam_policy.spec import PolicySpec

__all__ = ["ParityReport", "check_parity", "random_inputs"]

TOLERANCE = 1e-4
"""Largest accepted difference, as a share of the action's half width."""


@dataclass(frozen=True)
class ParityReport:
    """Differences between onnxruntime and PyTorch.

    Attributes:
        inputs: Number of random inputs compared.
        max_error: Largest difference, as a share of the action's half width.
    """

    inputs: int
    max_error: float


def random_inputs(spec: PolicySpec, count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Raw observations [count, obs] as wide as three times the training data, and noise [count, act]."""
    generator = np.random.default_rng(seed)
    spread = 3 * generator.standard_normal((count, spec.observation_dim))
    observations = np.array(spec.observation_mean) + np.array(spec.observation_std) * spread
    return observations.astype(np.float32), generator.standard_normal((count, spec.noise_dim), dtype=np.float32)


def check_parity(graph: bytes, module: PolicyModule, spec: PolicySpec, count: int = 256) -> ParityReport:
    """Run the graph in onnxruntime on random inputs, one by one and as a batch, against PyTorch in float32.

    Args:
        graph: The bytes of `policy.onnx`.
        module: The policy in PyTorch.
        spec: What the graph must look like.
        count: Random inputs.

    Raises:
        ParityError: a difference is above the tolerance, or a value is not finite.
        FormatError: onnxruntime cannot load the graph, or its inputs and outputs are not the format's.
    """
    session = PolicySession(graph, spec)
    observations, noise = random_inputs(spec, count, seed=0)
    with torch.no_grad():
        expected = module(torch.from_numpy(observations), torch.from_numpy(noise)).numpy()
    batched = session.run(observations, noise)
    singles = [session.run(observations[i : i + 1], noise[i : i + 1]) for i in range(min(count, 16))]
    scale = np.array(spec.action_scale)
    errors = [np.abs(batched - expected) / scale, np.abs(np.concatenate(singles) - expected[: len(singles)]) / scale]
    worst = max(float(error.max()) for error in errors)
    if not worst <= TOLERANCE:  # also catches NaN
        raise ParityError(
            f"policy.onnx differs from the checkpoint by {worst:.2g} of the action's half width; expected at most "
            f"{TOLERANCE:g}. Nothing was written; please report this with the versions of torch and onnxruntime."
        )
    return ParityReport(count, worst)
