"""`EnvironmentSpec`: how an environment is made, beyond its id, as JSON data that nobody needs to trust."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gymnasium.envs.registration import EnvSpec

from meam_policy.errors import FormatError
from meam_policy.spec.json_reader import JsonReader, require
from meam_policy.typed import typed, typed_fields

__all__ = ["WRAPPERS", "EnvironmentSpec", "EnvironmentWrapper", "unfit_argument"]

WRAPPERS = frozenset(
    {
        "ClipAction",
        "ClipReward",
        "DelayObservation",
        "FilterObservation",
        "FlattenObservation",
        "FrameStackObservation",
        "MaxAndSkipObservation",
        "RepeatAction",
        "RescaleAction",
        "RescaleObservation",
        "ReshapeObservation",
        "StickyAction",
        "TimeAwareObservation",
    }
)
"""Wrappers of Gymnasium that are followed: their arguments are plain JSON, and say all that they do."""

_STATISTICS = frozenset({"NormalizeObservation", "NormalizeReward"})
"""Wrappers of Gymnasium whose effect depends on statistics that they gather and no recording holds."""

_PASSIVE = frozenset(
    {
        "gymnasium.wrappers:HumanRendering",
        "gymnasium.wrappers:OrderEnforcing",
        "gymnasium.wrappers:PassiveEnvChecker",
        "gymnasium.wrappers:RecordEpisodeStatistics",
        "gymnasium.wrappers:RecordVideo",
        "gymnasium.wrappers:RenderCollection",
        "gymnasium.wrappers:TimeLimit",  # its limit is max_episode_steps
        "meam_policy.environments.make:_SeededGlobally",  # comes with the environment
        "minari.data_collector.data_collector:DataCollector",
        "stable_baselines3.common.monitor:Monitor",
    }
)
"""Wrappers that change nothing a policy meets, or are given otherwise."""

_RESERVED = frozenset({"disable_env_checker", "id", "max_episode_steps", "render_mode"})
"""Arguments of `gymnasium.make` itself, and how to draw: not part of the environment."""

_COUNTS = ("delay", "frame_skip", "num_repeats", "repeat_action_duration", "skip", "stack_size")
"""Arguments of wrappers and environments that multiply memory or time."""

MAX_COUNT = 1000
MAX_STEPS = 10**9
MAX_WRAPPERS = 16
MAX_TEXT = 200
MAX_ARGUMENT_BYTES = 65536
"""Of the arguments of an environment or a wrapper, as JSON text."""

MAX_DEPTH = 16
"""Of lists and objects within an argument."""


@dataclass(frozen=True)
class EnvironmentWrapper:
    """A wrapper around an environment.

    Attributes:
        name: Class of `gymnasium.wrappers`; of a wrapper from elsewhere, its "module:class", which is only named.
        kwargs: Its arguments, JSON data.
    """

    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the types of the fields.

        Raises:
            FormatError: one is of another type.
        """
        typed_fields(self, error=FormatError)


@dataclass(frozen=True)
class EnvironmentSpec:
    """How an environment is made; `make_environment` makes it.

    It may come from a downloaded policy or data set, and names no code: the entry point is that of the registered id,
    and only wrappers of `WRAPPERS` are applied.

    Attributes:
        id: Gymnasium id, or OGBench name.
        kwargs: Its arguments, JSON data; those that are not there are as registered.
        max_episode_steps: Steps after which an episode is cut off; None for the registered limit.
        wrappers: Wrappers around it, the innermost first.
        evaluation: The environment for evaluation, if it is another one.
    """

    id: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    wrappers: tuple[EnvironmentWrapper, ...] = ()
    evaluation: EnvironmentSpec | None = None

    def __post_init__(self) -> None:
        """Check that all is plain data of a bounded size.

        Raises:
            FormatError: it is not.
        """
        typed_fields(self, error=FormatError, prefix="config.json: environment.")
        require(len(self.id) <= MAX_TEXT, "environment.id", f"{len(self.id)} characters", f"at most {MAX_TEXT}")
        unfit = unfit_argument(self.kwargs)
        require(unfit is None, "environment.kwargs", *(unfit or ("", "")))
        limit = self.max_episode_steps
        good = limit is None or 1 <= limit <= MAX_STEPS
        require(good, "environment.max_episode_steps", repr(limit), f"1 to {MAX_STEPS}, or null")
        count = len(self.wrappers)
        require(count <= MAX_WRAPPERS, "environment.wrappers", f"{count} wrappers", f"at most {MAX_WRAPPERS}")
        for index, wrapper in enumerate(self.wrappers):
            name, size = f"environment.wrappers[{index}]", len(wrapper.name)
            require(size <= MAX_TEXT, f"{name}.name", f"{size} characters", f"at most {MAX_TEXT}")
            unfit = unfit_argument(wrapper.kwargs)
            require(unfit is None, f"{name}.kwargs", *(unfit or ("", "")))
            _require_counts(wrapper.kwargs, f"{name}.kwargs")
        _require_counts(self.kwargs, "environment.kwargs")
        product = math.prod(max([1, *_counts(wrapper.kwargs)]) for wrapper in self.wrappers)
        require(product <= MAX_COUNT, "environment.wrappers", f"{product} times the work", f"at most {MAX_COUNT} times")
        nested = self.evaluation is not None and self.evaluation.evaluation is not None
        require(not nested, "environment.evaluation", "one with an evaluation of its own", "one without")

    @classmethod
    @typed()
    def of(cls, recorded: EnvSpec, environment_id: str | None = None) -> EnvironmentSpec:
        """What Gymnasium records of an environment, without what changes nothing, such as how it is drawn.

        Args:
            recorded: Gymnasium's specification; its entry points are not loaded.
            environment_id: Another name of the same environment; None takes the recorded id.

        Raises:
            FormatError: it is not plain data of a bounded size.
            ConfigError: an argument has another type.
        """
        kwargs, steps = recorded.kwargs, recorded.max_episode_steps
        require(isinstance(kwargs, dict), "environment.kwargs", type(kwargs).__name__, "an object")
        wrappers = []
        for wrapper in recorded.additional_wrappers:
            where, arguments = str(wrapper.entry_point), wrapper.kwargs
            module, _, name = where.partition(":")
            if module == "gymnasium.wrappers" or module.startswith("gymnasium.wrappers."):
                module, where = "gymnasium.wrappers", name
            if f"{module}:{name}" not in _PASSIVE:
                known = isinstance(arguments, dict)
                where = where if known else f"{where} (its arguments are not recorded)"
                wrappers.append(EnvironmentWrapper(where, arguments if known else {}))
        return cls(
            id=environment_id or recorded.id,
            kwargs={name: value for name, value in kwargs.items() if name != "render_mode"},
            max_episode_steps=steps if steps != -1 else None,
            wrappers=tuple(wrappers),
        )

    @property
    def for_evaluation(self) -> EnvironmentSpec:
        """The environment in which a policy is evaluated."""
        return self.evaluation or self

    @property
    def refused(self) -> tuple[str, ...]:
        """What of it is not followed, in words; its evaluation aside."""
        found = []
        for wrapper in self.wrappers:
            if wrapper.name in _STATISTICS:
                found.append(f"the wrapper {wrapper.name}, whose running statistics are not recorded")
            elif wrapper.name not in WRAPPERS:
                found.append(f"the wrapper {wrapper.name}, which is not one of those that are followed")
        for name, value in self.kwargs.items():
            if any(set(text) & set("/\\:") or text.startswith(".") or text.endswith(".xml") for text in _texts(value)):
                found.append(f"the argument {name}={_cut(repr(value))}, which could name a file or a module")
        return tuple(found)

    def __str__(self) -> str:
        """One line: the id, and what is beyond it."""
        parts = [f"{name}={value!r}" for name, value in self.kwargs.items()]
        parts += [] if self.max_episode_steps is None else [f"max_episode_steps={self.max_episode_steps}"]
        for wrapper in self.wrappers:
            parts.append(f"{wrapper.name}({', '.join(f'{name}={value!r}' for name, value in wrapper.kwargs.items())})")
        if self.evaluation is not None:
            parts.append(f"evaluated in {self.evaluation}")
        return f"{self.id} with {', '.join(parts)}" if parts else self.id

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "id": self.id,
            "kwargs": dict(self.kwargs),
            "max_episode_steps": self.max_episode_steps,
            "wrappers": [{"name": wrapper.name, "kwargs": dict(wrapper.kwargs)} for wrapper in self.wrappers],
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, name: str = "environment") -> EnvironmentSpec:
        """Read what `to_json` gives.

        Raises:
            FormatError: a field is missing, unknown, of the wrong type or out of range.
        """
        read = JsonReader.of(data, name)
        read.only(["id", "kwargs", "max_episode_steps", "wrappers", "evaluation"])
        limit, evaluation = (read.get(key, object, "a value or null") for key in ("max_episode_steps", "evaluation"))
        wrappers = []
        for index, each in enumerate(read.get("wrappers", list, "a list of wrappers")):
            wrapper = JsonReader.of(each, f"{name}.wrappers[{index}]")
            wrapper.only(["name", "kwargs"])
            wrappers.append(EnvironmentWrapper(wrapper.text("name"), wrapper.get("kwargs", dict, "an object")))
        spec = cls(
            id=read.text("id"),
            kwargs=read.get("kwargs", dict, "an object"),
            max_episode_steps=limit,
            wrappers=tuple(wrappers),
        )
        if evaluation is None:
            return spec
        nested = JsonReader.of(evaluation, f"{name}.evaluation")
        if nested.data.get("evaluation") is not None:  # not read: each would hold another
            nested.fail("evaluation", "an object", "null")
        return replace(spec, evaluation=cls.from_json(evaluation, f"{name}.evaluation"))


def _counts(kwargs: Mapping[str, Any]) -> list[Any]:
    """What multiplies memory or time; a range of counts, as of StickyAction, is a list."""
    given = [kwargs[key] for key in _COUNTS if kwargs.get(key) is not None]
    return [number for value in given for number in (value if isinstance(value, (list, tuple)) else [value])]


def _require_counts(kwargs: Mapping[str, Any], name: str) -> None:
    for number in _counts(kwargs):
        good = type(number) is int and 0 <= number <= MAX_COUNT
        require(
            good,
            f"{name}, {', '.join(key for key in _COUNTS if key in kwargs)}",
            _cut(repr(number)),
            f"0 to {MAX_COUNT}",
        )


def unfit_argument(kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why arguments are not plain data of a bounded size: what was seen and what is expected; None if they are."""
    for name in kwargs:
        if not isinstance(name, str) or not name.isidentifier() or len(name) > MAX_TEXT or name in _RESERVED:
            return f"an object with the name {_cut(repr(name))}", "names of the environment's own arguments"
    todo = [(0, value) for value in kwargs.values()]
    while todo:  # a stack, not recursion: the JSON parser accepts data nested more deeply than Python's recursion limit
        depth, value = todo.pop()
        if depth > MAX_DEPTH:
            return "nested too deeply", f"at most {MAX_DEPTH} lists and objects within each other"
        if isinstance(value, dict):
            todo += [(depth + 1, part) for part in (*value, *value.values())]
        elif isinstance(value, (list, tuple)):
            todo += [(depth + 1, part) for part in value]
        elif not isinstance(value, (str, int, float, type(None))):
            return f"an object with a {type(value).__name__}", "JSON data"
    try:
        size = len(json.dumps(dict(kwargs), allow_nan=False))
    except (TypeError, ValueError) as error:
        return f"not JSON: {error}", "finite JSON data"
    if size > MAX_ARGUMENT_BYTES:
        return f"{size} bytes", f"at most {MAX_ARGUMENT_BYTES}"
    return None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for part in (*value, *value.values()) for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, (list, tuple)) else []


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
