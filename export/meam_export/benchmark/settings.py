"""The sizes of the policies that `meam bench infer` times, and the entrants that run them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from meam_policy.spec import Precision

__all__ = ["ENTRANTS", "GPU_ENTRANTS", "Entrant", "InferenceSetting", "make_setting"]

Actor = Literal["torch", "numpy", "jax", "onnx", "floor"]


@dataclass(frozen=True)
class InferenceSetting:
    """Sizes of the policy, and the batch it acts on.

    Attributes:
        name: Name in the tables.
        observation_dim: Numbers in an observation.
        action_dim: Numbers in an action.
        chunk_size: Actions in a chunk.
        hidden_dims: Widths of the hidden layers of the velocity field and of every critic.
        num_critics: Members of the critic ensemble, which only best-of-N uses.
        nfe: Evaluations of the velocity from noise to action.
        batch: Decisions per call.
    """

    name: str
    observation_dim: int
    action_dim: int
    chunk_size: int
    hidden_dims: tuple[int, ...]
    num_critics: int
    nfe: int = 10
    batch: int = 1


_SHAPES: Mapping[str, InferenceSetting] = MappingProxyType(
    {
        "large": InferenceSetting("large", 46, 5, 25, (512, 512, 512, 512), 10),
        "small": InferenceSetting("small", 29, 2, 5, (256, 256), 2),
    }
)


def make_setting(shape: str, batch: int = 1) -> InferenceSetting:
    """The setting of a shape: "large", a manipulation policy of paper scale, or "small"."""
    return InferenceSetting(**{**vars(_SHAPES[shape]), "batch": batch})


class Entrant(NamedTuple):
    """One way to run the policy, or one way to read the weights that it needs.

    Attributes:
        actor: Module that runs it, without the suffix "_actor".
        form: Which of that module's ways.
        summary: Short description for the tables.
        graph: The graph it runs; None if it runs none.
        precision: Precision of the graph's weights.
        nfe: Evaluations of the velocity; None for the setting's.
        best_of: Samples per decision, of which the one with the highest value is taken (best-of-N).
    """

    actor: Actor
    form: str
    summary: str
    graph: Literal["lean", "traced"] | None = None
    precision: Precision = "fp32"
    nfe: int | None = None
    best_of: int = 1


_EAGER = Entrant("torch", "eager", "PyTorch, inference_mode")
_COMPILED = Entrant("torch", "compile", "PyTorch, torch.compile for this batch size")
_JAX = Entrant("jax", "jit", "JAX, jit of the unrolled flow")
_TRACED = Entrant("onnx", "plain", "onnxruntime, graph traced by torch.onnx.export", "traced")
_LEAN = Entrant("onnx", "session", "onnxruntime, this project's graph and runtime", "lean")
_FLOOR_TORCH = Entrant("floor", "torch", "reading the weights: torch.mv")

ENTRANTS: Mapping[str, Entrant] = MappingProxyType(
    {
        "torch-eager": _EAGER,
        "torch-compile": _COMPILED,
        "jax": _JAX,
        "numpy": Entrant("numpy", "dot", "NumPy"),
        "traced": _TRACED,
        "lean": _LEAN,
        "lean-bare": Entrant("onnx", "bound", "the same graph, only onnxruntime's run_with_iobinding", "lean"),
        "lean-int8": Entrant("onnx", "session", "weights in 8-bit integers", "lean", "int8"),
        "lean-k3": Entrant("onnx", "session", "3 steps", "lean", nfe=3),
        "lean-k3-int8": Entrant("onnx", "session", "3 steps, 8-bit weights", "lean", "int8", nfe=3),
        "lean-best-of-4": Entrant("onnx", "session", "best of 4 chunks by the critics", "lean", best_of=4),
        "floor-numpy": Entrant("floor", "numpy", "reading the weights: NumPy's sgemv"),
        "floor-torch": _FLOOR_TORCH,
        "floor-sum": Entrant("floor", "sum", "reading the weights: torch.sum"),
        "floor-c": Entrant("floor", "c", "reading the weights: C, compiled for this machine"),
    }
)
"""Entrants on the CPU, by name."""

GPU_ENTRANTS: Mapping[str, Entrant] = MappingProxyType(
    {
        "torch-eager": _EAGER,
        "torch-compile": _COMPILED._replace(summary='PyTorch, torch.compile(mode="reduce-overhead")'),
        "jax": _JAX,
        "traced": _TRACED,
        "lean": _LEAN,
        "lean-fixed": Entrant("onnx", "fixed", "the same for this batch size only, as one CUDA graph", "lean"),
        "lean-fp16": Entrant("onnx", "session", "weights in float16", "lean", "fp16"),
        "lean-fp16-fixed": Entrant("onnx", "fixed", "weights in float16, one CUDA graph", "lean", "fp16"),
        "floor-torch": _FLOOR_TORCH,
    }
)
"""Entrants on a GPU, by name."""
