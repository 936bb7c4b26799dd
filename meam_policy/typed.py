"""The types of what enters through the API, checked against the annotations of functions and of dataclasses.

Ranges, choices and arrays are checked where they are used. Scalars of NumPy are taken where Python's are.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import numpy as np

from meam_policy.errors import ConfigError, MeamError

__all__ = ["as_annotated", "shown", "typed", "typed_fields"]

P = ParamSpec("P")
R = TypeVar("R")

_MOST = 2**63 - 1
_MOST_MEMBERS = 2**24
"""Of an array that is taken for a sequence of numbers."""

_SHOWN = 60
_NOUNS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "None",
    Mapping: "a mapping",
    Sequence: "a sequence",
    tuple: "a tuple",
    list: "a list",
    Callable: "a function",
    os.PathLike: "a path",
}


def typed(*own: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Have a function check the types of its arguments, and give it Python's numbers in place of NumPy's.

    Args:
        own: Names of arguments of which it checks the type itself, since it has more to say.

    A warning of a checked function is given with one stack level more: the check is between it and its caller.

    The checked function raises:
        ConfigError: an argument is not of the type that it is annotated with; the message names it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind not in several and name not in own
        ]
        space = sys.modules[function.__module__].__dict__

        @functools.cache
        def kinds() -> dict[str, Any]:
            # Only at the first call: a method's annotations may name its own class.
            return {name: _evaluated(signature.parameters[name].annotation, space) for name in names}

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs)
            for name, kind in kinds().items():
                if name in given.arguments:
                    given.arguments[name] = as_annotated(name, given.arguments[name], kind)
            return function(*given.args, **given.kwargs)

        return checked

    return decorate


def typed_fields(instance: Any, *own: str, error: Callable[[str], MeamError] = ConfigError, prefix: str = "") -> None:
    """Check the types of a dataclass's fields, and put Python's numbers in place of NumPy's.

    Args:
        instance: A dataclass's instance, frozen or not.
        own: Names of fields of which it checks the type itself.
        error: What to raise.
        prefix: Put before the fields' names in messages.
    """
    for name, kind in _field_kinds(type(instance)).items():
        if name in own:
            continue
        object.__setattr__(instance, name, as_annotated(f"{prefix}{name}", getattr(instance, name), kind, error))


@functools.cache
def _field_kinds(cls: type) -> dict[str, Any]:
    space = sys.modules[cls.__module__].__dict__
    return {field.name: _evaluated(field.type, space) for field in fields(cls)}


def _evaluated(annotation: Any, space: dict[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    try:
        return eval(annotation, space) if isinstance(annotation, str) else annotation
    except NameError:  # a name that only type checkers import
        return Any


def as_annotated(name: str, value: Any, kind: Any, error: Callable[[str], MeamError] = ConfigError) -> Any:
    """A value of the annotated type.

    Args:
        name: Name in the message.
        value: What was given.
        kind: An annotation, evaluated.
        error: What to raise.

    Returns:
        The value, with Python's numbers in place of NumPy's.

    Raises:
        ConfigError: it is of another type, or or `error` instead.
    """
    try:
        return _converted(value, kind)
    except _UnfitError:
        kinds = f" ({type(value).__name__})" if value is not None else ""
        raise error(f"{name} is {shown(value)}{kinds}; expected {_expected(kind)}.") from None


def shown(value: object) -> str:
    """A value in Python's notation for a message, cut where it is long; a whole number of many digits by its size."""
    if isinstance(value, int) and abs(value) >= 10**_SHOWN:
        return f"about {'-' if value < 0 else ''}1e{int(math.log10(abs(value)))}"
    try:
        text = " ".join(repr(value).split("\n"))  # of an array
    except ValueError:  # Python writes no whole number of thousands of digits
        return "too long to be shown"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class _UnfitError(Exception):
    pass


def _converted(value: Any, kind: Any) -> Any:
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        for each in get_args(kind):
            try:
                return _converted(value, each)
            except _UnfitError:
                continue
        raise _UnfitError
    if origin is typing.Annotated:
        return _converted(value, get_args(kind)[0])
    if origin is Literal:
        return _converted(value, type(get_args(kind)[0]))
    if kind in (int, float, bool):
        return _number(value, kind)
    if origin in (Sequence, tuple, list):
        return _members(value, kind, origin)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _UnfitError
        for key, each in value.items():
            _converted(key, get_args(kind)[0])
            _converted(each, get_args(kind)[1])
        return value
    if _fits(value, kind, origin):
        return value
    raise _UnfitError


def _fits(value: Any, kind: Any, origin: Any) -> bool:
    if kind is None:
        return value is None
    if origin is Callable:
        return callable(value)
    cls = origin or kind
    if cls in (Any, object, np.ndarray) or not isinstance(cls, type):
        return True  # arrays are read by what uses them
    if getattr(cls, "_is_protocol", False):
        return all(hasattr(value, name) for name in _members_of(cls))
    return isinstance(value, cls)


@functools.cache
def _members_of(protocol: type) -> list[str]:
    return [name for name in {**protocol.__annotations__, **vars(protocol)} if not name.startswith("_")]


def _number(value: Any, kind: type) -> Any:
    # True is an instance of int.
    if isinstance(value, (bool, np.bool_)):
        if kind is bool:
            return bool(value)
    elif kind is int and isinstance(value, numbers.Integral) and -_MOST <= int(value) <= _MOST:
        return int(value)
    elif kind is float and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):
            number = float(value)
            return value if type(value) in (int, float) else number
    raise _UnfitError


def _members(value: Any, kind: Any, origin: Any) -> Any:
    listed = value
    if isinstance(value, np.ndarray) and origin is Sequence and value.ndim == 1 and value.size <= _MOST_MEMBERS:
        listed = value.tolist()
    if not isinstance(listed, origin) or isinstance(listed, (str, bytes)):
        raise _UnfitError
    arguments = get_args(kind)
    if origin is tuple and arguments[-1:] != (...,):
        if len(arguments) != len(listed):
            raise _UnfitError
        return tuple(map(_converted, listed, arguments))
    if arguments[0] in (float, str) and all(type(each) is arguments[0] for each in listed):
        return listed  # of a picture there are tens of thousands
    members = [_converted(each, arguments[0]) for each in listed]
    return tuple(members) if isinstance(listed, tuple) else members if isinstance(listed, list) else listed


def _expected(kind: Any) -> str:
    options = get_args(kind) if get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    words = [_noun(option) for option in options]
    return ", ".join(words[:-1]) + (" or " if len(words) > 1 else "") + words[-1]


def _noun(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Sequence, list) or (origin is tuple and arguments[-1:] == (...,)):
        return f"{_NOUNS[origin]}, each of it {_noun(arguments[0])}"
    cls = origin or kind
    if cls is None:
        return "None"
    if getattr(cls, "_is_protocol", False):
        return f"something with {', '.join(_members_of(cls))}"
    return _NOUNS.get(cls) or f"a {getattr(cls, '__name__', 'value')}"
