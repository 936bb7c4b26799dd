"""Warm-up of a policy while it is loaded, so that its first tick is no slower than the others."""

from __future__ import annotations

import contextlib

import numpy as np

from meam_policy.acting.chunk_execution import ChunkExecution, Infer
from meam_policy.acting.health import Health
from meam_policy.acting.observation import flatten_observation, unflatten_observation
from meam_policy.acting.safety import SafetySettings, SafetyShell
from meam_policy.errors import MeamError
from meam_policy.spec import PolicySpec

__all__ = ["rehearse"]


def rehearse(spec: PolicySpec, infer: Infer) -> None:
    """Act once on the mean observation, with separate counters, noise and queues.

    Libraries import modules, and onnxruntime allocates buffers, when they are first used: that must not delay the first
    tick of a control loop. What fails is ignored, since acting reports it for the observation that it fails at.

    Args:
        spec: The policy's spec.
        infer: Computes its chunks without changing its counters.
    """
    execution = ChunkExecution(spec, SafetyShell(spec, SafetySettings(), Health()))
    execution.noise.reseed(0)
    with contextlib.suppress(MeamError):
        mean = np.array(spec.observation_mean) + np.array(spec.observation_offset or 0.0)
        rows, _ = flatten_observation(spec, unflatten_observation(spec, mean))
        execution.act(rows, infer)
