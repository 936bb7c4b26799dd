"""The arrays of a small safetensors file, read strictly; the runtime does not depend on safetensors."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import FormatError

__all__ = ["check_arrays", "read_arrays", "read_metadata"]

MAX_HEADER_BYTES = 2**20
"""Some hundreds of bytes describe an array."""

MAX_AXES = 16
_LENGTH_BYTES, _FLOAT_BYTES = 8, 4


def read_arrays(data: bytes, name: str) -> dict[str, NDArray[np.float32]]:
    """Read float32 arrays from the bytes of a safetensors file, after `check_arrays`, with its arguments and errors.

    Returns:
        The arrays by name, as copies.
    """
    values = memoryview(data)[_LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little") :]
    return {
        key: np.frombuffer(values[start:end], "<f4").astype(np.float32).reshape(shape)
        for key, (shape, start, end) in check_arrays(data, name).items()
    }


def read_metadata(data: bytes, name: str) -> dict[str, str]:
    """Read the texts that a safetensors file keeps beside its arrays, after `check_arrays`; empty if it has none."""
    check_arrays(data, name)
    header = data[_LENGTH_BYTES : _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")]
    return json.loads(header).get("__metadata__", {})


def check_arrays(data: bytes, name: str, *, empty: bool = False) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Check the bytes of a safetensors file: that its header describes what follows it, and nothing else.

    Stricter than the format: other element types than float32 and fields that the format does not define are refused,
    and so are arrays without elements unless they are allowed. What is accepted, the safetensors library reads in the
    same way.

    Args:
        data: The whole file.
        name: Name of the file in error messages.
        empty: Whether an array may have no elements, as a buffer of a network may.

    Returns:
        Shape, first byte and end of every array, by name, counted from the end of the header.

    Raises:
        FormatError: the file is not safetensors, is truncated, or holds anything but float32 arrays.
    """
    if data.startswith(b"version https://git-lfs"):
        raise FormatError(f"{name} is a git-lfs pointer, not the file. Run `git lfs pull`.")
    if len(data) < _LENGTH_BYTES:
        _refuse(name, f"it has {len(data)} bytes; expected a header's length of {_LENGTH_BYTES}")
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    most = min(len(data) - _LENGTH_BYTES, MAX_HEADER_BYTES)
    if length > most:
        _refuse(name, f"its header is {length} bytes long; expected at most {most}")
    size = len(data) - _LENGTH_BYTES - length
    position = 0
    entries = _read_header(data[_LENGTH_BYTES : _LENGTH_BYTES + length], name, 0 if empty else 1)
    for key, (shape, start, end) in sorted(entries.items(), key=lambda entry: entry[1][1]):
        if start != position or end > size:
            _refuse(name, f'"{key}" is at bytes {start} to {end} of {size}; expected it to begin at {position}')
        if end - start != _FLOAT_BYTES * math.prod(shape):
            _refuse(name, f'"{key}" has {end - start} bytes; expected those of a float32 array {list(shape)}')
        position = end
    if position != size:
        _refuse(name, f"{size - position} bytes follow its last array; expected none")
    return entries


def _read_header(header: bytes, name: str, least: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Shape, first byte and end of every array."""
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique, parse_int=_natural)
        json.dumps(entries, ensure_ascii=False).encode()  # refuses half a surrogate pair, which is no text
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, ValueError) else "it is nested too deeply"
        raise FormatError(
            f"{name} is not a valid safetensors file: its header is not JSON ({reason[:80]}). "
            "Download or export the policy again."
        ) from error
    if not isinstance(entries, dict) or not header.startswith(b"{"):
        _refuse(name, "its header is not an object of arrays")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(name, "its __metadata__ is not an object of texts")
    return {key: _read_entry(entry, f'{name}: "{key}"', least) for key, entry in entries.items()}


def _read_entry(entry: Any, name: str, least: int) -> tuple[tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(name, "it is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype != "F32":
        raise FormatError(f"{name} has the dtype {str(dtype)[:20]!r}; expected F32. Export the policy again.")
    sizes = isinstance(shape, list) and len(shape) <= MAX_AXES
    if not sizes or not all(type(size) is int and size >= least for size in shape):
        _refuse(name, f"its shape is {str(shape)[:60]}; expected at most {MAX_AXES} sizes of {least} or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        _refuse(name, f"its data_offsets are {str(offsets)[:60]}; expected two numbers")
    return tuple(shape), offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _natural(digits: str) -> int:
    # Not `int` alone, which reads "-0" as well; the file has no use for more digits than an offset can have.
    if digits.startswith("-") or len(digits) > 19:
        raise ValueError(f"{digits[:20]} is not a size")
    return int(digits)


def _refuse(name: str, reason: str) -> NoReturn:
    raise FormatError(f"{name} is not a valid safetensors file: {reason}. Download or export the policy again.")
