"""Counters of what happened since a policy was loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Health", "note_values"]


@dataclass
class Health:
    """What happened since the policy was loaded; a vector environment counts once for each of its slots.

    Every field is a finite number, or None where it is not known: `json.dumps(dataclasses.asdict(health))` is JSON.

    Attributes:
        steps: Actions returned.
        inferences: Runs of the network, each for all slots that needed one.
        bad_observations: Observations with NaN or infinity.
        bad_actions: Chunks with NaN or infinity.
        out_of_bounds: Chunks with an action beyond the bounds, which was clamped: a graph that was exported returns
            none.
        unfamiliar: Observations above `unfamiliarity_limit`.
        limited: Actions that the limits of the robot's contract changed.
        rate_limited: Actions that the rate limit changed.
        replaced: Actions that were held, neutral or the home pose in place of the policy's.
        unfamiliarity: Unfamiliarity of the last observation, the largest over its slots, in standard deviations of the
            training data; None before the first observation. Capped at the largest float64.
        max_unfamiliarity: The largest so far; None before the first observation.
        value: Mean value of the last chosen chunk, the lowest over its slots; None before the first, where the graph
            does not choose by value, and where it is not finite.
        disagreement: Standard deviation of the critics about it, the largest over its slots; None as `value`.
    """

    steps: int = 0
    inferences: int = 0
    bad_observations: int = 0
    bad_actions: int = 0
    out_of_bounds: int = 0
    unfamiliar: int = 0
    limited: int = 0
    rate_limited: int = 0
    replaced: int = 0
    unfamiliarity: float | None = None
    max_unfamiliarity: float | None = None
    value: float | None = None
    disagreement: float | None = None

    def to_json(self) -> dict[str, float | int | None]:
        """The fields as JSON data; what is not known is null."""
        return asdict(self)


def note_values(health: Health, values: NDArray[np.float32], disagreements: NDArray[np.float32]) -> None:
    """Record the values of the chosen chunks [slots], and how far the critics disagree about each [slots]."""
    health.value, health.disagreement = _finite(values.min()), _finite(disagreements.max())


def _finite(number: np.float32) -> float | None:
    return float(number) if np.isfinite(number) else None
