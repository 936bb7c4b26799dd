"""The words of a robot's contract: units, and what a number of an observation or an action is.

Kinds are those of LEAPP 0.7.2, which NVIDIA's Isaac ROS reads too; what they have no word for begins with `extra/`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["ACTION_KINDS", "ANY_UNIT", "EXTRA", "OBSERVATION_KINDS", "ON_FAILURE", "QUATERNIONS", "UNITS", "Failing"]


class Failing(NamedTuple):
    """What acting calls one of the contract's ways to go on without an action.

    Attributes:
        reaction: In `SafetySettings`.
        overrun: In a `ControlLoop`.
    """

    reaction: Literal["raise", "hold", "neutral", "home"]
    overrun: Literal["stop", "hold", "zero", "home"]


ON_FAILURE = {
    "hold": Failing("hold", "hold"),
    "neutral": Failing("neutral", "zero"),
    "home": Failing("home", "home"),
    "disable": Failing("raise", "stop"),
}
"""By the contract's word, `timing.on_failure`."""

EXTRA = "extra/"
"""Begins kinds that have no standard word; any unit fits them."""

QUATERNIONS = ("quaternion_xyzw", "quaternion_wxyz")
"""Units of four numbers in a row, by the place of the real part: last as in ROS, or first as in MuJoCo."""

UNITS = (
    *("rad", "rad/s", "rad/s^2", "deg", "deg/s", "m", "m/s", "m/s^2", "N", "N m", "N m/rad", "N m s/rad"),
    *("N/m", "N s/m", "kg", "s", "V", "A", "K", "Pa", "1", *QUATERNIONS),
)
"""The closed list of units; "1" is a number without one."""

ANY_UNIT = UNITS
_ANGLE, _LENGTH = ("rad", "deg"), ("m",)
_ROTATION = (*QUATERNIONS, *_ANGLE, "1")
_JOINT = {
    "position": (*_ANGLE, *_LENGTH),
    "velocity": ("rad/s", "deg/s", "m/s"),
    "effort": ("N m", "N"),
}
_BODY = {
    "pose": (*_LENGTH, *_ROTATION),
    "velocity": ("m/s", "rad/s", "deg/s"),
    "acceleration": ("m/s^2", "rad/s^2"),
    "position": _LENGTH,
    "rotation": _ROTATION,
    "linear_velocity": ("m/s",),
    "angular_velocity": ("rad/s", "deg/s"),
    "linear_acceleration": ("m/s^2",),
    "angular_acceleration": ("rad/s^2",),
}

OBSERVATION_KINDS: dict[str, tuple[str, ...]] = {
    **{f"state/joint/{name}": units for name, units in _JOINT.items()},
    **{f"state/body/{name}": units for name, units in _BODY.items()},
    "state/wrench": ("N", "N m"),
    "state/vector3d": ANY_UNIT,
    "command/joint/position": _JOINT["position"],
    "command/joint/velocity": _JOINT["velocity"],
    "command/joint/torques": _JOINT["effort"],
    "command/body/rotation": _ROTATION,
    "command/body/velocity": _BODY["velocity"],
    "command/body/pose": _BODY["pose"],
}
"""What a number of an observation may be, and the units that fit it."""

ACTION_KINDS: dict[str, tuple[str, ...]] = {
    "target/joint/position": _JOINT["position"],
    "target/joint/velocity": _JOINT["velocity"],
    "target/joint/torques": _JOINT["effort"],
    "target/joint/effort": _JOINT["effort"],
    "target/body/position": _LENGTH,
    "target/body/orientation": _ROTATION,
    "target/body/linear_velocity": _BODY["linear_velocity"],
    "target/body/linear_acceleration": _BODY["linear_acceleration"],
    "target/body/angular_acceleration": _BODY["angular_acceleration"],
    "kp": ("N m/rad", "N/m", "1"),
    "kd": ("N m s/rad", "N s/m", "1"),
}
"""What a number of an action may be, and the units that fit it."""
