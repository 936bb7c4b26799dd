"""Reads the weights of one inference and does as little else as possible; see `floor`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["make"]

Array = NDArray[np.float32]
PANEL = 128
"""Rows whose sums the C kernel keeps in registers."""

Act = Callable[[Array, Array], Any]


def make(folder: Path, task: Mapping[str, Any]) -> Act:
    """Load the matrices, and return a function that multiplies by them.

    Args:
        folder: Folder with the task's file `inputs`, which holds what `floor.record_floor` returned.
        task: `inputs`; `form`: "numpy", "torch", "sum" or "c"; `device` and `threads`.
    """
    with np.load(folder / task["inputs"]) as file:
        steps = int(file["steps"])
        matrices = [file[f"matrix.{i}"] for i in range(sum(name.startswith("matrix.") for name in file))]
    if task["form"] == "numpy":
        return _numpy(matrices, steps)
    if task["form"] == "c":
        return _c(matrices, steps, folder / "floor_kernel.so")
    return _torch(matrices, steps, task)


def _numpy(matrices: list[Array], steps: int) -> Act:
    share = np.float32(1 / steps)

    def act(_observation: Array, noise: Array) -> Array:
        x = noise
        for _ in range(steps):
            velocity = x
            for matrix in matrices:
                velocity = velocity @ matrix.T
            x = np.add(x, share * velocity, dtype=np.float32)
        return x

    return act


def _torch(matrices: list[Array], steps: int, task: Mapping[str, Any]) -> Act:
    import torch

    torch.set_num_threads(task["threads"])
    device = "cpu" if task["device"] == "cpu" else "cuda"
    weights = [torch.from_numpy(matrix).to(device) for matrix in matrices]
    everything = torch.cat([weight.flatten() for weight in weights])

    def flow(_observation: Array, noise: Array) -> Array:
        with torch.inference_mode():
            x = torch.from_numpy(noise).to(device).T  # [act, batch], so that a batch of one is a vector
            for _ in range(steps):
                velocity = x[:, 0] if x.shape[1] == 1 else x
                for weight in weights:
                    velocity = weight @ velocity
                x = x + velocity.reshape(x.shape) / steps
            return x.T.cpu().numpy()

    def total(_observation: Array, _noise: Array) -> float:
        with torch.inference_mode():
            return float(sum(everything.sum() for _ in range(steps))) / steps

    return total if task["form"] == "sum" else flow


def _c(matrices: list[Array], steps: int, library: Path) -> Act:
    kernel = ctypes.CDLL(str(library))
    sizes = [matrices[0].shape[1], *(len(matrix) for matrix in matrices)]
    weights = np.concatenate([_in_panels(matrix).ravel() for matrix in matrices])
    scratch = np.zeros(2 * max(sizes), np.float32)
    array, number = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS"), ctypes.c_size_t
    kernel.integrate.argtypes = (array, number * len(sizes), number, number, array, array, number)
    lengths = (number * len(sizes))(*sizes)

    def act(_observation: Array, noise: Array) -> Array:
        x = noise.copy()
        kernel.integrate(weights, lengths, len(matrices), steps, x, scratch, max(sizes))
        return x

    return act


def _in_panels(matrix: Array) -> Array:
    """A matrix [out, in] in the C kernel's layout: column-major panels of rows if `out` is a multiple of PANEL."""
    rows, columns = matrix.shape
    return matrix if rows % PANEL else matrix.reshape(-1, PANEL, columns).transpose(0, 2, 1)
