"""Messages that name settings as they are given where the message is read: in Python, or on the command line."""

from __future__ import annotations

import contextlib
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from meam_policy.errors import MeamError

__all__ = ["Notation", "SettingText", "as_argument", "in_notation", "said"]

Notation: TypeAlias = Callable[[str, str], str]
"""How a setting is written, by its name and its value in Python's notation; without a value that is "", its name."""


def as_argument(name: str, value: str = "") -> str:
    """A setting in Python, such as chunk_size or chunk_size=5."""
    return f"{name}={value}" if value else name


class SettingText(str):
    """A message in Python's words, which can also be said in those of the command line.

    In the template, {chunk_size} names a setting, {chunk_size:5} sets it, {0} is the first of the values, which are
    shown as Python's; a template may nest them, as in {chunk_size:{0}}.

        >>> text = SettingText('{batch_size} is {0}; expected 4 or more with {objective:"two_scale"}.', 2)
        >>> print(text)
        batch_size is 2; expected 4 or more with objective="two_scale".
        >>> from meam_training.runs.options import as_flag
        >>> print(text.shown(as_flag))
        --batch-size is 2; expected 4 or more with --objective two_scale.

    Args:
        template: The message.
        values: What it shows.
    """

    __slots__ = ("template", "values")

    template: str
    values: tuple[Any, ...]

    def __new__(cls, template: str, *values: object) -> SettingText:
        """Write the message in Python's words."""
        text = super().__new__(cls, _Words(as_argument).vformat(template, values, {}))
        text.template, text.values = template, values
        return text

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Copy an error with the template, not with the message."""
        return (self.template, *self.values)

    def shown(self, notation: Notation) -> str:
        """The message, with settings as the notation has them."""
        return _Words(notation).vformat(self.template, self.values, {})


def said(text: str, notation: Notation) -> str:
    """A text, with the settings that it names as the notation has them."""
    return text.shown(notation) if isinstance(text, SettingText) else text


@contextlib.contextmanager
def in_notation(notation: Notation) -> Iterator[None]:
    """Have the errors of a block name settings as the notation has them."""
    try:
        yield
    except MeamError as error:
        error.args = tuple(said(each, notation) if isinstance(each, str) else each for each in error.args)
        raise


class _Words(string.Formatter):
    """Fills in a template: names stand for settings, numbers for values."""

    def __init__(self, notation: Notation) -> None:
        self._notation = notation

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return args[key] if isinstance(key, int) else _Setting(key)

    def format_field(self, value: Any, format_spec: str) -> str:
        return self._notation(value.name, format_spec) if isinstance(value, _Setting) else format(value, format_spec)


class _Setting:
    def __init__(self, name: str) -> None:
        self.name = name
