"""The named parts in which a tick graph takes an observation and gives an action."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from meam_policy.robot import RobotContract
from meam_policy.robot.contract import ActionNumber, ObservationNumber
from meam_policy.spec import PolicySpec
from meam_policy.spec.names import NamedNumber

__all__ = ["Part", "action_parts", "observation_parts"]


RESERVED = (
    "action",
    "kd",
    "kp",
    "noise",
    *(f"{state}_{way}" for state in ("last", "queue", "state") for way in ("in", "out")),
)
"""Names of a tick graph's other inputs and outputs."""


@dataclass(frozen=True)
class Part:
    """Numbers of an observation or an action that travel together as one tensor [1, size].

    Attributes:
        name: The tensor's name in the graph: letters, digits and underscores.
        indices: Which numbers of the flat observation or action they are, in their order.
        numbers: What the robot's contract says of each; empty without one.
        names: Name of each; empty if unknown.
    """

    name: str
    indices: tuple[int, ...]
    numbers: tuple[ObservationNumber | ActionNumber, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return len(self.indices)

    @property
    def kind(self) -> str | None:
        """What its numbers are, by the contract's word for it; None without a contract."""
        return self.numbers[0].kind if self.numbers else None


def observation_parts(spec: PolicySpec, robot: RobotContract) -> tuple[Part, ...]:
    """The parts of an observation: one for each kind of number, if the contract describes them.

    Without a contract one for each key of a Dict observation, or `observation` alone.
    """
    if robot.observation:
        return _by_kind(robot.observation)
    if spec.observation[0].key is None:
        return (_part("observation", range(spec.observation_dim), spec.observation_numbers),)
    parts, start = [], 0
    for box in spec.observation:
        parts.append(_part(_identifier(str(box.key)), range(start, start + box.size), spec.observation_numbers))
        start += box.size
    return _with_own_names(parts)


def action_parts(spec: PolicySpec, robot: RobotContract) -> tuple[Part, ...]:
    """The parts of an action: one for each kind of number, if the contract describes them, else `action` alone."""
    if robot.action:
        return _by_kind(robot.action, [part.name for part in observation_parts(spec, robot)])
    return (_part("action", range(spec.action_dim), spec.action_numbers),)


def _by_kind(numbers: Sequence[ObservationNumber | ActionNumber], taken: Sequence[str] = ()) -> tuple[Part, ...]:
    """One part for each kind, in the order in which they first appear."""
    indices: dict[str, list[int]] = {}
    for index, number in enumerate(numbers):
        indices.setdefault(number.kind, []).append(index)
    return _with_own_names(
        [
            Part(
                _identifier(kind), tuple(found), tuple(numbers[i] for i in found), tuple(numbers[i].name for i in found)
            )
            for kind, found in indices.items()
        ],
        taken,
    )


def _part(name: str, indices: range, numbers: Sequence[NamedNumber]) -> Part:
    names = [numbers[index].name for index in indices]
    known = tuple(name for name in names if name is not None)
    return Part(name, tuple(indices), (), known if len(known) == len(names) else ())


def _identifier(text: str) -> str:
    """A name that every runtime takes for a tensor: C++ and ROS make identifiers of it."""
    found = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    return found if found[:1].isalpha() else f"part_{found}"


def _with_own_names(parts: Sequence[Part], taken: Sequence[str] = ()) -> tuple[Part, ...]:
    """The parts, numbered where two have the same name, or one that is taken or that the graph needs itself."""
    known, found = {*RESERVED, *taken}, []
    for part in parts:
        numbered = (f"{part.name}_{number}" for number in itertools.count(2))
        name = next(each for each in itertools.chain([part.name], numbered) if each not in known)
        known.add(name)
        found.append(Part(name, part.indices, part.numbers, part.names))
    return tuple(found)
