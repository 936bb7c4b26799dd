"""Computes the policy's formula in JAX, compiled with its flow unrolled. Runs in a Python that has JAX.

It imports nothing from this project; its weights come from `problem.formula`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["make"]


def make(folder: Path, task: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """Load the weights, and return the policy: observation [batch, obs], noise [batch, act] -> actions [batch, act]."""
    jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    with np.load(folder / "formula.npz") as file:
        given = dict(file)
    times = [float(t) for t in given.pop("times")]
    last = max(int(name.split(".")[1]) for name in given if name.startswith("weight."))
    features = len(given["mean"])

    def gelu(x: Any) -> Any:
        return jax.nn.gelu(x, approximate=True)

    def formula(p: Mapping[str, Any], observation: Any, noise: Any) -> Any:
        first, bias = p["weight.0"], p["bias.0"]
        projected = ((observation - p["mean"]) / p["std"]) @ first[:, :features].T + bias
        x = noise
        for t in times:
            hidden = gelu(projected + t * first[:, -1] + x @ first[:, features:-1].T)
            for i in range(1, last):
                hidden = gelu(hidden @ p[f"weight.{i}"].T + p[f"bias.{i}"])
            x = x + (hidden @ p[f"weight.{last}"].T + p[f"bias.{last}"]) / len(times)
        actions = p["offset"] + p["scale"] * jnp.clip(x, -1, 1)
        return jnp.minimum(jnp.maximum(actions, p["low"]), p["high"])

    compiled, parameters = jax.jit(formula), jax.device_put(given)
    return lambda observation, noise: np.asarray(compiled(parameters, observation, noise))
