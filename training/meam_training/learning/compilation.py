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
    """Compile a function into one graph, including the gradients computed in it.

    The first call compiles, which takes up to a minute or two; the compiler caches its result on disk. If compilation
    fails, for instance without a C++ compiler, a warning is issued and the function runs uncompiled from then on.
    """
    # Imported here, since importing the compiler takes seconds.
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
"""Ordinary runs before the capture: they compile, autotune the libraries and initialise the optimiser's state."""


class CapturedUpdate:
    """An update captured as one CUDA graph after a few ordinary runs, and replayed from then on.

    A replay is one launch instead of a thousand or so.

    Args:
        work: The update; it reads and writes the same tensors each time, and returns named scalars.
        generator: Source of its random numbers; each replay draws new ones.
    """

    def __init__(self, work: Callable[[], dict[str, Tensor]], generator: torch.Generator) -> None:
        self._work, self._generator = work, generator
        self._runs = 0.0  # minus infinity once capturing has failed
        self._graph: torch.cuda.CUDAGraph | None = None
        self._names: tuple[str, ...] = ()
        self._values = torch.empty(0)

    def __call__(self) -> dict[str, Tensor]:
        """Run the update once."""
        self._runs += 1
        if self._runs <= WARM_UPS:
            return self._work()
        if self._graph is None:
            try:
                self._graph = self._capture()
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

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            metrics = self._work()
            self._names, self._values = tuple(metrics), torch.stack([value.float() for value in metrics.values()])
        return graph
