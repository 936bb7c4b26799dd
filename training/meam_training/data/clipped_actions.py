"""What was clipped of recorded actions when they were read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClippedEpisode", "clipped_in"]


class ClippedEpisode(NamedTuple):
    """What was clipped in one episode.

    Attributes:
        episode: Its number.
        rows: Rows of it of which an action was clipped.
        excess: Largest distance of an action from its bounds, environment units.
        number: Index of the number of the action that was so far out.
    """

    episode: int
    rows: int
    excess: float
    number: int


def clipped_in(clipped: Iterable[ClippedEpisode], chosen: NDArray[np.int64]) -> tuple[ClippedEpisode, ...]:
    """What was clipped in chosen episodes, renumbered by their order."""
    place = {int(episode): index for index, episode in enumerate(chosen)}
    found = (each._replace(episode=place[each.episode]) for each in clipped if each.episode in place)
    return tuple(sorted(found))
