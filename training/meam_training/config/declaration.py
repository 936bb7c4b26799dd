"""Constraints that a settings dataclass declares on its fields with `typing.Annotated`, and their validation.

    discount: Annotated[float, Range(above=0, most=1)] = 0.99
    sde_steps: Annotated[int | None, Range(least=1), OnlyIf("objective", ..., "set objective to adjoint")] = None
    device: Annotated[str, HowItRuns()] = "auto"

The field's type determines the rest: `Literal` lists the choices, `bool` is a switch, `tuple[..., ...]` gives the type
of each member.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from meam_policy.errors import ConfigError
from meam_training.setting_text import SettingText

__all__ = ["Field", "HowItRuns", "OnlyIf", "Range", "Text", "as_plain", "check_fields", "fields_of", "unknown"]


@dataclass(frozen=True)
class Range:
    """Range of finite numbers allowed for a field, or for each member of a tuple; without bounds, all of them.

    Attributes:
        above, least: Lower bound, exclusive or inclusive.
        below, most: Upper bound, exclusive or inclusive.
        cap: What is far more than is of use, and only named where it is exceeded.
    """

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    cap: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether a number lies in the range; NaN and infinity lie in none."""
        return (
            -math.inf < value < math.inf
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
            and not self.is_absurd(value)
        )

    def is_absurd(self, value: float) -> bool:
        """Whether a number is above the cap."""
        return self.cap is not None and value > self.cap

    def __str__(self) -> str:
        """Describe the range, as in "above 0, at most 1", "0 or more" or "from 0 to 1"; empty without bounds."""
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = (
            ("above {}", self.above),
            ("{} or more", self.least),
            ("below {}", self.below),
            ("at most {}", self.most),
        )
        return ", ".join(words.format(bound) for words, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Text:
    """Describes what is expected of a string field; the value itself is checked where it is used."""

    expected: str


@dataclass(frozen=True)
class HowItRuns:
    """Marks a field that affects how a run is executed, but not its result."""


@dataclass(frozen=True)
class OnlyIf:
    """Marks a field that has an effect only under a condition on another field.

    Conditions are not inherited: if the other field has conditions of its own, repeat them here.

    Attributes:
        other: Name of the other field.
        holds: The condition, a function of an object whose attributes are the settings.
        remedy: How to fulfil it, as an imperative; settings stand in braces, as in a `SettingText`.
    """

    other: str
    holds: Callable[[Any], bool]
    remedy: str


@dataclass(frozen=True)
class Field:
    """Declaration of a field: its type `kind` without None, whether None is allowed, and its markers."""

    kind: Any
    optional: bool
    markers: tuple[Any, ...]

    @property
    def conditions(self) -> tuple[OnlyIf, ...]:
        """Conditions under which the field has an effect."""
        return tuple(marker for marker in self.markers if isinstance(marker, OnlyIf))

    @property
    def decides(self) -> bool:
        """Whether the field affects the result of a run, rather than only its execution."""
        return not any(isinstance(marker, HowItRuns) for marker in self.markers)

    @property
    def range(self) -> Range:
        """Range of numbers allowed."""
        return next((marker for marker in self.markers if isinstance(marker, Range)), Range())


@functools.cache
def fields_of(cls: type) -> Mapping[str, Field]:
    """Declared fields of a dataclass, by name."""
    return types.MappingProxyType(
        {name: _field(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}
    )


def check_fields(fields: Mapping[str, Field], values: Mapping[str, Any]) -> None:
    """Check each value against its own declaration.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or is not one of the choices (the message suggests the
            nearest one).
    """
    for name, field in fields.items():
        value = values[name]
        if value is None and field.optional:
            continue
        if get_origin(field.kind) is tuple:
            member = Field(get_args(field.kind)[0], False, field.markers)
            plural = _plural(member)
            if not value and isinstance(value, tuple) and get_origin(member.kind) is not Literal:
                raise ConfigError(SettingText(f"{{{name}}} is empty; expected {{0}}.", plural))
            if not isinstance(value, tuple):
                raise ConfigError(SettingText(f"{{{name}}} is {{0!r}}; expected a tuple of {{1}}.", value, plural))
            for each in value:
                if get_origin(member.kind) is Literal:
                    _check(name.removesuffix("s"), each, member)
                elif not _fits(each, member):
                    expected = plural + _limit(each, member)
                    raise ConfigError(SettingText(f"{{{name}}} has {{0!r}}; expected {{1}}.", each, expected))
        else:
            _check(name, value, field)


def as_plain(value: Any) -> Any:
    """Python's number in place of NumPy's, alone or in a tuple; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(as_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Error message for an unknown name, which suggests the nearest known name or lists all of them."""
    known = list(known)
    close = get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}."
    return f'There is no {kind} "{name}". {hint}'


def _field(hint: Any) -> Field:
    markers: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *rest = get_args(hint)
        markers = tuple(rest)
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if optional:
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return Field(hint, optional, markers)


def _check(name: str, value: object, field: Field) -> None:
    if _fits(value, field):
        return
    if get_origin(field.kind) is Literal:
        raise ConfigError(unknown(name, str(value), get_args(field.kind)))
    expected = _expected(field) + (", or None" if field.optional else "")
    raise ConfigError(SettingText(f"{{{name}}} is {{0!r}}; expected {{1}}.", value, expected + _limit(value, field)))


def _limit(value: object, field: Field) -> str:
    """The largest whole number that is taken, of one that is larger."""
    if type(value) is not int or field.kind is not int:
        return ""
    if field.range.is_absurd(value):
        return f", at most {field.range.cap}"
    return f", below {_TOO_LARGE} = 2^63" if value >= _TOO_LARGE else ""


_TOO_LARGE = 2**63
"""Smallest positive integer that does not fit in a signed 64-bit one."""


def _fits(value: object, field: Field) -> bool:
    # Compares types exactly, because True is an instance of int.
    if get_origin(field.kind) is Literal:
        return value in get_args(field.kind)
    if field.kind is int:
        return type(value) is int and value < _TOO_LARGE and value in field.range
    if field.kind is float:
        return isinstance(value, (int, float)) and type(value) is not bool and value in field.range
    return type(value) is field.kind


def _expected(field: Field) -> str:
    text = next((marker.expected for marker in field.markers if isinstance(marker, Text)), None)
    if text is not None:
        return text
    nouns = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    words = str(field.range)
    joiner = " of " if words[:1].isdigit() else " "
    return nouns[field.kind] + (joiner + words if words else "")


def _plural(member: Field) -> str:
    if get_origin(member.kind) is Literal:
        return ", ".join(get_args(member.kind))
    return _expected(member).replace("a whole number", "whole numbers").replace("a number", "numbers")
