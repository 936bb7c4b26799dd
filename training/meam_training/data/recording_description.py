"""The spaces and the origin of a recording, kept as JSON data beside the cached arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import gymnasium

from meam_policy.spec import BoxSpec
from meam_training.data.dataset_cache import Columns, Recording
from meam_training.data.row_check import RowCheck

__all__ = ["checked_recording", "describe_recording", "described_boxes", "not_followed"]


def describe_recording(
    observation_boxes: Sequence[BoxSpec],
    action_box: BoxSpec,
    dataset_id: str | None,
    environment_id: str | None,
    control_rate_hz: float | None,
) -> dict[str, Any]:
    """Describe a recording, for `Recording.about`; see `OfflineDataset` for the arguments."""
    return {
        "observation_boxes": [asdict(box) for box in observation_boxes],
        "action_box": asdict(action_box),
        "dataset_id": dataset_id,
        "environment_id": environment_id,
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


def not_followed(recorded: Mapping[str, Any]) -> list[str]:
    """What tells a recorded environment from the one that its id makes now, in words; nothing is executed.

    Args:
        recorded: Its id, arguments, max_episode_steps and names of wrappers.
    """
    plain, found = gymnasium.registry.get(recorded["id"]), []
    arguments, limit, wrappers = (recorded[name] for name in ("arguments", "max_episode_steps", "wrappers"))
    if plain is not None:
        if arguments != {name: value for name, value in plain.kwargs.items() if name != "render_mode"}:
            found.append(f"the arguments {arguments}")
        if limit not in (None, plain.max_episode_steps):
            found.append(f"a time limit of {limit} steps, not {plain.max_episode_steps}")
    if wrappers:
        found.append(f"the wrappers {', '.join(wrappers)}")
    return found


def _box_spec(box: dict[str, Any]) -> BoxSpec:
    tuples = {name: tuple(box[name]) for name in ("shape", "low", "high")}
    return BoxSpec(**{**box, **tuples})
