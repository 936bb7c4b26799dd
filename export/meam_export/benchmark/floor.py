"""The floor: the time it takes merely to read the weights that one inference needs, once per solver step.

A flow of K steps multiplies by the same matrices K times: by the columns of the first layer that take x, by the hidden
layers and by the last one. The floor does only that, x <- x + (1/K) W_n ... W_1 x, without biases, activations or
observation. The weights do not fit into the second-level cache of most processors, so the floor is given in bytes read.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_export.benchmark.problem import Problem, linear_layers

__all__ = ["compile_kernel", "find_compiler", "record_floor", "weight_bytes"]

_COMPILERS = ("cc", "gcc", "clang")
_COMMON = ("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-shared", "-fPIC")
"""Lets the compiler reorder sums. Not -ffast-math: loading a library built with it makes the whole process flush
denormals."""

_FLAGS = (
    ("-march=native", "-mprefer-vector-width=512"),  # GCC prefers 256 bits where there are 512
    ("-march=native",),
    (),
)
"""Further compiler flags, tried in this order until the compiler accepts them."""

_INPUTS = 4


def weight_bytes(problem: Problem) -> int:
    """Bytes of float32 weights that one inference reads, counting every solver step."""
    sizes = [problem.spec.chunk_dim, *problem.setting.hidden_dims, problem.spec.chunk_dim]
    return 4 * problem.spec.integration.nfe * sum(rows * columns for rows, columns in pairwise(sizes))


def record_floor(problem: Problem, batch: int) -> dict[str, NDArray[Any]]:
    """Matrices `matrix.0`, `matrix.1`, ..., inputs, and float64 answers: the flow's, and the sum of all weights."""
    (first, _), *rest = linear_layers(problem.networks)
    act, steps = problem.spec.chunk_dim, problem.spec.integration.nfe
    matrices = [first[:, -act - 1 : -1], *(weight for weight, _ in rest)]
    noise = np.random.default_rng(0).standard_normal((_INPUTS, batch, act)).astype(np.float32)
    x = noise.astype(np.float64)
    for _ in range(steps):
        velocity = x
        for matrix in matrices:
            velocity = velocity @ matrix.astype(np.float64).T
        x = x + velocity / steps
    total = sum(matrix.sum(dtype=np.float64) for matrix in matrices)
    return {
        **{f"matrix.{i}": np.ascontiguousarray(matrix) for i, matrix in enumerate(matrices)},
        "steps": np.array(steps),
        "observation": np.zeros((_INPUTS, batch, 1), np.float32),
        "noise": noise,
        "expected": x,
        "scale": np.abs(x).max(),
        "total": np.full((_INPUTS, 1), total),
        "total_scale": np.array(sum(np.abs(matrix).sum() for matrix in matrices)),
    }


def find_compiler() -> str | None:
    """Path of a C compiler: the environment variable CC's, or one on the PATH; None if there is none."""
    names = (os.environ.get("CC", ""), *_COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compile_kernel(compiler: str, folder: Path) -> str | None:
    """Compile the C floor for this machine into a folder; returns None, or the compiler's error."""
    source, library = Path(__file__).with_name("floor_kernel.c"), folder / "floor_kernel.so"
    errors = ""
    for flags in _FLAGS:
        command = [compiler, *_COMMON, *flags, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        errors = done.stderr.strip() or f"exit code {done.returncode}"
    return errors.splitlines()[0]
