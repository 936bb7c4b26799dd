"""What happened to a policy since it was loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["Health"]


@dataclass
class Health:
    """What happened since the policy was loaded; a vector environment counts once for each of its slots.

    Attributes:
        steps: Actions returned.
        inferences: Runs of the network, each for all slots that needed one.
        bad_observations: Observations with NaN or infinity.
        bad_actions: Chunks with NaN or infinity.
        unfamiliar: Observations above `unfamiliarity_limit`.
        rate_limited: Actions that the rate limit changed.
        replaced: Actions held or neutral instead of the policy's.
        unfamiliarity: Of the last observation, the largest over its slots.
        max_unfamiliarity: The largest so far.
        value: Mean value of the last chosen chunk, the lowest over its slots; NaN unless the graph chooses by value.
        disagreement: Standard deviation of the critics about it, the largest over its slots.
    """

    steps: int = 0
    inferences: int = 0
    bad_observations: int = 0
    bad_actions: int = 0
    unfamiliar: int = 0
    rate_limited: int = 0
    replaced: int = 0
    unfamiliarity: float = 0.0
    max_unfamiliarity: float = 0.0
    value: float = math.nan
    disagreement: float = math.nan

    def to_json(self) -> dict[str, float | int | None]:
        """The counters as JSON data; a number that is not known, or not finite, is null."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}
