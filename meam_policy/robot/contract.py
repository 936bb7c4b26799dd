"""`RobotContract`: what the numbers of a policy are on its robot, and how fast and how late they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from itertools import groupby
from typing import Any, Literal, NoReturn, TypeVar, get_args

from meam_policy.errors import FormatError
from meam_policy.robot.vocabulary import ACTION_KINDS, EXTRA, OBSERVATION_KINDS, QUATERNIONS, UNITS
from meam_policy.spec import RATE_TOLERANCE, PolicySpec
from meam_policy.spec.names import NamedNumber
from meam_policy.typed import typed, typed_fields

__all__ = [
    "ActionNumber",
    "Interpolation",
    "ObservationNumber",
    "OnFailure",
    "Representation",
    "RobotContract",
    "Timing",
]

Representation = Literal["absolute", "delta_to_state", "delta_to_last"]
"""What an action number says: the target itself; how far it is from the state; or from the last target."""

Interpolation = Literal["hold", "linear", "spline"]
"""What lies between two actions, for a controller that runs faster than the policy."""

OnFailure = Literal["hold", "neutral", "home", "disable"]
"""What to do without an action: repeat the last one; approach zero, or the home pose, no faster than `max_rate`; or
raise an error, for the caller to switch the robot off."""

_STILL = ("target/joint/position", "target/body/position", "target/body/orientation")
"""Kinds of actions that stand still when they are repeated."""

LONGEST_BLEND_S = 3600.0
"""Beyond which an episode would never be the policy's."""

_ROUNDING = 1e-6
"""Of a limit beyond the action box, as a share: both went through float32."""


@dataclass(frozen=True)
class ObservationNumber:
    """One number of an observation.

    Attributes:
        name: Its name, as in `PolicySpec.observation_names`, without a unit.
        kind: What it is: one of `OBSERVATION_KINDS`, or `extra/...`.
        unit: One of `UNITS`, that fits the kind.
        key: Key of its box in a Dict observation; None in a Box.
        joint: The joint it is of; needed by kinds of joints.
        body: The body it is of; needed by kinds of bodies.
        frame: The frame it is expressed in; None if that does not matter.
    """

    name: str
    kind: str
    unit: str
    key: str | None = None
    joint: str | None = None
    body: str | None = None
    frame: str | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            FormatError: one is out of range.
        """
        typed_fields(self, error=FormatError)
        _check_meaning(self, OBSERVATION_KINDS)


@dataclass(frozen=True)
class ActionNumber:
    """One number of an action.

    Attributes:
        name: Its name, as in `PolicySpec.action_names`, without a unit.
        kind: What it is: one of `ACTION_KINDS`, or `extra/...`.
        unit: One of `UNITS`, that fits the kind.
        joint: The joint it is for; needed by kinds of joints.
        body: The body it is for; needed by kinds of bodies.
        frame: The frame it is expressed in; None if that does not matter.
        representation: Whether it is the target, or a change.
        lower: Least value to be sent, within the action box; None takes the box's.
        upper: Largest value to be sent, within the action box; None takes the box's.
        max_rate: Largest change of the target in a second, above 0; None for no limit. An action that is itself a
            change adds up to at most so much in a second.
        stiffness: Gain of the joint's controller for which the policy was made, 0 or more; None if it has none.
        damping: The same, on the velocity.
        default: The home pose, between the limits; of absolute positions only.
    """

    name: str
    kind: str
    unit: str
    joint: str | None = None
    body: str | None = None
    frame: str | None = None
    representation: Representation = "absolute"
    lower: float | None = None
    upper: float | None = None
    max_rate: float | None = None
    stiffness: float | None = None
    damping: float | None = None
    default: float | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            FormatError: one is out of range.
        """
        typed_fields(self, error=FormatError)
        _check_meaning(self, ACTION_KINDS)
        _require_choice("representation", self.representation, get_args(Representation))
        for name in ("lower", "upper", "default"):
            _require_number(name, getattr(self, name), "a finite number", math.isfinite)
        _require_number("max_rate", self.max_rate, "a finite number above 0", _positive)
        for name in ("stiffness", "damping"):
            _require_number(name, getattr(self, name), "a finite number of 0 or more", _not_negative)
        lower, upper = -math.inf if self.lower is None else self.lower, math.inf if self.upper is None else self.upper
        if lower >= upper:
            _refuse("lower", self.lower, f"less than upper, {self.upper:g}")
        if self.default is not None and not lower <= self.default <= upper:
            _refuse("default", self.default, f"{lower:g} to {upper:g}, between lower and upper")
        if self.default is not None and not self.stands_still:
            _refuse("default", self.default, f"none: {self._way} has no home pose")

    @property
    def stands_still(self) -> bool:
        """Whether the robot stands still where this number is repeated: it is a place, and neither speed nor change."""
        return self.kind in _STILL and self.representation == "absolute"

    @property
    def _way(self) -> str:
        return self.kind if self.representation == "absolute" else self.representation


@dataclass(frozen=True)
class Timing:
    """How fast the policy acts, and how late anything may be.

    Attributes:
        rate_hz: Actions per second; None takes the policy's `control_rate_hz`.
        latency_budget_ms: Time that an inference may take, milliseconds; None for any.
        max_observation_age_s: Age beyond which an observation is not acted on, seconds; None for any.
        interpolation: What lies between two actions.
        blend_in_s: Time over which the first actions of an episode are approached, seconds: from the joints' measured
            positions, else from the home pose; actions that do not stand still grow from 0. 0 for none; at most
            `LONGEST_BLEND_S`.
        on_failure: What to do without an action; None leaves that to `SafetySettings` and `ControlLoop`.
    """

    rate_hz: float | None = None
    latency_budget_ms: float | None = None
    max_observation_age_s: float | None = None
    interpolation: Interpolation = "hold"
    blend_in_s: float = 0.0
    on_failure: OnFailure | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            FormatError: one is out of range.
        """
        typed_fields(self, error=FormatError)
        for name in ("rate_hz", "latency_budget_ms", "max_observation_age_s"):
            _require_number(name, getattr(self, name), "a finite number above 0", _positive)
        span = f"a finite number of seconds, 0 to {LONGEST_BLEND_S:g}"
        _require_number("blend_in_s", self.blend_in_s, span, lambda seconds: 0 <= seconds <= LONGEST_BLEND_S)
        _require_choice("interpolation", self.interpolation, get_args(Interpolation))
        if self.on_failure is not None:
            _require_choice("on_failure", self.on_failure, get_args(OnFailure))


@dataclass(frozen=True)
class RobotContract:
    """What a policy's numbers are on its robot: the contents of `robot.json`.

    Attributes:
        observation: Every number of an observation in the order of flattening; empty if they are not described.
        action: Every number of an action; empty if they are not described.
        timing: Rate and delays.
    """

    observation: tuple[ObservationNumber, ...] = ()
    action: tuple[ActionNumber, ...] = ()
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        """Check what can be checked without the policy.

        Raises:
            FormatError: two numbers contradict each other, or the timing contradicts them.
        """
        typed_fields(self, error=FormatError)
        for name in ("observation", "action"):
            _check_names(name, getattr(self, name))
            _check_joints(name, getattr(self, name))
            _check_quaternions(name, getattr(self, name))
        if self.timing.on_failure == "hold":
            moving = next((number for number in self.action if not number.stands_still), None)
            if moving is not None:
                _refuse("timing.on_failure", "hold", f'"neutral" or "disable": {moving.name} would go on moving')
        if self.timing.on_failure == "home":
            homeless = [number.name for number in self.action if number.default is None]
            _require_each("timing.on_failure", "home", self.action, homeless, "a default")
        if self.timing.blend_in_s:
            lost = [n.name for n in self.action if n.stands_still and n.default is None and self.measured_by(n) is None]
            need = "a default, or an observation of the same joint's position in the same unit"
            _require_each("timing.blend_in_s", self.timing.blend_in_s, self.action, lost, need)

    @typed()
    def measured_by(self, action: ActionNumber) -> int | None:
        """Index of the observation number that measures an action's joint, in its unit; None if there is none."""
        if action.kind != "target/joint/position":
            return None
        wanted = ("state/joint/position", action.joint, action.unit)
        return next((i for i, n in enumerate(self.observation) if (n.kind, n.joint, n.unit) == wanted), None)

    @property
    def stands_still(self) -> bool:
        """Whether the robot stands still where an action is repeated, or nothing is known of that."""
        return all(number.stands_still for number in self.action)

    @property
    def joints(self) -> tuple[str, ...] | None:
        """The joints of the actions, in their order; None unless every action is one of a joint."""
        joints = tuple(number.joint for number in self.action if number.joint is not None)
        return joints if joints and len(joints) == len(self.action) else None

    @typed()
    def check(self, spec: PolicySpec) -> None:
        """Check the contract against a policy.

        Raises:
            FormatError: it has other numbers, keys, names or units than the policy, a limit lies outside the action
                box, or the rate is not the policy's.
        """
        _check_against("observation", self.observation, spec.observation_numbers)
        _check_against("action", self.action, spec.action_numbers)
        for index, (number, box) in enumerate(zip(self.action, spec.action_numbers, strict=False)):
            scale = max((abs(bound) for bound in (box.low, box.high) if math.isfinite(bound)), default=0.0)
            low, high = box.low - _ROUNDING * scale, box.high + _ROUNDING * scale
            for name in ("lower", "upper", "default"):
                limit = getattr(number, name)
                if limit is not None and not low <= limit <= high:
                    _refuse(
                        f"action[{index}].{name}",
                        limit,
                        f"a limit of {number.name} within the action box, {box.low:g} to {box.high:g}",
                    )
        rate, recorded = self.timing.rate_hz, spec.control_rate_hz
        if rate is not None and recorded is not None and abs(rate / recorded - 1) > RATE_TOLERANCE:
            _refuse("timing.rate_hz", rate, f"{recorded:g}, the rate of the actions that the policy was trained on")
        if rate is None and recorded is None and any(number.max_rate is not None for number in self.action):
            _refuse("timing.rate_hz", None, "a rate, since max_rate is per second and the policy recorded no rate")

    @typed()
    def named(self, spec: PolicySpec) -> PolicySpec:
        """The spec, with the contract's names and units for numbers of which it has none."""
        found: dict[str, tuple[str, ...]] = {}
        for field_, numbers in (("observation_names", self.observation), ("action_names", self.action)):
            if numbers and getattr(spec, field_) is None:
                found[field_] = tuple(n.name if n.unit == "1" else f"{n.name}[{n.unit}]" for n in numbers)
        return replace(spec, **found) if found else spec

    @typed()
    def rate_hz(self, spec: PolicySpec) -> float | None:
        """Actions per second: the contract's, else the policy's, else None."""
        return spec.control_rate_hz if self.timing.rate_hz is None else self.timing.rate_hz

    @typed()
    def describe(self, spec: PolicySpec) -> str:
        """Its timing in one line, for people."""
        timing, rate = self.timing, self.rate_hz(spec)
        parts = {
            "{:g} actions a second": rate,
            "{:g} ms for an inference": timing.latency_budget_ms,
            "observations at most {:g} s old": timing.max_observation_age_s,
            "{} between actions": timing.interpolation,
            "blended in over {:g} s": timing.blend_in_s or None,
            "on failure: {}": timing.on_failure,
        }
        return "; ".join(form.format(value) for form, value in parts.items() if value is not None)

    def to_json(self) -> dict[str, Any]:
        """As JSON data; what is not given is left out."""
        return {
            "observation": [_given(number) for number in self.observation],
            "action": [_given(number) for number in self.action],
            "timing": _given(self.timing),
        }

    @classmethod
    @typed()
    def from_object(cls, data: Mapping[str, Any]) -> RobotContract:
        """Read the object in a `robot.json` or a `robot.toml`.

        Raises:
            FormatError: a field is missing, unknown, of the wrong type or out of range.
        """
        _require_known("", data, ("observation", "action", "timing"))
        return cls(
            observation=_read_all("observation", data.get("observation", []), ObservationNumber),
            action=_read_all("action", data.get("action", []), ActionNumber),
            timing=_read("timing", data.get("timing", {}), Timing),
        )


def _require_each(name: str, value: object, action: Sequence[ActionNumber], lacking: Sequence[str], need: str) -> None:
    if lacking or not action:
        seen = f"{lacking[0]} has none" if lacking else "no action is described"
        _refuse(name, value, f"this only where every action has {need}; {seen}")


def _check_meaning(number: ObservationNumber | ActionNumber, kinds: Mapping[str, tuple[str, ...]]) -> None:
    if not number.name.strip() or "," in number.name:
        _refuse("name", number.name, "a name that is not empty and holds no comma")
    for place in ("joint", "body", "frame"):
        given = getattr(number, place)
        if given is not None and (not given.strip() or "," in given):
            _refuse(place, given, "a name that is not empty and holds no comma, or none")
    extra = number.kind.startswith(EXTRA) and number.kind.removeprefix(EXTRA).strip() != ""
    if not extra and number.kind not in kinds:
        _refuse("kind", number.kind, f"one of {', '.join(kinds)}, or {EXTRA} and a name", kinds)
    if number.unit not in UNITS:
        _refuse("unit", number.unit, f"one of {', '.join(UNITS)}", UNITS)
    if not extra and number.unit not in kinds[number.kind]:
        _refuse("unit", number.unit, f"one that fits {number.kind}: {', '.join(kinds[number.kind])}")
    for part in ("joint", "body"):
        if getattr(number, part) is None and f"/{part}/" in number.kind:
            _refuse(part, None, f"the {part} that {number.name} is of, since its kind is {number.kind}")


def _check_names(name: str, numbers: Sequence[ObservationNumber | ActionNumber]) -> None:
    seen: dict[tuple[str | None, str], int] = {}
    for index, number in enumerate(numbers):
        first = seen.setdefault((getattr(number, "key", None), number.name), index)
        if first != index:
            _refuse(f"{name}[{index}].name", number.name, f"each name once; it is that of {name}[{first}] too")


def _check_joints(name: str, numbers: Sequence[ObservationNumber | ActionNumber]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for index, number in enumerate(numbers):
        if number.joint is None:
            continue
        first = seen.setdefault((number.kind, number.joint), index)
        if first != index:
            _refuse(
                f"{name}[{index}].joint", number.joint, f"each joint once; {name}[{first}] is its {number.kind} too"
            )


def _check_quaternions(name: str, numbers: Sequence[ObservationNumber | ActionNumber]) -> None:
    def place(item: tuple[int, ObservationNumber | ActionNumber]) -> tuple[str, ...]:
        number = item[1]
        return number.unit, number.kind, number.body or "", number.joint or "", getattr(number, "key", None) or ""

    for (unit, *_), items in groupby(enumerate(numbers), key=place):
        group = list(items)
        if unit in QUATERNIONS and len(group) % 4:
            index, first = group[0]
            _refuse(f"{name}[{index}].unit", unit, f"4 numbers in a row from {first.name} on; there are {len(group)}")


def _check_against(name: str, numbers: Sequence[ObservationNumber | ActionNumber], own: Sequence[NamedNumber]) -> None:
    if numbers and len(numbers) != len(own):
        _refuse(name, f"{len(numbers)} numbers", f"{len(own)} numbers, those of the policy, or none")
    for index, (number, policys) in enumerate(zip(numbers, own, strict=False)):
        key = getattr(number, "key", None)
        if key != policys.key:
            _refuse(f"{name}[{index}].key", key, f"{policys.key!r}, in the order of the policy's observation")
        if policys.name is not None and number.name != policys.name:
            _refuse(f"{name}[{index}].name", number.name, f'"{policys.name}", as config.json names it')
        if policys.unit is not None and number.unit != policys.unit:
            _refuse(f"{name}[{index}].unit", number.unit, f'"{policys.unit}", as config.json says of {policys.name}')


def _positive(number: float) -> bool:
    return math.isfinite(number) and number > 0


def _not_negative(number: float) -> bool:
    return math.isfinite(number) and number >= 0


def _require_number(name: str, value: float | None, expected: str, fits: Callable[[float], bool]) -> None:
    if value is not None and not fits(value):
        _refuse(name, value, expected)


def _require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        _refuse(name, value, f"one of {', '.join(choices)}", choices)


def _refuse(name: str, value: object, expected: str, known: Iterable[str] = ()) -> NoReturn:
    close = get_close_matches(str(value), list(known), n=1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    raise FormatError(f"{name} is {'missing' if value is None else repr(value)}; expected {expected}.{hint}")


def _require_known(where: str, data: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in data:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean {where}{close[0]}?" if close else ""
            raise FormatError(f"{where}{name} is not a field; expected {', '.join(known)}.{hint}")


T = TypeVar("T", ObservationNumber, ActionNumber, Timing)


def _read_all(where: str, data: Any, cls: type[T]) -> tuple[T, ...]:
    if not isinstance(data, list):
        raise FormatError(f"{where} is a {type(data).__name__}; expected a list with an entry for each number.")
    return tuple(_read(f"{where}[{index}]", each, cls) for index, each in enumerate(data))


def _read(where: str, data: Any, cls: type[T]) -> T:
    if not isinstance(data, dict):
        raise FormatError(f"{where} is a {type(data).__name__}; expected an object of fields.")
    _require_known(f"{where}.", data, [each.name for each in fields(cls)])
    for each in fields(cls):
        if each.default is MISSING and each.name not in data:
            raise FormatError(f"{where}.{each.name} is missing; expected one for every number.")
    try:
        return cls(**data)
    except FormatError as error:
        raise FormatError(f"{where}.{error}") from error


def _given(instance: Any) -> dict[str, Any]:
    """The fields that are not at their defaults, in their order."""
    return {
        each.name: getattr(instance, each.name)
        for each in fields(instance)
        if getattr(instance, each.name) != each.default
    }
