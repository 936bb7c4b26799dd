"""The contestants of `meam bench train`, and their process environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from meam_policy.errors import NotFoundError
from meam_training.benchmark.race import Contestant
from meam_training.benchmark.settings import PROGRAMS, SCANNED, Setting

__all__ = ["PRODUCTS", "REFERENCES", "Device", "check_reference", "make_contestants", "worker_environment"]

Device = Literal["cpu", "cuda"]

REFERENCES = {"reference": "update", "reference-scan": "scan"}
"""Contestants of the reference implementation, and the forms by which their worker knows them."""

PRODUCTS = {"float32": "float32 products", "bf16": "bf16 products"}
"""Contestants that measure the machine's throughput of matrix products, by precision."""

_PRODUCTS_PER_UPDATE = 4
"""Chosen so that their turns take about a third of the time of the others'."""


def make_contestants(
    setting: Setting,
    programs: Sequence[str],
    device: Device,
    threads: int,
    *,
    tf32: bool = False,
    reference: Path | None = None,
    reference_python: Path | None = None,
) -> list[Contestant]:
    """Make the contestants of a setting: this project's, the reference's, and the bare matrix products.

    Args:
        setting: Sizes of the problem and the networks.
        programs: Keys of `PROGRAMS`.
        device: Device of the updates.
        threads: CPU threads of each worker.
        tf32: Whether CUDA may round the inputs of float32 products to TF32.
        reference: Checkout of QAM's public code; None leaves the reference out.
        reference_python: Python interpreter that can run it; None takes this one.
    """
    common: dict[str, Any] = {"setting": asdict(setting), "device": device, "threads": threads, "tf32": tf32}

    def ours(module: str, **more: Any) -> tuple[str, ...]:
        return sys.executable, "-m", f"meam_training.benchmark.{module}", json.dumps({**common, **more})

    chosen = {name: PROGRAMS[name] for name in programs}
    contestants = [
        Contestant(
            name,
            ours("learner_worker", **program.update, precision=program.precision, compile=program.compile),
            "update",
            setting.updates,
        )
        for name, program in chosen.items()
    ]
    if reference is not None:
        script = str(Path(__file__).with_name("qam_reference.py"))
        python = str(reference_python or sys.executable)
        command = (python, script, str(reference.resolve()), json.dumps({**asdict(setting), "scanned": SCANNED}))
        contestants += [Contestant(name, command, form, setting.updates) for name, form in REFERENCES.items()]
    precisions = list(dict.fromkeys(program.precision for program in chosen.values()))
    updates = {program.label: program.update for program in chosen.values()}
    products = ours("matmul_worker", precisions=precisions, updates=updates)
    repetitions = _PRODUCTS_PER_UPDATE * setting.updates
    return contestants + [Contestant(PRODUCTS[form], products, form, repetitions) for form in precisions]


def check_reference(reference: Path, python: Path | None) -> None:
    """Check the reference's checkout and Python interpreter before anything is started.

    Raises:
        NotFoundError: the checkout or the interpreter does not exist.
    """
    if not (reference / "agents" / "qam.py").is_file():
        raise NotFoundError(
            f"{reference} has no agents/qam.py; expected a checkout of https://github.com/ColinQiyangLi/qam."
        )
    if python is not None and not os.access(python, os.X_OK):
        raise NotFoundError(
            f"{python} is not an executable; expected a Python interpreter that has jax, flax, optax and distrax."
        )


def worker_environment(device: Device, threads: int, *, tf32: bool = False) -> dict[str, str]:
    """Environment variables of the workers: the same number of threads and the same arithmetic for all."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "50",  # milliseconds that Intel's OpenMP spins after work; `race` pauses for longer
        "JAX_PLATFORMS": device,
        "JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32" if tf32 else "float32",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
