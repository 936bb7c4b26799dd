"""The messages of a flight as replay needs them, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from meam_policy.errors import FormatError
from meam_policy.flight import Flight, FlightRecord
from meam_policy.flight.schema import numbers

__all__ = ["Answered", "Ticked", "checked", "in_type", "numbered", "observation_of"]

T = TypeVar("T")


class Ticked(NamedTuple):
    """A message of the topic "tick"; see `flight.schema`."""

    episode: int
    tick: int
    observation: Any
    age: float | None
    pause: float | None
    skipped: int
    asked: int | None
    arrived: list[int]
    chosen: NDArray[Any] | None
    action: NDArray[Any] | None
    events: list[str]
    error: str | None
    noise: NDArray[Any] | None

    @classmethod
    def of(cls, record: FlightRecord) -> Ticked:
        """Read one.

        Raises:
            FormatError: a field is missing, or of another type.
        """
        message = record.message
        return checked(
            record,
            lambda: cls(
                episode=_whole(message["episode"]),
                tick=_whole(message["tick"]),
                observation=observation_of(message.get("observation")),
                age=_real(message.get("age_s")),
                pause=_real(message.get("pause")),
                skipped=_whole(message.get("skipped", 0)),
                asked=_optional(message.get("asked"), _whole),
                arrived=[_whole(each) for each in message.get("arrived", [])],
                chosen=_optional(message.get("chosen"), numbers),
                action=_optional(message.get("action"), numbers),
                events=[str(event) for event in message.get("events", [])],
                error=_optional(message.get("error"), lambda error: str(error["type"])),
                noise=_optional(message.get("noise"), numbers),
            ),
        )


class Answered(NamedTuple):
    """A message of the topic "inference"; see `flight.schema`."""

    number: int
    tick: int
    opening: bool
    noise: NDArray[np.float32] | None
    prefix: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    chunk: NDArray[Any] | None
    seconds: float | None
    delays: list[int]
    expected: int
    error: str | None

    @classmethod
    def of(cls, record: FlightRecord) -> Answered:
        """Read one.

        Raises:
            FormatError: a field is missing, or of another type.
        """
        message = record.message

        def single(name: str) -> NDArray[np.float32] | None:
            return _optional(message.get(name), lambda value: in_type(numbers(value), np.float32))

        def read() -> Answered:
            prefix, weight = single("prefix"), single("prefix_weight")
            return cls(
                number=_whole(message["number"]),
                tick=_whole(message["tick"]),
                opening=bool(message["opening"]),
                noise=single("noise"),
                prefix=None if prefix is None or weight is None else (prefix, weight),
                chunk=_optional(message.get("chunk"), numbers),
                seconds=_real(message.get("seconds")),
                delays=[_whole(each) for each in message.get("delays", [])],
                expected=_whole(message["expected"]),
                error=_optional(message.get("error"), lambda error: f"{error['type']}: {error['message']}"),
            )

        return checked(record, read)


def observation_of(value: Any) -> Any:
    """An observation as it was given, in float64; None for one that held no numbers.

    Raises:
        TypeError: it is no object, as `flight.schema` has it.
        ValueError: it has another number of values than its shape says.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40}; expected an observation as an object")
    values = value.get("values", value)
    if isinstance(values, Mapping):  # parts by their keys, one of which may be "values"
        return {name: observation_of(part) for name, part in value.items()}
    return None if isinstance(values, str) else numbers(value)


def in_type(array: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """An array in another type; a number beyond that becomes one that the policy refuses, or that differs."""
    with np.errstate(all="ignore"):
        return array.astype(dtype)


def numbered(flight: Flight) -> Iterator[tuple[FlightRecord, int]]:
    """The records without those that say what was dropped, and how many are missing before each."""
    expected = 0
    for record in flight.records:
        if record.topic != "event" or record.message.get("kind") != "dropped":
            yield record, (record.number - expected) % 2**32
            expected = record.number + 1


def checked(record: FlightRecord, read: Callable[[], T]) -> T:
    """What of a record is read.

    Raises:
        FormatError: a field is missing, or of another type.
    """
    try:
        return read()
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(
            f"Record {record.number} of the flight, a message of {record.topic}, has a field that is missing or of "
            f"another type ({type(error).__name__}: {str(error)[:80]}); expected one that this package recorded."
        ) from error


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) >= 2**53:
        raise TypeError(f"{value!r:.40}; expected a whole number")
    return value


def _real(value: Any) -> float | None:
    return None if value is None else float(value)


def _optional(value: Any, read: Callable[[Any], T]) -> T | None:
    return None if value is None else read(value)
