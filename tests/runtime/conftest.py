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
from meam_policy.folder.policy_folder import sha256
from meam_policy.inference.session import PolicySession
from meam_policy.spec import Integration, VariantSpec

UNIT_BOX = BoxSpec(shape=(2,), dtype="float32", low=(-1.0, -1.0), high=(1.0, 1.0))


INTEGRATION = tuple(field.name for field in dataclasses.fields(Integration))


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
        "method": "by hand",
    }
    return PolicySpec(**with_integration({**fields, **changes}))


def with_integration(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `PolicySpec` or a `VariantSpec`, those of its integration put together."""
    how = {"nfe": 1, **{name: value for name, value in fields.items() if name in INTEGRATION}}
    return {"integration": Integration(**how)} | {n: value for n, value in fields.items() if n not in INTEGRATION}


def linear_graph(
    weight: NDArray[np.float32],
    noise_weight: NDArray[np.float32],
    chunk_shape: tuple[int, int],
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    names: Mapping[str, str],
    element_type: int = TensorProto.FLOAT,
    batch: str | int = "batch",
    several: bool = False,
    through: str = "Identity",
) -> bytes:
    """actions = clip(reshape(through(observation @ weight + noise @ noise_weight)), low, high).

    For `several` that is a chunk for each of the samples of the noise, of which the one with the largest sum acts; its
    value is that sum, and the disagreement how far below it the smallest sum is.
    """
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    constants = {
        "weight": weight.astype(dtype),
        "noise_weight": noise_weight.astype(dtype),
        "low": low.astype(dtype),
        "high": high.astype(dtype),
        "chunk_shape": np.array([0, 0, *chunk_shape] if several else [-1, *chunk_shape], np.int64),
    }
    observation, noise, actions = (names.get(name, name) for name in ("observation", "noise", "actions"))
    row = ["row", "samples_axis"] if several else ["row"]
    nodes = [
        helper.make_node("MatMul", [observation, "weight"], ["row"]),
        helper.make_node("MatMul", [noise, "noise_weight"], ["from_noise"]),
        helper.make_node("Unsqueeze" if several else "Identity", row, ["from_observation"]),
        helper.make_node("Add", ["from_observation", "from_noise"], ["sum"]),
        helper.make_node(through, ["sum"], ["flat"]),
        helper.make_node("Reshape", ["flat", "chunk_shape"], ["chunks"]),
        helper.make_node("Max", ["chunks", "low"], ["above_low"]),
        helper.make_node("Min", ["above_low", "high"], ["samples" if several else actions]),
    ]
    shapes = {observation: [batch, weight.shape[0]], noise: [batch, noise_weight.shape[0]]}
    ends = {actions: [batch, *chunk_shape]}
    if several:
        constants |= {"samples_axis": np.array([1]), "chunk_axes": np.array([2, 3])}
        shapes[noise].insert(1, "samples")
        ends |= {"value": [batch], "disagreement": [batch]}
        nodes += [
            helper.make_node("ReduceSum", ["samples", "chunk_axes"], ["sums"], keepdims=0),
            helper.make_node("ArgMax", ["sums"], ["best"], axis=1, keepdims=1),
            helper.make_node("GatherND", ["samples", "best"], [actions], batch_dims=1),
            helper.make_node("ReduceMax", ["sums", "samples_axis"], ["value"], keepdims=0),
            helper.make_node("ReduceMin", ["sums", "samples_axis"], ["least"], keepdims=0),
            helper.make_node("Sub", ["value", "least"], ["disagreement"]),
        ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, element_type, shape) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, element_type, shape) for name, shape in ends.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def continuing_graph(
    weight: NDArray[np.float32], noise_weight: NDArray[np.float32], chunk_shape: tuple[int, int], low: Any, high: Any
) -> bytes:
    """actions = clip((1 - w) D + w prefix, low, high) with D = reshape(observation @ weight + noise @ noise_weight)."""
    constants = {
        "weight": weight,
        "noise_weight": noise_weight,
        "shape": np.array([-1, *chunk_shape]),
        "last": np.array([2]),
        "one": np.float32(1),
        "low": np.array(low, np.float32),
        "high": np.array(high, np.float32),
    }
    nodes = [
        ("MatMul", ["observation", "weight"], "row"),
        ("MatMul", ["noise", "noise_weight"], "from_noise"),
        ("Add", ["row", "from_noise"], "flat"),
        ("Reshape", ["flat", "shape"], "chunks"),
        ("Unsqueeze", ["prefix_weight", "last"], "share"),
        ("Sub", ["one", "share"], "rest"),
        ("Mul", ["chunks", "rest"], "own"),
        ("Mul", ["prefix", "share"], "given"),
        ("Add", ["own", "given"], "sum"),
        ("Max", ["sum", "low"], "above"),
        ("Min", ["above", "high"], "actions"),
    ]
    dims = {"observation": weight.shape[:1], "noise": noise_weight.shape[:1], "prefix": chunk_shape}
    inputs = {**dims, "prefix_weight": chunk_shape[:1]}
    graph = helper.make_graph(
        [helper.make_node(kind, reads, [makes]) for kind, reads, makes in nodes],
        "rtc",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, ["batch", *chunk_shape])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


@dataclasses.dataclass(frozen=True)
class LinearPolicy:
    """A policy folder, and what is in it."""

    folder: Path
    spec: PolicySpec
    weight: NDArray[np.float32]
    noise_weight: NDArray[np.float32]

    def load(self, **arguments: Any) -> MeamPolicy:
        return MeamPolicy.from_pretrained(self.folder, **arguments)

    def unchecked(self, **arguments: Any) -> MeamPolicy:
        """The policy without the checks of its folder: with numbers that no folder may have."""
        return MeamPolicy(self.spec, PolicySession(self.graph, self.spec), **arguments)

    def samples(self, rows: Any, noise: Any = 0.0) -> NDArray[np.float64]:
        """The chunks [batch, best_of, chunk_size, action_dim] for observation rows, in float64 and with NumPy."""
        rows, spec = np.asarray(rows, np.float64), self.spec
        noise = np.broadcast_to(np.asarray(noise, np.float64), (len(rows), spec.noise_dim))
        noise = noise.reshape(len(rows), spec.integration.best_of, -1)
        flat = (rows @ self.weight.astype(np.float64))[:, None] + noise @ self.noise_weight.astype(np.float64)
        chunks = flat.reshape(len(rows), spec.integration.best_of, spec.chunk_size, spec.action_dim)
        return np.clip(chunks, spec.action.low, spec.action.high)

    def chunks(self, rows: Any, noise: Any = 0.0) -> NDArray[np.float64]:
        """Of each row's samples the one with the largest sum: [batch, chunk_size, action_dim]."""
        samples = self.samples(rows, noise)
        return samples[np.arange(len(samples)), samples.sum(axis=(2, 3)).argmax(axis=1)]

    @property
    def graph(self) -> bytes:
        return (self.folder / "policy.onnx").read_bytes()

    def add_variant(self, name: str, graph: bytes, **fields: Any) -> None:
        """Put one graph more into the folder, and into its config.json."""
        spec = PolicySpec.from_json((self.folder / "config.json").read_bytes())
        variant = VariantSpec(**with_integration({"file": f"{name}.onnx", **fields}))
        (self.folder / variant.file).write_bytes(graph)
        variants, files = {**spec.variants, name: variant}, {**spec.files, variant.file: sha256(graph)}
        spec = dataclasses.replace(spec, variants=variants, files=files)
        (self.folder / "config.json").write_text(spec.to_json())

    def add_continuing(self, weight: Any = None, noise_weight: Any = None) -> None:
        """Put a variant rtc into the folder, which takes a prefix; of the same weights if none are given."""
        weight = self.weight if weight is None else weight
        noise_weight = self.noise_weight if noise_weight is None else noise_weight
        shape, box = (self.spec.chunk_size, self.spec.action_dim), self.spec.action
        self.add_variant("rtc", continuing_graph(weight, noise_weight, shape, box.low, box.high), takes_prefix=True)

    def leave_out_bounds(self, through: str = "Identity") -> None:
        """Put a graph into the folder that returns actions of any size."""
        free = np.full(self.spec.action_dim, np.inf)
        shape = (self.spec.chunk_size, self.spec.action_dim)
        graph = linear_graph(self.weight, self.noise_weight, shape, -free, free, {}, through=through)
        self.replace_graph(graph)

    def replace_graph(self, graph: bytes) -> None:
        """Put another graph into the folder, with a config.json that vouches for it."""
        (self.folder / "policy.onnx").write_bytes(graph)
        spec = dataclasses.replace(self.spec, files={"policy.onnx": sha256(graph)})
        (self.folder / "config.json").write_text(spec.to_json())


@pytest.fixture
def make_spec() -> Callable[..., PolicySpec]:
    return policy_spec


@pytest.fixture(scope="session")
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
        through: str = "Identity",
        **spec_arguments: Any,
    ) -> LinearPolicy:
        spec = policy_spec(**spec_arguments)
        observation_dim, noise_dim, chunk_size, action_dim = graph_dims or (
            spec.observation_dim,
            spec.chunk_dim,
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
        ends = (weight, noise_weight, (chunk_size, action_dim), low, high, graph_names or {})
        policy.replace_graph(linear_graph(*ends, element_type, batch, spec.integration.best_of > 1, through))
        return policy

    return make


@pytest.fixture
def light_graph() -> Callable[[], bytes]:
    """Make a graph with 8-bit weights, for the policy that `policy_spec` describes."""

    def make() -> bytes:
        packed = np.random.default_rng(0).integers(100, 157, (8, 1, 16)).astype(np.uint8)
        constants = {"packed": packed, "scales": np.full(8, 1 / 64, np.float32), "chunk_shape": np.array([-1, 4, 2])}
        attributes: dict[str, Any] = {"K": 3, "N": 8, "bits": 8, "block_size": 16, "accuracy_level": 4}
        nodes = [
            helper.make_node(
                "MatMulNBits", ["observation", "packed", "scales"], ["row"], domain="com.microsoft", **attributes
            ),
            helper.make_node("Add", ["row", "noise"], ["flat"]),
            helper.make_node("Reshape", ["flat", "chunk_shape"], ["chunks"]),
            helper.make_node("Clip", ["chunks", "low", "high"], ["actions"]),
        ]
        constants |= {"low": np.array(-1, np.float32), "high": np.array(1, np.float32)}
        shapes = {"observation": ["batch", 3], "noise": ["batch", 8], "actions": ["batch", 4, 2]}
        *inputs, output = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items())
        weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
        graph = helper.make_graph(nodes, "light", inputs, [output], weights)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()

    return make


@pytest.fixture
def old_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> str:
    """Have onnxruntime refuse graphs with 8-bit weights as its version 1.20.1 does; its message."""
    import onnxruntime

    message = (
        "[ONNXRuntimeError] : 1 : FAIL : Load model failed: Fatal error: com.microsoft:MatMulNBits(-1) is not a "
        "registered function/op"
    )
    real = onnxruntime.InferenceSession

    def create(graph: bytes, *arguments: Any, **options: Any) -> Any:
        if b"MatMulNBits" in graph:
            raise RuntimeError(message)
        return real(graph, *arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", create)
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    return message


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
