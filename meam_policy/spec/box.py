"""A Gymnasium `Box` as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from meam_policy.errors import FormatError, SpaceError
from meam_policy.spec.json_reader import JsonReader, require
from meam_policy.typed import typed_fields

__all__ = ["BoxSpec", "read_box"]

MAX_DIMENSION = 2**20

MAX_AXES = 16

DTYPES = (
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
)


@dataclass(frozen=True)
class BoxSpec:
    """A Gymnasium `Box`, as plain data.

    Attributes:
        shape: Shape of one element.
        dtype: NumPy name of the element type, e.g. "float32".
        low: Lower bounds, flattened in C order; -inf for no bound.
        high: Upper bounds, flattened in C order; inf for no bound.
        key: Name in a Dict observation; None for a space that is itself a Box.
    """

    shape: tuple[int, ...]
    dtype: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    key: str | None = None

    def __post_init__(self) -> None:
        """Check that the fields are consistent.

        Raises:
            FormatError: a dimension is out of range, a list of bounds has the wrong length, or low > high.
        """
        typed_fields(self, error=FormatError)
        name = "the box" if self.key is None else f'the box "{self.key}"'
        require(len(self.shape) <= MAX_AXES, f"shape of {name}", f"{len(self.shape)} axes", f"at most {MAX_AXES}")
        for size in self.shape:
            require(1 <= size <= MAX_DIMENSION, f"shape of {name}", list(self.shape), f"sizes 1 to {MAX_DIMENSION}")
        require(self.size <= MAX_DIMENSION, f"shape of {name}", list(self.shape), f"at most {MAX_DIMENSION} numbers")
        require(self.dtype in DTYPES, f"dtype of {name}", repr(self.dtype), f"one of {', '.join(DTYPES)}")
        for side, bounds in (("low", self.low), ("high", self.high)):
            require(len(bounds) == self.size, f"{side} of {name}", f"{len(bounds)} numbers", f"{self.size} numbers")
            impossible = math.inf if side == "low" else -math.inf
            for bound in bounds:
                good = not math.isnan(bound) and bound != impossible
                require(good, f"{side} of {name}", bound, f"numbers, or {-impossible} for no bound")
        for low, high in zip(self.low, self.high, strict=True):
            require(low <= high, f"bounds of {name}", f"low {low} above high {high}", "low <= high")

    @property
    def size(self) -> int:
        """How many numbers one element has."""
        return math.prod(self.shape)

    @classmethod
    def from_space(cls, space: spaces.Box, key: str | None = None) -> BoxSpec:
        """Record a Gymnasium Box.

        Raises:
            SpaceError: the space is not a Box.
        """
        if not isinstance(space, spaces.Box):
            where = "The space" if key is None else f'The space of "{key}"'
            raise SpaceError(f"{where} is {space}; expected a gymnasium Box. Wrap the environment so that it has one.")
        return cls(
            shape=tuple(int(n) for n in space.shape),
            dtype=str(space.dtype),
            low=tuple(float(b) for b in np.ravel(space.low)),
            high=tuple(float(b) for b in np.ravel(space.high)),
            key=key,
        )

    def to_space(self) -> spaces.Box:
        """Build the Gymnasium Box."""
        low, high = (self._array(bounds) for bounds in (self.low, self.high))
        return spaces.Box(low, high, shape=self.shape, dtype=low.dtype.type)

    def _array(self, bounds: tuple[float, ...]) -> NDArray[Any]:
        dtype = np.dtype(self.dtype)
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                return np.asarray(bounds, dtype=np.float64).astype(dtype).reshape(self.shape)
        # Exact integers: the largest int64 is not a float64, and no integer is infinite.
        least, most = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return np.array([int(min(max(b, least), most)) for b in bounds], dtype=dtype).reshape(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; an infinite bound becomes null, since JSON has no infinity."""
        return {
            "key": self.key,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "low": [b if math.isfinite(b) else None for b in self.low],
            "high": [b if math.isfinite(b) else None for b in self.high],
        }


def read_box(data: Any, name: str) -> BoxSpec:
    """Read what `BoxSpec.to_json` wrote.

    Raises:
        FormatError: a field is missing, unknown or of the wrong type; the message begins with `name`.
    """
    read = JsonReader.of(data, name)
    read.only([f.name for f in fields(BoxSpec)])
    shape = read.get("shape", list, "a list of integers")
    for size in shape:
        if type(size) is not int:
            read.fail("shape", size, "a list of integers")
    return BoxSpec(
        shape=tuple(shape),
        dtype=read.text("dtype"),
        low=read.bounds("low", -math.inf),
        high=read.bounds("high", math.inf),
        key=read.optional_text("key"),
    )
