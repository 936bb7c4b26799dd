"""Runs a graph in onnxruntime: through this project's runtime, or through onnxruntime's own interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from meam_policy.inference.providers import provider_list, require_provider
from meam_policy.inference.session import PolicySession
from meam_policy.spec import PolicySpec

__all__ = ["make"]

Array = NDArray[np.float32]


def make(folder: Path, task: Mapping[str, Any]) -> Callable[[Array, Array], Array]:
    """Load a graph, and return a function that runs it.

    Args:
        folder: Folder with the graph and the policy spec it was written for.
        task: File names `graph` and `spec`; `device`, `threads` and `batch`; and `form`: "session" for `PolicySession`,
            "fixed" for a `PolicySession` of fixed batch size, "plain" for `InferenceSession.run`, "bound" for
            `run_with_iobinding` on the process's own buffers.
    """
    graph, form = (folder / task["graph"]).read_bytes(), task["form"]
    if form in ("session", "fixed"):
        spec = PolicySpec.from_json((folder / task["spec"]).read_bytes())
        fixed = task["batch"] if form == "fixed" else None
        return PolicySession(graph, spec, task["device"], task["threads"], fixed_batch=fixed).run
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task["threads"], 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers = provider_list(task["device"], fixed_batch=False, tf32=False)
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    require_provider(task["device"], session.get_providers())
    if form == "bound":
        return _bound(session, folder / task["inputs"])
    return lambda observation, noise: np.asarray(
        session.run(["actions"], {"observation": observation, "noise": noise})[0]
    )


def _bound(session: onnxruntime.InferenceSession, inputs: Path) -> Callable[[Array, Array], Array]:
    """A function that runs the graph on buffers bound once, and returns the same array every time."""
    with np.load(inputs) as file:
        example = {name: np.ascontiguousarray(file[name][0]) for name in ("observation", "noise")}
        actions = np.zeros(file["expected"].shape[1:], np.float32)
    binding = session.io_binding()
    for name, array in example.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    binding.bind_ortvalue_output("actions", onnxruntime.OrtValue.ortvalue_from_numpy(actions))

    def act(observation: Array, noise: Array) -> Array:
        example["observation"][...] = observation
        example["noise"][...] = noise
        session.run_with_iobinding(binding)
        return actions

    return act
