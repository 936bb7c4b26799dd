"""Reads typed values from a policy folder's JSON, with errors that name the field."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from difflib import get_close_matches
from typing import Any, NoReturn

from meam_policy.errors import FormatError

__all__ = ["MAX_CONFIG_BYTES", "JsonReader", "as_written", "cut", "parse_object", "require", "with_new_names"]

MAX_CONFIG_BYTES = 2**22
"""The names, bounds and statistics of the 28,224 pixels of four small pictures take 3.9 million bytes."""


_SHOWN = 300
"""Longest text of a file in a message, characters."""


def require(condition: bool, name: str, seen: object, expected: str) -> None:
    """Refuse a value in config.json unless a condition holds.

    Raises:
        FormatError: the condition does not hold.
    """
    if not condition:
        raise FormatError(f"config.json: {cut(name)} is {cut(str(seen))}; expected {expected}.")


def cut(text: str, most: int = _SHOWN) -> str:
    """A text of a file as a message shows it: not all of it, if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


_RENAMED = {"flow_steps": "nfe", "inpainting": "takes_prefix"}
"""Fields by the names that earlier versions wrote."""


def with_new_names(data: Any) -> Any:
    """The fields of an object, with the old names of earlier versions replaced by the current ones."""
    return {_RENAMED.get(name, name): value for name, value in data.items()} if isinstance(data, dict) else data


def parse_object(text: str | bytes, file: str = "config.json") -> dict[str, Any]:
    """Parse the text of config.json, or of another file of a policy folder.

    Raises:
        FormatError: it is not one JSON object, or a key appears twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in pairs:
            if key in data:
                raise FormatError(f'{file}: the key "{cut(key)}" appears twice; expected every key once.')
            data[key] = value
        return data

    if len(text) > MAX_CONFIG_BYTES:
        raise FormatError(
            f"{file} has {len(text)} bytes; expected at most {MAX_CONFIG_BYTES}, more than the "
            "largest observation needs. Download or export it again."
        )
    try:
        data = json.loads(text, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise FormatError(f"{file} is not UTF-8 text (byte {error.start}). Download it again.") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FormatError(f"{file} is not JSON: {error.msg} at {where}. Download or export it again.") from error
    except RecursionError as error:
        raise FormatError(f"{file} is nested too deeply to be a policy's {file}.") from error
    except ValueError as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file} cannot be read: it holds a number of thousands of digits.") from error
    if not isinstance(data, dict):
        raise FormatError(f"{file} holds a {type(data).__name__}; expected an object of settings.")
    return data


def as_written(data: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Those fields of an object that a file has, under the names by which the file has them.

    Args:
        data: The object, with current names.
        names: The names in the file, which an earlier version may have written.
    """
    earlier = {new: old for old, new in _RENAMED.items() if old in names}
    written = {earlier.get(name, name): value for name, value in data.items()}
    return {name: value for name, value in written.items() if name in names}


class JsonReader:
    """Takes typed values out of a JSON object, naming the field in every error."""

    def __init__(self, data: dict[str, Any], prefix: str) -> None:
        self.data = data
        self.prefix = prefix

    @classmethod
    def of(cls, data: Any, name: str) -> JsonReader:
        """Read the object called `name`.

        Raises:
            FormatError: it is not an object.
        """
        if not isinstance(data, dict):
            raise FormatError(f"config.json: {name} is a {type(data).__name__}; expected an object.")
        return cls(data, f"{name}.")

    def fail(self, name: str, value: object, expected: str) -> NoReturn:
        """Refuse a value."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise FormatError(f"config.json: {self.prefix}{name} is {shown} ({type(value).__name__}); expected {expected}.")

    def only(self, known: list[str]) -> None:
        """Refuse fields that are not known."""
        for name in self.data:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f" Did you mean {self.prefix}{close[0]}?" if close else ""
                raise FormatError(
                    f"config.json: {cut(self.prefix + name)} is not a field of this format version.{hint}"
                )

    def get(self, name: str, kind: type, expected: str) -> Any:
        """A value of a Python type."""
        if name not in self.data:
            raise FormatError(f"config.json: {self.prefix}{name} is missing; expected {expected}.")
        value = self.data[name]
        if not isinstance(value, kind):
            self.fail(name, value, expected)
        return value

    def integer(self, name: str) -> int:
        """An integer; true and false are refused."""
        value = self.get(name, object, "an integer")
        return value if type(value) is int else self.fail(name, value, "an integer")

    def text(self, name: str) -> str:
        """A text."""
        return self.get(name, str, "text")

    def optional_text(self, name: str) -> str | None:
        """A text or null."""
        return None if self.data.get(name, "") is None else self.get(name, str, "text or null")

    def optional_number(self, name: str) -> float | None:
        """A finite number or null."""
        value = self.get(name, object, "a number or null")
        return None if value is None else self.number(name, value)

    def number(self, name: str, value: object) -> float:
        """A finite number."""
        if type(value) not in (int, float):
            self.fail(name, value, "a number")
        try:
            number = float(value)  # pyright: ignore[reportArgumentType]
        except OverflowError:
            number = math.inf
        return number if math.isfinite(number) else self.fail(name, value, "a number; it must be finite")

    def optional_numbers(self, name: str) -> tuple[float, ...] | None:
        """A list of finite numbers; None if the field is null or missing."""
        return None if self.data.get(name) is None else self.numbers(name)

    def optional_words(self, name: str) -> tuple[str, ...] | None:
        """A list of texts; None if the field is null or missing."""
        if self.data.get(name) is None:
            return None
        values = self.get(name, list, "a list of texts, or null")
        for index, value in enumerate(values):
            if not isinstance(value, str):
                self.fail(f"{name}[{index}]", value, "text")
        return tuple(values)

    def numbers_by_name(self, name: str) -> dict[str, float]:
        """An object of finite numbers."""
        values = self.get(name, dict, "an object of numbers")
        return {key: self.number(f'{name}["{key}"]', value) for key, value in values.items()}

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        values = self.get(name, list, "a list of numbers")
        return tuple(self.number(f"{name}[{i}]", value) for i, value in enumerate(values))

    def bounds(self, name: str, missing: float) -> tuple[float, ...]:
        """A list of finite numbers, with `missing` in place of null."""
        values = self.get(name, list, "a list of numbers or nulls")
        return tuple(missing if v is None else self.number(f"{name}[{i}]", v) for i, v in enumerate(values))

    def texts(self, name: str) -> dict[str, str]:
        """An object of texts."""
        values = self.get(name, dict, "an object of texts")
        for key, value in values.items():
            if not isinstance(value, str):
                self.fail(f'{name}["{key}"]', value, "text")
        return values

    def finite(self, name: str, value: Any) -> Any:
        """Return nested JSON data after checking that all its numbers are finite."""
        # A stack, not recursion: the JSON parser accepts data nested more deeply than Python's recursion limit.
        todo = [(name, value)]
        while todo:
            where, item = todo.pop()
            if isinstance(item, dict):
                todo += [(f"{where}.{key}", part) for key, part in item.items()]
            elif isinstance(item, list):
                todo += [(f"{where}[{index}]", part) for index, part in enumerate(item)]
            elif type(item) in (int, float):
                self.number(where, item)
        return value
