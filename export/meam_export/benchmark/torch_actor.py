"""Runs the policy in PyTorch, eagerly or compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meam_export.benchmark.problem import read_networks
from meam_policy.spec import PolicySpec
from meam_training.networks.policy_module import PolicyModule

__all__ = ["make"]

Array = NDArray[np.float32]


def make(folder: Path, task: Mapping[str, Any]) -> Callable[[Array, Array], Array]:
    """Load the networks, and return a function that runs the policy.

    Args:
        folder: Folder with the files of `problem.write_networks` and the policy spec.
        task: `spec`, the spec's file name; `device` and `threads`; and `form`: "eager" or "compile".
    """
    torch.set_num_threads(task["threads"])
    spec = PolicySpec.from_json((folder / task["spec"]).read_bytes())
    device = "cpu" if task["device"] == "cpu" else "cuda"
    module: Callable[..., torch.Tensor] = PolicyModule(read_networks(folder, spec), spec).eval().to(device)
    if task["form"] == "compile":
        mode = None if device == "cpu" else "reduce-overhead"
        module = torch.compile(module, dynamic=False, fullgraph=True, mode=mode)

    def act(observation: Array, noise: Array) -> Array:
        with torch.inference_mode():
            inputs = (torch.from_numpy(array).to(device) for array in (observation, noise))
            return module(*inputs).cpu().numpy()

    return act
