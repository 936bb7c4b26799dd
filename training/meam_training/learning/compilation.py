"""Compiling whole updates, and replaying them as CUDA graphs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["CapturedUpdate", "compiled"]

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function, gradients taken inside it included, into one graph.

    The first call compiles, which takes up to a minute or two; the compiler keeps what it made on disk for the next
    time. If it cannot compile here, for instance without a C++ compiler, a warning says so, and the function runs as
    it is from then on.
    """
    # Importing the compiler takes seconds: not before it is wanted.
    from torch._dynamo import config, exc
    from torch._inductor.exc import InductorError

    graph = torch.compile(function, fullgraph=True, dynamic=False)
    failed = False

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal failed
        if failed:
            return function(*args, **kwargs)
        try:
            with config.patch(trace_autograd_ops=True):
                return graph(*args, **kwargs)
        except (exc.TorchDynamoException, InductorError, AttributeError) as error:
            failed = True
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            warnings.warn(
                f"The update cannot be compiled here ({reason}), so it runs uncompiled. Compiling needs a C++ compiler "
                "such as g++ and torch 2.10 or newer; compile=False avoids this message.",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(*args, **kwargs)

    return call


WARM_UPS = 3
"""Ordinary runs before the recording: they compile, tune the libraries and make the optimiser's state."""


class CapturedUpdate:
    """A device's work, recorded as one CUDA graph after a few ordinary runs, and replayed from then on.

    One launch in place of some thousand. Not yet run on a GPU.

    Args:
        work: The work; it reads and writes the same tensors every time, and returns named scalars.
        generator: Source of its random numbers; every replay draws new ones.
    """

    def __init__(self, work: Callable[[], dict[str, Tensor]], generator: torch.Generator) -> None:
        self._work, self._generator = work, generator
        self._runs = 0.0  # minus infinity once recording has failed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._names: tuple[str, ...] = ()
        self._values = torch.empty(0)

    def __call__(self) -> dict[str, Tensor]:
        """Do the work once."""
        self._runs += 1
        if self._runs <= WARM_UPS:
            return self._work()
        if self._graph is None:
            try:
                self._graph = self._record()
            except RuntimeError as error:
                self._runs = -math.inf
                warnings.warn(
                    f"The update cannot be captured as a CUDA graph ({error}), so its kernels are launched one by one.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self._work()
        self._graph.replay()
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            metrics = self._work()
            self._names, self._values = tuple(metrics), torch.stack([value.float() for value in metrics.values()])
        return graph
