"""Compiling whole updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["compiled"]

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function, gradients taken inside it included, into one graph.

    The first call compiles, which takes up to a minute or two; the compiler keeps what it made on disk for the next
    time. If it cannot compile here, for instance without a C++ compiler, a warning says so, and the function runs as
    it is from then on.
    """
    graph = torch.compile(function, fullgraph=True, dynamic=False)
    works: bool | None = None

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal works
        if works is False:
            return function(*args, **kwargs)
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                result = graph(*args, **kwargs)
        except _FAILURES as error:
            works = False
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            warnings.warn(
                f"The update cannot be compiled here ({reason}), so it runs uncompiled. Compiling needs a C++ compiler "
                "such as g++ and torch 2.10 or newer; compile=False avoids this message.",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(*args, **kwargs)
        works = True
        return result

    return call


_FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, AttributeError)
