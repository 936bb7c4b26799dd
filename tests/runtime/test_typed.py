"""Arguments and fields of other types than their annotations are refused by name; NumPy's scalars are Python's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy.errors import ConfigError, FormatError
from meam_policy.typed import typed, typed_fields


class Named(Protocol):
    name: str


@typed("raw")
def _function(
    whole: int = 0,
    number: float | None = None,
    switch: bool = False,
    *,
    numbers: float | Sequence[float] = (),
    names: tuple[str, ...] = (),
    pair: tuple[int, str] = (1, "a"),
    table: Mapping[str, int] | None = None,
    path: str | os.PathLike[str] = ".",
    choice: Literal["a", "b"] = "a",
    report: Callable[[int], None] | None = None,
    named: Named | None = None,
    raw: int = 0,
    **more: Any,
) -> tuple[Any, ...]:
    """What it was given."""
    return whole, number, switch, numbers, names, pair, table, path, choice, report, named, raw, more


function: Any = _function
"""As a caller without a type checker sees it."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"whole": "2"}, r"whole is '2' \(str\); expected a whole number\."),
        ({"whole": True}, r"whole is True \(bool\); expected a whole number\."),
        ({"whole": 1.0}, r"whole is 1\.0 \(float\); expected a whole number\."),
        ({"whole": 2**63}, r"whole is 9223372036854775808 \(int\); expected a whole number\."),
        ({"whole": None}, r"whole is None; expected a whole number\."),
        ({"number": "1"}, r"number is '1' \(str\); expected a number or None\."),
        ({"number": 10**400}, r"number is about 1e400 \(int\); expected a number or None\."),
        ({"switch": 1}, r"switch is 1 \(int\); expected true or false\."),
        (
            {"numbers": [1.0, "2"]},
            r"numbers is \[1\.0, '2'\] \(list\); expected a number or a sequence",
        ),
        ({"numbers": "12"}, r"numbers is '12' \(str\)"),
        ({"names": ["a"]}, r"names is \['a'\] \(list\); expected a tuple, each of it text\."),
        ({"pair": (1,)}, r"pair is \(1,\) \(tuple\); expected a tuple\."),
        ({"table": {"a": "b"}}, r"table is \{'a': 'b'\} \(dict\); expected a mapping or None\."),
        ({"path": 3}, r"path is 3 \(int\); expected text or a path\."),
        ({"choice": 3}, r"choice is 3 \(int\); expected one of a, b\."),
        ({"report": 3}, r"report is 3 \(int\); expected a function or None\."),
        ({"named": 3}, r"named is 3 \(int\); expected something with name or None\."),
    ],
)
def test_what_is_of_another_type_is_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        function(**arguments)


def test_what_fits_passes_as_it_is():
    folder, report = Path("a"), print
    passed = function(3, 2, True, numbers=[2.5], table={"a": 1}, path=folder, report=report, named=folder, raw="x", z=1)
    assert passed == (3, 2, True, [2.5], (), (1, "a"), {"a": 1}, folder, "a", report, folder, "x", {"z": 1})


def test_a_wrong_number_of_arguments_is_pythons_own_error():
    with pytest.raises(TypeError, match="too many positional arguments"):
        function(1, 2, True, 4)


@given(st.sampled_from([np.int8, np.uint16, np.int64]), st.integers(0, 127))
def test_whole_numbers_of_numpy_become_pythons(kind, value):
    whole, number, *_ = function(kind(value), kind(value))
    assert (type(whole), whole, number) == (int, value, value)


@given(st.floats(width=32, allow_nan=False))
def test_numbers_of_numpy_become_pythons(value):
    _, number, _, numbers, *_ = function(number=np.float32(value), numbers=np.array([value]))
    assert (type(number), number, numbers) == (float, value, [value])
    assert function(switch=np.True_)[2] is True


@dataclass(frozen=True)
class _Record:
    count: int
    other: int = 0

    def __post_init__(self) -> None:
        typed_fields(self, "other", error=FormatError, prefix="the record's ")


Record: Any = _Record


def test_fields_are_checked_and_numpys_numbers_replaced():
    assert type(Record(np.int64(2)).count) is int
    assert Record(2, "free").other == "free"
    with pytest.raises(FormatError, match=r"the record's count is '2' \(str\); expected a whole number\."):
        Record("2")
