"""The spaces and the origin of a recording, kept as JSON data beside the cached arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from meam_policy.spec import BoxSpec, EnvironmentSpec
from meam_training.data.dataset_cache import Columns, Recording
from meam_training.data.row_check import RowCheck

__all__ = ["checked_recording", "describe_recording", "described_boxes"]


def describe_recording(
    observation_boxes: Sequence[BoxSpec],
    action_box: BoxSpec,
    dataset_id: str | None,
    environment_id: str | None,
    control_rate_hz: float | None,
    environment: EnvironmentSpec | None = None,
) -> dict[str, Any]:
    """Describe a recording, for `Recording.about`; see `OfflineDataset` for the arguments."""
    return {
        "observation_boxes": [asdict(box) for box in observation_boxes],
        "action_box": asdict(action_box),
        "dataset_id": dataset_id,
        "environment_id": environment_id,
        "environment": None if environment is None else environment.to_json(),
        "control_rate_hz": control_rate_hz,
    }


def checked_recording(about: dict[str, Any], check: RowCheck, blocks: Iterable[tuple[Any, ...]]) -> Recording:
    """A recording whose blocks are checked as they are read.

    Args:
        about: Its description; once all blocks are read, it also says what was taken off and what was clipped.
        check: Checks the rows.
        blocks: Its blocks, in the order of the check's arguments.
    """

    def checked() -> Iterator[Columns]:
        for block in blocks:
            yield check(*block)
        about.update(observation_offset=check.observation_offset, clipped=check.clipped)

    return Recording(about, checked())


def described_boxes(about: dict[str, Any]) -> tuple[tuple[BoxSpec, ...], BoxSpec]:
    """Boxes of the observation, and the box of the action, of a description, which may have been read from JSON.

    Raises:
        KeyError, TypeError, MeamError: the description is malformed.
    """
    return tuple(_box_spec(box) for box in about["observation_boxes"]), _box_spec(about["action_box"])


def _box_spec(box: dict[str, Any]) -> BoxSpec:
    tuples = {name: tuple(box[name]) for name in ("shape", "low", "high")}
    return BoxSpec(**{**box, **tuples})
