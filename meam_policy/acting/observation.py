"""Flattens raw observations of an environment or robot into the one float32 vector that a policy reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy import ma  # np.ma would import it in the first tick, which takes 10 ms
from numpy.typing import NDArray

from meam_policy.acting.arrays import array_of
from meam_policy.errors import ObservationError
from meam_policy.spec import BoxSpec, PolicySpec
from meam_policy.spec.names import named_numbers

__all__ = ["flatten_observation", "lost_digits", "require_finite", "unflatten_observation"]

LOST = 0.01
"""Step between neighbouring numbers, in standard deviations of the training data, above which digits are lost."""


def flatten_observation(spec: PolicySpec, observation: Any, *, finite: bool = True) -> tuple[NDArray[np.float32], bool]:
    """Flatten one observation, or a batch of them, into rows.

    Args:
        spec: The boxes of an observation, in the order in which they are flattened.
        observation: Array-like shaped like the observation box, or a mapping of such arrays for a Dict observation;
            with one leading axis more for a batch. Any real number type, byte order and memory layout; tensors of
            PyTorch too, on the CPU.
        finite: Refuse NaN and infinity.

    Returns:
        Rows [batch, observation_dim] (batch 1 for a single observation) less `spec.observation_offset`, and whether a
        batch was given. The rows never share memory with the input.

    Raises:
        ObservationError: a key is missing or unknown, a shape or type does not fit, or a value is not finite.
    """
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], Mapping):
        raise ObservationError(
            "The observation is a pair (observation, info), as env.reset() returns it; "
            "expected the observation alone: `observation, info = env.reset()`."
        )
    box = spec.observation[0]
    try:
        if box.key is None:
            wide, batched = _rows_of_box(box, observation)
            flat = _in_float32(wide, spec.observation_offset)
        else:
            flat, batched = _rows_of_mapping(spec, observation)
    except MemoryError as error:
        raise ObservationError(f"The batch is too large for this machine ({error}); expected fewer rows.") from error
    if finite:
        require_finite(spec, flat, observation)
    return flat, batched


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
        numbers = _rows_of_box(box, given if box.key is None else given[box.key])[0]
        seen = float(numbers[row, column - int(ends[number]) + box.size])
        if np.isfinite(seen):
            raise ObservationError(
                f"{_name(box)} is {seen:g} at {where}, too large for float32; expected a number within "
                f"±{np.finfo(np.float32).max:.3g}. Check the sensor, and its unit."
            )
    raise ObservationError(
        f"{_name(box)} is {rows[row, column]} at {where}; expected a finite number. Check the sensor."
    )


def _rows_of_mapping(spec: PolicySpec, observation: Any) -> tuple[NDArray[np.float32], bool]:
    parts = _parts_of_mapping(spec, observation)
    wide, batched = zip(*(_rows_of_box(box, value) for box, value in parts), strict=True)
    sizes = {array.shape[0] for array in wide}
    if len(set(batched)) > 1 or len(sizes) > 1:
        shapes = ", ".join(f'"{box.key}" {np.shape(value)}' for box, value in parts)
        raise ObservationError(f"Observation parts have different batch sizes: {shapes}. Give every part the same.")
    rows, start = [], 0
    for array in wide:
        rows.append(_in_float32(array, spec.observation_offset[start : start + array.shape[1]]))
        start += array.shape[1]
    return np.concatenate(rows, axis=1), batched[0]


def _parts_of_mapping(spec: PolicySpec, observation: Any) -> list[tuple[BoxSpec, Any]]:
    keys = [str(box.key) for box in spec.observation]
    if not isinstance(observation, Mapping):
        raise ObservationError(
            f"Observation is a {type(observation).__name__}; expected a mapping with the keys {keys}."
        )
    if set(observation) != set(keys):
        missing, extra = sorted(set(keys) - set(observation)), sorted(set(observation) - set(keys), key=str)
        raise ObservationError(f"Observation keys: missing {missing}, unknown {extra}; expected exactly {keys}.")
    return [(box, observation[box.key]) for box in spec.observation]


def _rows_of_box(box: BoxSpec, value: Any) -> tuple[NDArray[Any], bool]:
    """Rows [batch, size] in their own type, and whether a batch was given."""
    if isinstance(value, ma.MaskedArray) and ma.is_masked(value):
        raise ObservationError(f"{_name(box)} has masked numbers; expected that none is missing.")
    array = array_of(value, _name(box), f"an array of shape {box.shape}")
    if array.dtype.kind not in "fiub":
        raise ObservationError(f"{_name(box)} has type {array.dtype}; expected real numbers of shape {box.shape}.")
    batched = array.ndim == len(box.shape) + 1
    if array.shape != box.shape and not (batched and array.shape[1:] == box.shape and array.shape[0] > 0):
        raise ObservationError(
            f"{_name(box)} has shape {array.shape}, expected {box.shape}, or (batch, *{box.shape}) for a batch. "
            "Check `policy.spec.observation_space`."
        )
    return array.reshape(array.shape[0] if batched else 1, box.size), batched


def _in_float32(rows: NDArray[Any], offset: tuple[float, ...]) -> NDArray[np.float32]:
    """Rows less an offset, if there is one: taken off in float64, of which float32 would keep half the digits."""
    with np.errstate(all="ignore"):
        if offset:
            rows = rows.astype(np.float64) - np.array(offset)
        # astype, not a view: onnxruntime misreads big-endian memory.
        return rows.astype(np.float32, order="C")


def _name(box: BoxSpec) -> str:
    return "Observation" if box.key is None else f'Observation "{box.key}"'
