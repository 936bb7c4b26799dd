"""The messages of a flight file, as JSON.

Numbers are written so that they read back bit for bit: whole numbers as they are, and float16, float32 and float64 as
the shortest decimal of the same float64. JSON has no NaN and no infinity: they are the texts "NaN", "Infinity" and
"-Infinity", as in the JSON of Protocol Buffers. Signs and payloads of NaN are not kept.

Every property of the schemas has a type, and the items of every array are scalars or objects: viewers ask for that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORMAT", "METADATA", "TOPICS", "encode", "numbers"]

FORMAT = "1"
"""Version of these messages."""

METADATA = "meam_flight"
"""Name of the metadata record with the policy's identity and the loop's settings."""

_NUMBER: dict[str, Any] = {"type": "number"}
_WHOLE: dict[str, Any] = {"type": "integer"}
_ROW: dict[str, Any] = {"type": "array", "items": _NUMBER}
_WHOLES: dict[str, Any] = {"type": "array", "items": _WHOLE}
_TEXT: dict[str, Any] = {"type": "string"}


def _object(description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "description": description, "properties": properties}


def _array_of(description: str) -> dict[str, Any]:
    shape = _WHOLES | {"description": "Left out where there is one axis"}
    return _object(description, values=_ROW | {"description": "In C order"}, shape=shape)


TOPICS: Mapping[str, dict[str, Any]] = {
    "tick": _object(
        "One tick: what was seen, and what was done. What does not apply is left out.",
        episode=_WHOLE | {"description": "Episodes begun before this one"},
        tick=_WHOLE | {"description": "Tick of the episode; those whose time passed are counted"},
        observation=_array_of("As it was given: an array, or an object of such arrays by their keys"),
        age_s=_NUMBER | {"description": "Age of the observation, seconds, where it had a timestamp"},
        pause=_NUMBER | {"description": "Periods since the last action, where they were not about one"},
        skipped=_WHOLE | {"description": "Ticks whose deadlines passed before this one"},
        asked=_WHOLE | {"description": "Number of the inference that was asked for in this tick"},
        arrived=_WHOLES | {"description": "Numbers of the inferences that arrived"},
        chosen=_ROW | {"description": "The action before the policy's limits, in C order"},
        action=_ROW | {"description": "The action that was given, in C order"},
        delay=_WHOLE | {"description": "Ticks that the next inference is expected to take"},
        events={"type": "array", "items": _TEXT, "description": "What LoopHealth counted"},
        error=_object("What the tick raised instead", type=_TEXT, message=_TEXT),
        noise=_ROW | {"description": "Of an evaluation: the noise that was drawn"},
        reward=_NUMBER | {"description": "Of an evaluation"},
        terminated={"type": "boolean", "description": "Of an evaluation"},
        latency_ms=_NUMBER | {"description": "Of an evaluation: duration of the call"},
    ),
    "inference": _object(
        "One inference, when it arrived.",
        number=_WHOLE,
        episode=_WHOLE,
        tick=_WHOLE | {"description": "The tick of its observation"},
        opening={"type": "boolean", "description": "Whether it opens the episode"},
        noise=_ROW | {"description": "What it started from"},
        prefix=_array_of("Actions that it continues"),
        prefix_weight=_ROW,
        chunk=_array_of("Its actions"),
        seconds=_NUMBER | {"description": "How long it took"},
        delays=_WHOLES | {"description": "Delays of the inferences before it, ticks"},
        expected=_WHOLE | {"description": "The delay that was expected of it"},
        error=_object("Why there is no chunk", type=_TEXT, message=_TEXT),
    ),
    "event": _object(
        "What happened between ticks.",
        kind=_TEXT | {"description": "begin (the loop was made), episode, neutral, stop, end or dropped"},
        episode=_WHOLE,
        reset={"type": "boolean", "description": "Of episode: whether the policy was reset"},
        action=_ROW | {"description": "Of neutral: the action that was sent"},
        reason=_TEXT,
        records=_WHOLE | {"description": "Of dropped: how many records are missing here"},
        observation=_array_of("Of end: the last observation of an evaluation's episode"),
        truncated={"type": "boolean", "description": "Of end"},
    ),
}
"""JSON schemas of the messages, by topic."""


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as JSON; what is None is left out."""
    plain = {name: _field(name, value) for name, value in message.items() if value is not None}
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()


_ROWS = {name for topic in TOPICS.values() for name, field in topic["properties"].items() if field["type"] == "array"}


def _field(name: str, value: Any) -> Any:
    if name == "observation":
        return _seen(value)
    return _listed(value.ravel()) if name in _ROWS and isinstance(value, np.ndarray) else _plain(value)


def _seen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _seen(part) for name, part in value.items()}
    return _shaped(_array(value))


def _shaped(array: NDArray[Any]) -> dict[str, Any]:
    if array.dtype.kind not in "biuf":
        return {"values": f"no numbers: {array.dtype} {array.shape}"}
    values = {"values": _listed(array.ravel())}
    return values if array.ndim == 1 else {**values, "shape": list(array.shape)}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _shaped(value) if value.ndim > 1 else _listed(value)
    if isinstance(value, float):
        return _spelled(float(value))
    if isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list) and all(isinstance(each, (str, int)) for each in value):
        return value
    return _listed(_array(value))


def _array(value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value.detach() if hasattr(value, "detach") else value)
    except Exception:  # ragged, on another device, or no numbers at all: an observation may be anything
        return np.asarray(None)


def _listed(array: NDArray[Any]) -> Any:
    kind = array.dtype.kind
    if kind == "b":
        return array.astype(np.int64).tolist()
    if kind in "iu":
        return array.tolist()
    if kind != "f":
        return f"no numbers: {array.dtype} {array.shape}"
    listed = array.astype(np.float64).tolist()
    return listed if np.isfinite(array).all() else _spelled(listed)


def _spelled(value: Any) -> Any:
    if isinstance(value, list):
        return [_spelled(each) for each in value]
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def numbers(value: Any) -> NDArray[Any]:
    """The array that a message's value holds: whole numbers as such, all else as float64.

    Raises:
        ValueError: it holds something else than numbers, or another number of them than its shape says.
    """
    if isinstance(value, Mapping):
        array = numbers(value.get("values"))
        return array.reshape([int(size) for size in value["shape"]]) if "shape" in value else array
    array = np.array(value)
    if array.dtype.kind == "f" and isinstance(value, list) and all(type(each) is int and each >= 0 for each in value):
        array = np.array(value, np.uint64)  # NumPy takes floats for small whole numbers beside large ones
    if array.dtype.kind == "U":
        array = np.vectorize(float, otypes=[np.float64])(np.array(value, dtype=object))
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{str(value)[:60]}; expected numbers")
    return array if array.dtype.kind in "iu" else array.astype(np.float64)
