"""Whether compiling the updates of a run pays, and whether a compiler is there."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from meam_training.config import TrainConfig

__all__ = ["LONG_RUN", "missing_for_compiling", "pays_to_compile"]

LONG_RUN = 10_000
"""Updates from which compiling, about a minute on two cores, saves more than it takes; see `benchmarks/training`."""


def pays_to_compile(config: TrainConfig) -> bool:
    """Whether a run is so long that it ends sooner compiled. Updates of `bc` are small, and gain little."""
    return config.trains_policy and config.steps + config.online_steps >= LONG_RUN


def missing_for_compiling(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, with what to do about it; None if nothing is known to be missing."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "Triton is missing; PyTorch's CUDA wheels for Linux bring it along"
    chosen = os.environ.get("CXX", "").split()  # it may have arguments, or be run by another, such as ccache
    compilers = chosen[:1] or ["g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return f"{' and '.join(compilers)} {'is' if len(compilers) == 1 else 'are'} missing; on Debian: apt install g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python.h is missing; on Debian: apt install python3-dev"
    return None
