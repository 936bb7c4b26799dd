"""The contestants of `meam bench infer`: the files they load, and the commands that start them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meam_export.benchmark.floor import compile_kernel, find_compiler, record_floor
from meam_export.benchmark.problem import Problem, formula, formula_obstacle, record, write_networks
from meam_export.benchmark.settings import ENTRANTS, GPU_ENTRANTS, Entrant
from meam_export.benchmark.traced import traced_graph
from meam_export.graph.policy_graph import build_graph
from meam_policy.errors import DeviceError
from meam_policy.inference.providers import Device, provider_list
from meam_policy.spec import Integration, PolicySpec
from meam_training.benchmark import Contestant, worker_environment
from meam_training.networks.policy_module import PolicyModule

__all__ = ["Conditions", "check_device", "entrants", "environment", "obstacle", "prepare"]


@dataclass(frozen=True)
class Conditions:
    """Conditions that all contestants share.

    Attributes:
        device: Device they act on.
        threads: CPU threads of each contestant; on the CPU also the number of cores they share.
        calls: Back-to-back timed calls per turn.
        rate: Ticks per second of the paced calls (a quarter as many as `calls`); 0 to skip them.
        jax_python: Python interpreter that has JAX; None for this one.
    """

    device: Device = "cpu"
    threads: int = 1
    calls: int = 200
    rate: float = 50.0
    jax_python: Path | None = None


def entrants(device: Device) -> Mapping[str, Entrant]:
    """All entrants that can act on a device, by name."""
    return ENTRANTS if device == "cpu" else GPU_ENTRANTS


def check_device(device: Device) -> None:
    """Refuse a device that onnxruntime or PyTorch cannot use, before anything is started.

    Raises:
        DeviceError: onnxruntime or PyTorch cannot use it.
    """
    provider_list(device, fixed_batch=False, tf32=False)
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(
            f'device="{device}", but this PyTorch ({torch.__version__}) sees no GPU. Install a build of torch for '
            'CUDA, or use device="cpu".'
        )


def environment(conditions: Conditions) -> dict[str, str]:
    """Environment variables of the workers, which give every contestant the same number of threads."""
    kind, threads = "cpu" if conditions.device == "cpu" else "cuda", conditions.threads
    libraries = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**worker_environment(kind, threads), **libraries}


def obstacle(entrant: Entrant, problem: Problem, conditions: Conditions) -> str | None:
    """Why an entrant cannot take part; None if no reason is known."""
    if entrant.actor in ("numpy", "jax") and (reason := formula_obstacle(problem)):
        return reason
    if entrant.actor == "jax" and conditions.jax_python is None and importlib.util.find_spec("jax") is None:
        return "JAX is not installed here; name a Python that has it with --jax-python"
    if entrant.best_of > 1 and problem.networks.policy is None:
        return f"a {problem.spec.method} policy has no critics to choose by"
    if entrant.form == "c" and problem.setting.batch > 1:
        return "the C floor multiplies by vectors: batch 1"
    if entrant.form == "c" and find_compiler() is None:
        return "no C compiler: neither cc, gcc nor clang is on the PATH, and CC names none"
    return None


def prepare(
    problem: Problem, names: Sequence[str], conditions: Conditions, folder: Path
) -> tuple[list[Contestant], dict[str, str]]:
    """Write the files of all entrants that can take part.

    Args:
        problem: The policy.
        names: Names of entrants that can act on the device.
        conditions: Conditions of the race.
        folder: Empty folder to write to.

    Returns:
        The contestants, and for every other name the reason why it cannot take part.
    """
    found = {name: entrants(conditions.device)[name] for name in names}
    skipped = {name: reason for name, e in found.items() if (reason := obstacle(e, problem, conditions))}
    if any(e.form == "c" for name, e in found.items() if name not in skipped):
        failure = compile_kernel(find_compiler() or "", folder)
        skipped |= {name: f"the C compiler failed: {failure}" for name, e in found.items() if e.form == "c" and failure}
    running = {name: e for name, e in found.items() if name not in skipped}
    _write_common(problem, running, folder)
    contestants = []
    for name, entrant in running.items():
        task = _write(problem, entrant, folder) | _task(entrant, problem, conditions, folder)
        contestants.append(Contestant(name, _command(task, conditions), "steady", conditions.calls))
    return contestants, skipped


def _command(task: Mapping[str, Any], conditions: Conditions) -> tuple[str, ...]:
    own_python = task["actor"] == "jax" and conditions.jax_python is not None
    python = conditions.jax_python if own_python else sys.executable
    return str(python), str(Path(__file__).with_name("worker.py")), json.dumps(task)


def _task(entrant: Entrant, problem: Problem, conditions: Conditions, folder: Path) -> dict[str, Any]:
    return {
        "actor": entrant.actor,
        "form": entrant.form,
        "folder": str(folder),
        "batch": problem.setting.batch,
        "device": conditions.device,
        "threads": conditions.threads,
        "cores": conditions.threads if conditions.device == "cpu" else None,
        "rate": conditions.rate,
    }


def _write_common(problem: Problem, running: Mapping[str, Entrant], folder: Path) -> None:
    actors = {entrant.actor for entrant in running.values()}
    if "torch" in actors:
        write_networks(folder, problem)
    if actors & {"numpy", "jax"}:
        _save(folder / "formula.npz", formula(problem))


def _write(problem: Problem, entrant: Entrant, folder: Path) -> dict[str, str]:
    """Write an entrant's files unless another entrant already did; returns their names."""
    batch = problem.setting.batch
    if entrant.actor == "floor":
        recorded = record_floor(problem, batch)
        if entrant.form == "sum":
            recorded |= {"expected": recorded["total"], "scale": recorded["total_scale"]}
        inputs = f"floor-{entrant.form}.npz"
        _save(folder / inputs, recorded)
        return {"inputs": inputs}
    spec = _spec(problem.spec, entrant)
    key = f"k{spec.integration.nfe}-best-of-{spec.integration.best_of}"
    files = {"inputs": f"inputs-{key}.npz", "spec": f"spec-{key}.json"}
    if not (folder / files["inputs"]).exists():
        _save(folder / files["inputs"], record(problem.networks, spec, batch))
        (folder / files["spec"]).write_text(spec.to_json(), encoding="utf-8")
    if entrant.graph is not None:
        files["graph"] = f"{entrant.graph}-{entrant.precision}-{key}.onnx"
        if not (folder / files["graph"]).exists():
            module = PolicyModule(problem.networks, spec)
            lean = entrant.graph == "lean"
            graph = build_graph(module, spec, entrant.precision) if lean else traced_graph(module, spec)
            (folder / files["graph"]).write_bytes(graph)
    return files


def _save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]  # none is called allow_pickle


def _spec(spec: PolicySpec, entrant: Entrant) -> PolicySpec:
    """The policy's spec, with the entrant's NFE and best-of-N."""
    if entrant.nfe is None:
        return replace(spec, integration=replace(spec.integration, best_of=entrant.best_of))
    return replace(spec, integration=Integration(entrant.nfe, best_of=entrant.best_of))
