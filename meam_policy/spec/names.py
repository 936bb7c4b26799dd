"""Names of the numbers of an observation or an action, given by key so that their order cannot be mistaken.

A name may end with a unit in square brackets: `shoulder/position[rad]`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from meam_policy.errors import ConfigError, FormatError
from meam_policy.spec.box import BoxSpec
from meam_policy.spec.json_reader import cut

__all__ = ["NamedNumber", "Names", "check_names", "named_numbers", "names_metadata", "names_of", "read_names"]

Names = Sequence[str] | Mapping[str, Sequence[str]]
"""Names of all numbers of a Box in C order, or by key for a Dict."""

_UNIT = re.compile(r"(?P<name>.*?\S)\s*\[(?P<unit>[^\[\]]*[^\W\d_][^\[\]]*|°|%)\]")
"""A name with its unit; brackets around an index are part of the name."""

_SHOWN = 6
"""Longest list of placeholders in a message."""
_SHOWN_TEXT = 200
"""Longest text of a file in a message, characters."""


@dataclass(frozen=True)
class NamedNumber:
    """One number of a flattened observation or action.

    Attributes:
        index: Its index in the flattened vector.
        key: Key of a Dict observation; None for a Box.
        name: Name without its unit; None if unknown.
        unit: Unit; None if unknown.
        low: Lower bound; -inf for none.
        high: Upper bound; inf for none.
    """

    index: int
    key: str | None
    name: str | None
    unit: str | None
    low: float
    high: float


def named_numbers(boxes: Sequence[BoxSpec], names: Sequence[str] | None) -> tuple[NamedNumber, ...]:
    """Describe every number of the boxes, in the order of flattening.

    Args:
        boxes: Boxes of an observation or an action.
        names: Their names in the order of flattening; None if unknown.
    """
    bounds = [(box.key, low, high) for box in boxes for low, high in zip(box.low, box.high, strict=True)]
    found = []
    for index, (key, low, high) in enumerate(bounds):
        name, unit = (None, None) if names is None else _split(names[index])
        found.append(NamedNumber(index, key, name, unit, low, high))
    return tuple(found)


def read_names(boxes: Sequence[BoxSpec], texts: Sequence[str], field: str) -> Names:
    """Read names as they are given on a command line: `key=name,name …` for a Dict, `name name …` for a Box.

    Args:
        boxes: Boxes of an observation or an action.
        texts: The texts.
        field: Name of the option, for messages.

    Returns:
        The names as `names_of` takes them, which checks the rest.

    Raises:
        ConfigError: the keys are not those of the boxes.
    """
    keys = [box.key for box in boxes if box.key is not None]
    if not keys:
        return tuple(texts)
    form = " ".join(f"{box.key}={_placeholders(box.size)}" for box in boxes)
    given: dict[str, list[str]] = {}
    for text in texts:
        # A key may contain "=": the longest that fits is meant.
        key = max((key for key in keys if text.startswith(f"{key}=")), key=len, default=None)
        if key is None:
            raise ConfigError(f'{field} has "{text}", which begins with no key of the observation; expected {form}.')
        if key in given:
            raise ConfigError(f'{field} has the key "{key}" twice; expected {form}.')
        given[key] = text.removeprefix(f"{key}=").split(",")
    if len(given) < len(keys):
        missing = ", ".join(key for key in keys if key not in given)
        raise ConfigError(f"{field} has no names for {missing}; expected {form}.")
    return given


def names_of(boxes: Sequence[BoxSpec], given: Names, field: str) -> tuple[str, ...]:
    """Check names against the boxes.

    Args:
        boxes: Boxes of an observation or an action.
        given: A list of names for a Box; a mapping from key to such a list for a Dict.
        field: Name of the argument, for messages.

    Returns:
        The names in the order of flattening.

    Raises:
        ConfigError: the names do not fit the boxes: a key is missing or unknown, a list has the wrong length, or a
            name is empty, holds a comma or occurs twice under one key.
    """
    if boxes[0].key is None:
        if isinstance(given, Mapping):
            raise ConfigError(
                f"{field} has the keys {', '.join(given)}; expected a list of {boxes[0].size} names, since it is one "
                "Box without keys."
            )
        return _checked(boxes[0], given, field)
    if not isinstance(given, Mapping):
        form = ", ".join(f'"{box.key}": [{_placeholders(box.size)}]' for box in boxes)
        raise ConfigError(
            f"{field} is one list, whose order over the keys of a Dict could be mistaken; expected {{{form}}}."
        )
    keys = [str(box.key) for box in boxes]
    if set(given) != set(keys):
        missing, extra = [k for k in keys if k not in given], [str(k) for k in given if k not in keys]
        raise ConfigError(
            f"{field}: missing keys {', '.join(missing) or 'none'}, unknown keys {', '.join(extra) or 'none'}; "
            f"expected exactly {', '.join(keys)}."
        )
    return tuple(name for box in boxes for name in _checked(box, given[str(box.key)], field))


def names_metadata(
    observation: Sequence[BoxSpec],
    observation_names: Sequence[str] | None,
    action_names: Sequence[str] | None,
    observation_offset: Sequence[float] = (),
) -> dict[str, str]:
    """Layout, names and offset of a policy's numbers, for its graph's metadata; lists are separated by commas."""
    keyed = [box for box in observation if box.key is not None]
    return {
        "observation_keys": ",".join(str(box.key) for box in keyed),
        "observation_sizes": ",".join(str(box.size) for box in keyed),
        "observation_names": ",".join(observation_names or ()),
        "action_names": ",".join(action_names or ()),
        "observation_offset": ",".join(repr(float(number)) for number in observation_offset),
    }


def check_names(expected: Mapping[str, str], metadata: Mapping[str, str], file: str) -> None:
    """Check what a graph says of its numbers against `config.json`.

    A graph without `spec_sha256` was not exported by this project, and may say nothing.

    Args:
        expected: What `names_metadata` gives for `config.json`.
        metadata: The graph's `metadata_props`.
        file: Name of the graph's file.

    Raises:
        FormatError: they differ.
    """
    exported = "spec_sha256" in metadata
    for name, value in expected.items():
        silent = not exported or name == "observation_sizes"  # graphs of earlier versions lack the sizes
        if name not in metadata and silent:
            continue
        if metadata.get(name, "") != value:
            raise FormatError(
                f"{file}: its {name} are {cut(metadata.get(name, ''), _SHOWN_TEXT) or 'missing'}, but config.json says "
                f"{cut(value, _SHOWN_TEXT) or 'nothing'}. "
                "A number would be taken for another one: export the policy again, with the right names."
            )
    by_key = "observation_sizes" in metadata or not expected["observation_sizes"]
    if exported and not by_key and "observation_names" in metadata:
        warnings.warn(
            f"The observation names of {file} were given as one list, not by key, so that their order may be mistaken. "
            "Check them with `meam info`, or export the policy again.",
            UserWarning,
            stacklevel=2,
        )


def _checked(box: BoxSpec, names: Sequence[str], field: str) -> tuple[str, ...]:
    where = field if box.key is None else f'{field} of "{box.key}"'
    if isinstance(names, str) or not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where} is {names!r}; expected a list of {box.size} texts.")
    if len(names) != box.size:
        raise ConfigError(f"{where} is {len(names)} names ({', '.join(names)}); expected {box.size} names.")
    bad = next((name for name in names if not name.strip() or "," in name), None)
    if bad is not None:
        raise ConfigError(f"{where} has the name {bad!r}; expected names that are not empty and hold no comma.")
    plain = [_split(name)[0] for name in names]
    twice = next((name for name in plain if plain.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f'{where} has "{twice}" twice; expected each name once.')
    return tuple(names)


def _split(name: str) -> tuple[str, str | None]:
    found = _UNIT.fullmatch(name)
    return (name, None) if found is None else (found["name"], found["unit"])


def _placeholders(size: int) -> str:
    return ",".join(["NAME"] * size) if size <= _SHOWN else f"NAME,NAME,… ({size} names)"
