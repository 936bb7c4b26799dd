"""Computes the policy's formula in NumPy; its weights come from `problem.formula`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gelu", "make"]

Array = NDArray[np.float32]


def gelu(x: Array) -> Array:
    """The tanh approximation of GELU."""
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * (x * x * x))))


def make(folder: Path, task: Mapping[str, Any]) -> Callable[[Array, Array], Array]:
    """Load the weights, and return the policy: observation [batch, obs], noise [batch, act] -> actions [batch, act]."""
    with np.load(folder / "formula.npz") as file:
        p = dict(file)
    steps = len(p["times"])
    last = max(int(name.split(".")[1]) for name in p if name.startswith("weight."))
    w_s, w_x, w_t = np.split(p["weight.0"], [len(p["mean"]), -1], axis=1)
    biases = [p["bias.0"] + t * w_t[:, 0] for t in p["times"]]

    def act(observation: Array, noise: Array) -> Array:
        projected = ((observation - p["mean"]) / p["std"]) @ w_s.T
        x = noise
        for bias in biases:
            hidden = gelu(projected + bias + x @ w_x.T)
            for i in range(1, last):
                hidden = gelu(hidden @ p[f"weight.{i}"].T + p[f"bias.{i}"])
            x = x + (hidden @ p[f"weight.{last}"].T + p[f"bias.{last}"]) / np.float32(steps)
        actions = p["offset"] + p["scale"] * np.clip(x, -1, 1)
        return np.minimum(np.maximum(actions, p["low"]), p["high"])

    return act
