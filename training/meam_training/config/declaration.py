"""What a settings dataclass declares beside its fields with `typing.Annotated`, and the check of it.

    discount: Annotated[float, Range(above=0, most=1)] = 0.99
    sde_steps: Annotated[int | None, Range(least=1), OnlyIf("objective", ..., 'set objective="adjoint"')] = None
    device: Annotated[str, HowItRuns()] = "auto"

A field's type says the rest: `Literal` the choices, `bool` a switch, `tuple[..., ...]` what each member is.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from meam_policy.errors import ConfigError

__all__ = ["Field", "HowItRuns", "OnlyIf", "Range", "Text", "check_fields", "fields_of", "unknown"]


@dataclass(frozen=True)
class Range:
    """The finite numbers that a field, or each member of a tuple, may be; without bounds all of them.

    Attributes:
        above, least: Lower bound, itself left out or allowed.
        below, most: Upper bound, itself left out or allowed.
    """

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether a number lies within; NaN and infinity lie in no range."""
        return (
            -math.inf < value < math.inf
            and (self.above is None or value > self.above)
            and (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        """In words: "above 0, at most 1", "0 or more", "from 0 to 1"; empty without bounds."""
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
    """What a field of text may be, in words; whether it is that is checked where it is used."""

    expected: str


@dataclass(frozen=True)
class HowItRuns:
    """The field is about how a run is carried out, and does not decide its result."""


@dataclass(frozen=True)
class OnlyIf:
    """The field has an effect only under a condition on another one.

    A condition on a field that has conditions itself is declared together with those.

    Attributes:
        other: The other field.
        holds: The condition, of settings by attribute.
        remedy: How to make it hold, as an imperative.
    """

    other: str
    holds: Callable[[Any], bool]
    remedy: str


@dataclass(frozen=True)
class Field:
    """A field as it was declared: `kind` without None, whether None is allowed, and what is said beside it."""

    kind: Any
    optional: bool
    markers: tuple[Any, ...]

    @property
    def conditions(self) -> tuple[OnlyIf, ...]:
        """What has to hold for the field to have an effect."""
        return tuple(marker for marker in self.markers if isinstance(marker, OnlyIf))

    @property
    def decides(self) -> bool:
        """Whether the field is more than how a run is carried out."""
        return not any(isinstance(marker, HowItRuns) for marker in self.markers)

    @property
    def range(self) -> Range:
        """The numbers allowed."""
        return next((marker for marker in self.markers if isinstance(marker, Range)), Range())


@functools.cache
def fields_of(cls: type) -> Mapping[str, Field]:
    """The declared fields of a dataclass by name."""
    return types.MappingProxyType(
        {name: _field(hint) for name, hint in get_type_hints(cls, include_extras=True).items()}
    )


def check_fields(fields: Mapping[str, Field], values: Mapping[str, Any]) -> None:
    """Check each value by itself against its declaration.

    Raises:
        ConfigError: one is of another kind, out of range, or no known choice (with the nearest known one).
    """
    for name, field in fields.items():
        value = values[name]
        if value is None and field.optional:
            continue
        if get_origin(field.kind) is tuple:
            member = Field(get_args(field.kind)[0], False, field.markers)
            plural = _plural(member)
            if not isinstance(value, tuple) or (not value and get_origin(member.kind) is not Literal):
                raise ConfigError(f"{name} is {value!r}; expected a tuple of {plural}.")
            for each in value:
                if get_origin(member.kind) is Literal:
                    _check(name.removesuffix("s"), each, member)
                elif not _fits(each, member):
                    raise ConfigError(f"{name} is {value!r}; expected a tuple of {plural}.")
        else:
            _check(name, value, field)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Says that there is no such name, with the nearest known one or all of them."""
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
    if type(value) is int and value >= _TOO_LARGE and field.kind is int:
        expected += f", below {_TOO_LARGE} = 2^63"
    raise ConfigError(f"{name} is {value!r}; expected {expected}.")


_TOO_LARGE = 2**63
"""The first whole number that neither PyTorch nor NumPy can take."""


def _fits(value: object, field: Field) -> bool:
    # The types themselves, for True is an int.
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
    joint = " of " if words[:1].isdigit() else " "
    return nouns[field.kind] + (joint + words if words else "")


def _plural(member: Field) -> str:
    if get_origin(member.kind) is Literal:
        return ", ".join(get_args(member.kind))
    return _expected(member).replace("a whole number", "whole numbers").replace("a number", "numbers")
