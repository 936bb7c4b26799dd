"""What a replay found."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Difference", "ReplayReport"]


@dataclass(frozen=True)
class Difference:
    """Where a replay first gave something else than was recorded.

    Attributes:
        record: Number of the record in the file.
        episode: Number of the episode.
        tick: The tick of the episode.
        what: What differs, a short noun.
        reason: Why, as far as the recording tells.
    """

    record: int
    episode: int
    tick: int
    what: str
    reason: str


@dataclass(frozen=True)
class ReplayReport:
    """Actions computed again from a recording, and compared bit for bit.

    Attributes:
        path: The recording.
        ticks: Ticks in it.
        replayed: Ticks that were computed again; the others follow a gap, up to the next chunk or episode.
        differing: Ticks of these in which something differs.
        inferences: Inferences that were computed again.
        max_difference: Largest difference of a number of an action; infinity where there is an action on one side only.
        first: The first difference; None if there is none.
        identity: What is another policy, setting or version now: a sentence for each.
        dropped: Records that are missing between others.
        complete: Whether the file has its end.
    """

    path: Path
    ticks: int
    replayed: int
    differing: int
    inferences: int
    max_difference: float
    first: Difference | None
    identity: tuple[str, ...]
    dropped: int
    complete: bool

    @property
    def same(self) -> bool:
        """Whether ticks were computed again, and every one gave the very same action, for the same reasons."""
        return self.first is None and self.replayed > 0

    @property
    def verdict(self) -> str:
        """In words: "the same", "DIFFERS", or "NOTHING COMPARED" where no tick could be computed again."""
        return "the same" if self.same else "NOTHING COMPARED" if self.first is None else "DIFFERS"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON data; an infinite difference is null."""
        found = {**vars(self), "path": str(self.path), "identity": list(self.identity), "same": self.same}
        found["first"] = None if self.first is None else vars(self.first)
        found["max_difference"] = self.max_difference if math.isfinite(self.max_difference) else None
        return found
