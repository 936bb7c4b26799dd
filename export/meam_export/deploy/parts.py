"""The named parts in which a tick graph takes an observation and gives an action."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from meam_policy.robot import RobotContract
from meam_policy.robot.contract import ActionNumber, ObservationNumber
from meam_policy.spec import PolicySpec

__all__ = ["GAINS", "STATES", "Part", "action_parts", "observation_parts"]

GAINS = {"kp": "stiffness", "kd": "damping"}
"""Outputs for the gains of the joints' controllers, and the contract's words for them."""

STATES = ("last", "queue", "state")
"""What a tick graph leaves for the next tick: outputs NAME_out that come back as inputs NAME_in."""

RESERVED = ("action", *GAINS, "noise", *(f"{state}_{way}" for state in STATES for way in ("in", "out")))
"""Names of a tick graph's other inputs and outputs."""


@dataclass(frozen=True)
class Part:
    """Numbers of an observation or an action that travel together as one tensor [1, size].

    Attributes:
        name: The tensor's name in the graph: letters, digits and underscores.
        indices: Which numbers of the flat observation or action they are, in their order.
        numbers: What the robot's contract says of each; empty without one.
    """

    name: str
    indices: tuple[int, ...]
    numbers: tuple[ObservationNumber | ActionNumber, ...] = ()

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
        return (Part("observation", tuple(range(spec.observation_dim))),)
    parts, start = [], 0
    for box in spec.observation:
        parts.append(Part(_identifier(str(box.key)), tuple(range(start, start + box.size))))
        start += box.size
    return _with_own_names(parts)


def action_parts(spec: PolicySpec, robot: RobotContract) -> tuple[Part, ...]:
    """The parts of an action: one for each kind of number, if the contract describes them, else `action` alone."""
    if robot.action:
        return _by_kind(robot.action, [part.name for part in observation_parts(spec, robot)])
    return (Part("action", tuple(range(spec.action_dim))),)


def _by_kind(numbers: Sequence[ObservationNumber | ActionNumber], taken: Sequence[str] = ()) -> tuple[Part, ...]:
    """One part for each kind, in the order in which they first appear."""
    indices: dict[str, list[int]] = {}
    for index, number in enumerate(numbers):
        indices.setdefault(number.kind, []).append(index)
    parts = [Part(_identifier(kind), tuple(of), tuple(numbers[i] for i in of)) for kind, of in indices.items()]
    return _with_own_names(parts, taken)


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
        found.append(replace(part, name=name))
    return tuple(found)
