"""Arrays from whatever holds numbers: lists, arrays, and tensors of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import MeamError, ObservationError
from meam_policy.typed import shown

__all__ = ["array_of", "is_real"]

_MOST_WHOLE = 2**63
"""What int64 holds no more; NumPy keeps a list with a larger number as Python's objects."""


def is_real(array: NDArray[Any]) -> bool:
    """Whether an array holds real numbers, of any type but Python's objects."""
    return array.dtype.kind in "fiub"


def array_of(
    value: Any, name: str, expected: str, error: Callable[[str], MeamError] = ObservationError
) -> NDArray[Any]:
    """Convert an array-like to an array; a tensor must be on the CPU, and loses its gradient.

    Args:
        value: Array-like, or an object of another library that NumPy can read.
        name: Name in messages.
        expected: What is expected, for messages.
        error: What to raise.

    Raises:
        ObservationError: it is ragged, on another device, has a whole number that no array holds, or is nothing that
            NumPy can read; or `error` instead.
    """
    if hasattr(value, "detach"):  # PyTorch's, which is not imported here
        value = value.detach()
        if str(value.device) != "cpu":
            raise error(
                f"{name} is a tensor on {value.device}; expected {expected} on the CPU, where policies take their "
                "observations: give tensor.cpu()."
            )
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no such type
            value = value.float()
    try:
        array = np.asarray(value)
    except ValueError as refusal:
        raise error(f"{name} is ragged; expected {expected}.") from refusal
    except (TypeError, RuntimeError) as refusal:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise error(
            f"{name} is a {kind}, which NumPy cannot read ({str(refusal)[:200]}); expected {expected}. Convert it to a "
            "NumPy array first."
        ) from refusal
    if array.dtype == object:
        huge = next((each for each in array.flat if isinstance(each, int) and abs(each) >= _MOST_WHOLE), None)
        if huge is not None:
            raise error(
                f"{name} has the whole number {shown(huge)}, too large for an array of whole numbers; expected "
                f"{expected}, larger ones as floats."
            )
    return array
