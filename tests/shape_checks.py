"""The type checker that jaxtyping's import hook applies to the modules of training."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from beartype import beartype

_CHECKS: dict[Any, Callable[..., Any]] = {}


def when_called(signature: FunctionType) -> Callable[..., Any]:
    """As `beartype`, whose check takes a millisecond to build: built at the first call, and once.

    A function within another is decorated anew at every call of the outer one, and by far most are never checked.
    """

    def check(*args: Any, **kwargs: Any) -> Any:
        code = signature.__code__
        key = (signature.__module__, signature.__qualname__, code.co_varnames, repr(signature.__annotations__))
        if key not in _CHECKS:
            _CHECKS[key] = beartype(signature)
        return _CHECKS[key](*args, **kwargs)

    return check
