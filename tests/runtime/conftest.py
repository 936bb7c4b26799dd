"""Small policy folders made by hand: a linear graph whose actions NumPy can recompute."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from meam_policy import BoxSpec, MeamPolicy, PolicySpec
from meam_policy.folder import sha256

UNIT_BOX = BoxSpec(shape=(2,), dtype="float32", low=(-1.0, -1.0), high=(1.0, 1.0))


def free_box(size: int, key: str | None = None) -> BoxSpec:
    return BoxSpec(shape=(size,), dtype="float32", low=(-np.inf,) * size, high=(np.inf,) * size, key=key)


def policy_spec(
    observation: Sequence[BoxSpec] = (free_box(3),),
    action: BoxSpec = UNIT_BOX,
    chunk_size: int = 4,
    execute_steps: int = 2,
    **changes: Any,
) -> PolicySpec:
    observation_dim = sum(box.size for box in observation)
    fields: dict[str, Any] = {
        "observation": tuple(observation),
        "action": action,
        "chunk_size": chunk_size,
        "execute_steps": execute_steps,
        "observation_mean": (0.0,) * observation_dim,
        "observation_std": (1.0,) * observation_dim,
        "action_offset": (0.0,) * action.size,
        "action_scale": (1.0,) * action.size,
        "flow_steps": 1,
        "method": "by hand",
    }
    return PolicySpec(**{**fields, **changes})


def linear_graph(
    weight: NDArray[np.float32],
    noise_weight: NDArray[np.float32],
    chunk_shape: tuple[int, int],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    names: Mapping[str, str],
    element_type: int,
    batch: str | int,
) -> bytes:
    """actions = clip(reshape(observation @ weight + noise @ noise_weight), low, high)."""
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    constants = {
        "weight": weight.astype(dtype),
        "noise_weight": noise_weight.astype(dtype),
        "low": low.astype(dtype),
        "high": high.astype(dtype),
        "chunk_shape": np.array([-1, *chunk_shape], np.int64),
    }
    observation, noise, actions = (names.get(name, name) for name in ("observation", "noise", "actions"))
    nodes = [
        helper.make_node("MatMul", [observation, "weight"], ["from_observation"]),
        helper.make_node("MatMul", [noise, "noise_weight"], ["from_noise"]),
        helper.make_node("Add", ["from_observation", "from_noise"], ["flat"]),
        helper.make_node("Reshape", ["flat", "chunk_shape"], ["chunks"]),
        helper.make_node("Max", ["chunks", "low"], ["above_low"]),
        helper.make_node("Min", ["above_low", "high"], [actions]),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [
            helper.make_tensor_value_info(observation, element_type, [batch, weight.shape[0]]),
            helper.make_tensor_value_info(noise, element_type, [batch, noise_weight.shape[0]]),
        ],
        [helper.make_tensor_value_info(actions, element_type, [batch, *chunk_shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@dataclasses.dataclass(frozen=True)
class LinearPolicy:
    """A policy folder, and what is in it."""

    folder: Path
    spec: PolicySpec
    weight: NDArray[np.float32]
    noise_weight: NDArray[np.float32]

    def load(self, **arguments: Any) -> MeamPolicy:
        return MeamPolicy.from_pretrained(self.folder, **arguments)

    def chunks(self, rows: Any, noise: Any = 0.0) -> NDArray[np.float64]:
        """The chunks for observation rows [batch, observation_dim], in float64 and without onnxruntime."""
        rows = np.asarray(rows, np.float64)
        noise = np.broadcast_to(np.asarray(noise, np.float64), (len(rows), self.spec.noise_dim))
        flat = rows @ self.weight.astype(np.float64) + noise @ self.noise_weight.astype(np.float64)
        chunks = flat.reshape(len(rows), self.spec.chunk_size, self.spec.action_dim)
        return np.clip(chunks, self.spec.action.low, self.spec.action.high)

    def replace_graph(self, graph: bytes) -> None:
        """Put another graph into the folder, with a config.json that vouches for it."""
        (self.folder / "policy.onnx").write_bytes(graph)
        spec = dataclasses.replace(self.spec, files={"policy.onnx": sha256(graph)})
        (self.folder / "config.json").write_text(spec.to_json())


@pytest.fixture
def make_spec() -> Callable[..., PolicySpec]:
    return policy_spec


@pytest.fixture
def make_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LinearPolicy]:
    """Make a policy folder; the arguments of `policy_spec`, and how to build the graph."""

    def make(
        *,
        weight: Any = None,
        noise_weight: Any = None,
        graph_dims: tuple[int, int, int, int] | None = None,
        graph_names: Mapping[str, str] | None = None,
        element_type: int = TensorProto.FLOAT,
        batch: str | int = "batch",
        **spec_arguments: Any,
    ) -> LinearPolicy:
        spec = policy_spec(**spec_arguments)
        observation_dim, noise_dim, chunk_size, action_dim = graph_dims or (
            spec.observation_dim,
            spec.noise_dim,
            spec.chunk_size,
            spec.action_dim,
        )
        # Small multiples of 1/64, so that float32 sums of a few terms are exact in any order.
        random = np.random.default_rng(7)
        shapes = (observation_dim, chunk_size * action_dim), (noise_dim, chunk_size * action_dim)
        drawn = [(random.integers(-8, 9, shape) / 64).astype(np.float32) for shape in shapes]
        weight = drawn[0] if weight is None else np.asarray(weight, np.float32)
        noise_weight = drawn[1] if noise_weight is None else np.asarray(noise_weight, np.float32)
        with np.errstate(over="ignore"):
            low, high = (
                np.resize(np.array(bounds, np.float64), action_dim).astype(np.float32)
                for bounds in (spec.action.low, spec.action.high)
            )
        policy = LinearPolicy(tmp_path_factory.mktemp("policy"), spec, weight, noise_weight)
        chunk_shape = (chunk_size, action_dim)
        policy.replace_graph(
            linear_graph(weight, noise_weight, chunk_shape, low, high, graph_names or {}, element_type, batch)
        )
        return policy

    return make


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code, or `python -m`, in a process of its own."""

    def run(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **environment},
            check=False,
        )

    return run
