"""Flattens raw observations of an environment or robot into the one float32 vector that a policy reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy import ma  # np.ma would import it in the first tick, which takes 10 ms
from numpy.typing import NDArray

from meam_policy.acting.arrays import array_of, is_real
from meam_policy.errors import ObservationError
from meam_policy.spec import BoxSpec, PolicySpec
from meam_policy.spec.names import named_numbers

__all__ = ["ObservationReader", "flatten_observation", "lost_digits", "require_finite", "unflatten_observation"]

_FLOAT32 = np.dtype(np.float32)

LOST = 0.01
"""Step between neighbouring numbers, in standard deviations of the training data, above which digits are lost."""


def flatten_observation(spec: PolicySpec, observation: Any, *, finite: bool = True) -> tuple[NDArray[np.float32], bool]:
    """Flatten one observation, or a batch of them, into rows; `ObservationReader` does it at once for many.

    Args:
        spec: The boxes of an observation, in the order in which they are flattened.
        observation: As `ObservationReader.read` takes it.
        finite: Refuse NaN and infinity.

    Returns:
        Rows [batch, observation_dim] and whether a batch was given, as `ObservationReader.read`.

    Raises:
        ObservationError: as `ObservationReader.read`.
    """
    return ObservationReader(spec).read(observation, finite=finite)


class ObservationReader:
    """Flattens the observations of one policy, one after the other.

    Args:
        spec: The boxes of an observation, in the order in which they are flattened.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._spec, self._keyed = spec, spec.observation[0].key is not None
        # Of an observation of float32 that is nothing but copied.
        self._plain = None if self._keyed or spec.observation_offset else spec.observation[0].shape
        self._parts: list[_Part] = []
        start = 0
        for box in spec.observation:
            end = start + box.size
            offset = np.array(spec.observation_offset[start:end]) if spec.observation_offset else None
            self._parts.append(_Part(box, box.shape, box.size, offset))
            start = end

    def read(self, observation: Any, *, finite: bool = True) -> tuple[NDArray[np.float32], bool]:
        """Flatten one observation, or a batch of them, into rows.

        Args:
            observation: Array-like shaped like the observation box, or a mapping of such arrays for a Dict observation;
                with one leading axis more for a batch. Any real number type, byte order and memory layout; tensors of
                PyTorch too, on the CPU.
            finite: Refuse NaN and infinity.

        Returns:
            Rows [batch, observation_dim] (batch 1 for a single observation) less `spec.observation_offset`, and whether
            a batch was given. The rows never share memory with the input.

        Raises:
            ObservationError: a key is missing or unknown, a shape or type does not fit, or a value is not finite.
        """
        if type(observation) is np.ndarray and observation.dtype is _FLOAT32 and observation.shape == self._plain:
            rows, batched = observation.astype(_FLOAT32, "C").reshape(1, -1), False  # all that would be done with it
        else:
            rows, batched = self._rows_of_any(observation)
        if finite:
            require_finite(self._spec, rows, observation)
        return rows, batched

    def _rows_of_any(self, observation: Any) -> tuple[NDArray[np.float32], bool]:
        if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], Mapping):
            raise ObservationError(
                "The observation is a pair (observation, info), as env.reset() returns it; "
                "expected the observation alone: `observation, info = env.reset()`."
            )
        try:
            return self._rows_of_mapping(observation) if self._keyed else _rows(self._parts[0], observation)
        except MemoryError as error:
            raise ObservationError(
                f"The batch is too large for this machine ({error}); expected fewer rows."
            ) from error

    def _rows_of_mapping(self, observation: Any) -> tuple[NDArray[np.float32], bool]:
        if not isinstance(observation, Mapping):
            keys = [part.box.key for part in self._parts]
            raise ObservationError(
                f"Observation is a {type(observation).__name__}; expected a mapping with the keys {keys}."
            )
        if len(observation) != len(self._parts) or any(part.box.key not in observation for part in self._parts):
            keys = [str(part.box.key) for part in self._parts]
            missing, extra = sorted(set(keys) - set(observation)), sorted(set(observation) - set(keys), key=str)
            raise ObservationError(f"Observation keys: missing {missing}, unknown {extra}; expected exactly {keys}.")
        found = [_rows(part, observation[part.box.key]) for part in self._parts]
        first, batched = found[0]
        if any(len(rows) != len(first) or other != batched for rows, other in found):
            shown = ", ".join(f'"{part.box.key}" {np.shape(observation[part.box.key])}' for part in self._parts)
            raise ObservationError(f"Observation parts have different batch sizes: {shown}. Give every part the same.")
        return np.concatenate([rows for rows, _ in found], axis=1), batched


class _Part(NamedTuple):
    """A box, what is asked of it in every call, and its part of the offset."""

    box: BoxSpec
    shape: tuple[int, ...]
    size: int
    offset: NDArray[np.float64] | None


def _rows(part: _Part, value: Any) -> tuple[NDArray[np.float32], bool]:
    """Rows [batch, size] of one box, fresh, and whether a batch was given."""
    array = _array_of_box(part.box, value)
    batched = array.shape != part.shape
    wide, offset = array.reshape(len(array) if batched else 1, part.size), part.offset
    # astype, not a view: onnxruntime misreads big-endian memory.
    if offset is None and (wide.dtype.itemsize == 4 or wide.dtype.kind != "f"):
        return wide.astype(np.float32, order="C"), batched
    with np.errstate(all="ignore"):  # float32 may not hold it
        if offset is not None:  # taken off in float64, of which float32 would keep half the digits
            wide = wide.astype(np.float64) - offset
        return wide.astype(np.float32, order="C"), batched


def unflatten_observation(spec: PolicySpec, row: NDArray[Any]) -> Any:
    """The observation that one flat row [observation_dim] is of: an array, or a dict of arrays, in the row's type."""
    parts = np.split(row, np.cumsum([box.size for box in spec.observation])[:-1])
    found = {box.key: part.reshape(box.shape) for box, part in zip(spec.observation, parts, strict=True)}
    return found.get(None, found)


def lost_digits(spec: PolicySpec, observation: Any) -> str | None:
    """What an observation has lost before it came, by its type, of a number that has an offset.

    Args:
        spec: The policy's spec.
        observation: One that `flatten_observation` takes.

    Returns:
        A sentence that names the number that has lost most, how far apart its values are in that type, and what to do;
        None if the steps are below `LOST` standard deviations.
    """
    worst, sentence, start = LOST, None, 0
    for box in spec.observation:
        part = observation if box.key is None else observation[box.key]
        kind, end = array_of(part, _name(box), "numbers").dtype, start + box.size
        offset = spec.observation_offset[start:end]
        if kind.kind == "f" and kind.itemsize < 8 and any(offset):
            offset, deviation = np.array(offset), np.array(spec.observation_std[start:end])
            # Beyond the range of the type the step is NaN, and the observation is refused.
            with np.errstate(all="ignore"):
                steps = np.where(offset == 0, 0.0, np.spacing(np.abs(offset).astype(kind)).astype(np.float64))
            index = int(np.argmax(steps / deviation))
            if steps[index] / deviation[index] > worst:
                worst = steps[index] / deviation[index]
                number = named_numbers(spec.observation, spec.observation_names)[start + index]
                where = f"index {index}" if number.name is None else f'index {index}, "{number.name}",'
                sentence = (
                    f"{_name(box)} is {kind}, in which the number at {where} near {offset[index]:.10g} has steps of "
                    f"{steps[index]:.3g}{'' if number.unit is None else f' {number.unit}'}: {worst:.2g} standard "
                    "deviations of the training data. The policy cannot tell smaller differences. Give observations in "
                    "float64, from the sensor on."
                )
        start = end
    return sentence


def require_finite(spec: PolicySpec, rows: NDArray[np.float32], given: Any = None) -> None:
    """Check that rows [batch, observation_dim] hold no NaN and no infinity.

    Args:
        spec: The boxes of an observation.
        rows: What `flatten_observation` made of it.
        given: The observation as it was given, by which a number that is too large for float32 is told from infinity.

    Raises:
        ObservationError: one does; the message names the first such number by its key and index.
    """
    if np.isfinite(rows).all():
        return
    row, column = (int(i) for i in np.argwhere(~np.isfinite(rows))[0])
    ends = np.cumsum([box.size for box in spec.observation])
    number = int(np.searchsorted(ends, column, side="right"))
    box = spec.observation[number]
    index = [int(i) for i in np.unravel_index(column - int(ends[number]) + box.size, box.shape)]
    where = f"index {index}" + (f" of batch row {row}" if len(rows) > 1 else "")
    if given is not None:
        numbers = _array_of_box(box, given if box.key is None else given[box.key]).reshape(-1, box.size)
        seen = float(numbers[row, column - int(ends[number]) + box.size])
        if np.isfinite(seen):
            raise ObservationError(
                f"{_name(box)} is {seen:g} at {where}, too large for float32; expected a number within "
                f"±{np.finfo(np.float32).max:.3g}. Check the sensor, and its unit."
            )
    raise ObservationError(
        f"{_name(box)} is {rows[row, column]} at {where}; expected a finite number. Check the sensor."
    )


def _array_of_box(box: BoxSpec, value: Any) -> NDArray[Any]:
    """An observation of one box in its own type and shape, or a batch of them with one axis more."""
    if type(value) is np.ndarray and is_real(value):
        array = value
    else:
        if isinstance(value, ma.MaskedArray) and ma.is_masked(value):
            raise ObservationError(f"{_name(box)} has masked numbers; expected that none is missing.")
        array = array_of(value, _name(box), f"an array of shape {box.shape}")
        if not is_real(array):
            raise ObservationError(f"{_name(box)} has type {array.dtype}; expected real numbers of shape {box.shape}.")
    shape = array.shape
    if shape != box.shape and not (shape and shape[0] > 0 and shape[1:] == box.shape):
        raise ObservationError(
            f"{_name(box)} has shape {shape}, expected {box.shape}, or (batch, *{box.shape}) for a batch. "
            "Check `policy.spec.observation_space`."
        )
    return array


def _name(box: BoxSpec) -> str:
    return "Observation" if box.key is None else f'Observation "{box.key}"'
