"""`PolicySpec`: everything that training, export and runtime must agree on, stored as `config.json`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gymnasium import spaces

from meam_policy.errors import ConfigError, FormatError, VersionError
from meam_policy.spec.acting import ActingRule, rule_name
from meam_policy.spec.box import BoxSpec, read_box
from meam_policy.spec.environment_spec import EnvironmentSpec
from meam_policy.spec.figures import DIFFERENCES
from meam_policy.spec.integration import MAX_STEPS, Integration
from meam_policy.spec.json_reader import JsonReader, as_written, cut, parse_object, require, with_new_names
from meam_policy.spec.names import NamedNumber, named_numbers
from meam_policy.spec.variant import VariantSpec
from meam_policy.typed import typed, typed_fields

__all__ = ["FORMAT_VERSION", "RATE_TOLERANCE", "PolicySpec"]

FORMAT_VERSION = 1
"""Version of `config.json` that this package writes, and the only one that it reads."""

RATE_TOLERANCE = 0.01
"""Share by which the rates of training and acting may differ."""

GRAPH_FILE = "policy.onnx"
"""The graph of the policy itself."""


@dataclass(frozen=True, repr=False)
class PolicySpec:
    """A policy's contract: its spaces, its normalisation, how its flow is integrated, and where it came from.

    Written as `config.json` into every checkpoint and policy folder. A policy maps a raw observation and a standard
    normal noise vector to a chunk of `chunk_size` actions; `execute_steps` of them are executed before the next
    inference. Normalised observations are `(o - observation_offset - observation_mean) / observation_std`, of which the
    runtime takes off the offset, in float64, and the graph the rest; an action in environment units is `action_offset +
    action_scale * u`, with the flow's output `u` in [-1, 1].

    Attributes:
        observation: The observation's boxes, in the order in which they are flattened into one vector.
        action: The action's box, with the bounds of every executed action, environment units.
        chunk_size: Actions predicted by one inference.
        execute_steps: Execution horizon: actions of a chunk that are executed before the next inference; 1 to
            chunk_size.
        observation_mean: Mean of every number of an observation in the training data, less its offset.
        observation_std: Scale of every number of an observation; positive.
        action_offset: Centre of the range of actions, within the action box, environment units.
        action_scale: Half width of the range of actions, environment units; positive.
        integration: How its flow is integrated from noise to action.
        observation_offset: What is taken off every number of an observation before it becomes float32, such as of a
            position in map coordinates, which would lose its digits; empty if that is nothing. The graph, the golden
            actions and the networks see what is left.
        acting: How it acts: the scale of the noise that it draws.
        method: Training method, e.g. "bc", "qam" or "me-am".
        hyperparameters: The settings the policy was trained with.
        training_data: Id or path of the data set.
        environment_id: Environment the data was recorded in.
        environment: How it is made, if its id alone does not make it; None if that does.
        started_from: Where its training started, if from another policy's weights: `policy` (path or repo id),
            `method`, `weights` (SHA-256 of their file), `statistics` ("kept" or "renewed") and, if there are any,
            `training_data`, `anew` (networks that it lacked) and `commit` (on the Hub, if it came from there).
        control_rate_hz: Rate at which actions were applied when the data was recorded.
        observation_names: Name of every number of an observation in the order of flattening, e.g. of its joint, and
            possibly a unit in square brackets; None if unknown.
        action_names: Name of every number of an action; None if unknown.
        license: SPDX identifier of the policy's licence; None if it has none.
        variants: Other graphs in the folder, by name.
        files: SHA-256 (hex) of the other files of the policy folder, by file name.
        format_version: Version of this format.
    """

    observation: tuple[BoxSpec, ...]
    action: BoxSpec
    chunk_size: int
    execute_steps: int
    observation_mean: tuple[float, ...]
    observation_std: tuple[float, ...]
    action_offset: tuple[float, ...]
    action_scale: tuple[float, ...]
    integration: Integration
    method: str
    observation_offset: tuple[float, ...] = ()
    acting: ActingRule = field(default_factory=ActingRule)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training_data: str | None = None
    environment_id: str | None = None
    environment: EnvironmentSpec | None = None
    started_from: Mapping[str, str] = field(default_factory=dict)
    control_rate_hz: float | None = None
    observation_names: tuple[str, ...] | None = None
    action_names: tuple[str, ...] | None = None
    license: str | None = None
    variants: Mapping[str, VariantSpec] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check that the fields are in range and consistent.

        Raises:
            FormatError: a number is out of range or a list has the wrong length.
        """
        typed_fields(self, error=FormatError)
        require(len(self.observation) >= 1, "observation", "no boxes", "at least one box")
        keys = [box.key for box in self.observation]
        single = keys == [None]
        require(single or None not in keys, "observation", keys, "a key for every box of a Dict observation")
        require(len(set(keys)) == len(keys), "observation", keys, "different keys")
        require(self.action.key is None, "action", f"key {self.action.key!r}", "a box without a key")
        require(1 <= self.chunk_size <= MAX_STEPS, "chunk_size", self.chunk_size, f"1 to {MAX_STEPS}")
        require(1 <= self.execute_steps <= self.chunk_size, "execute_steps", self.execute_steps, "1 to chunk_size")
        self.integration.check()
        self.acting.check(self.integration.best_of)
        for name, size in (
            ("observation_mean", self.observation_dim),
            ("observation_std", self.observation_dim),
            ("observation_offset", self.observation_dim if self.observation_offset else 0),
            ("action_offset", self.action_dim),
            ("action_scale", self.action_dim),
        ):
            numbers = getattr(self, name)
            require(len(numbers) == size, name, f"{len(numbers)} numbers", f"{size} numbers")
            positive = name in ("observation_std", "action_scale")
            for index, number in enumerate(numbers):
                good = math.isfinite(number) and (number > 0 or not positive)
                require(good, f"{name}[{index}]", number, "a finite number" + (" above 0" if positive else ""))
        if self.environment is not None:
            same = self.environment.id == self.environment_id
            require(same, "environment.id", repr(self.environment.id), f"environment_id, {self.environment_id!r}")
        rate = self.control_rate_hz
        require(rate is None or (math.isfinite(rate) and rate > 0), "control_rate_hz", rate, "a rate above 0, or null")
        for name, size in (("observation_names", self.observation_dim), ("action_names", self.action_dim)):
            names = getattr(self, name)
            require(names is None or len(names) == size, name, f"{len(names or ())} names", f"{size} names, or null")
            # A graph's metadata separates names by commas.
            require(not any("," in part for part in names or ()), name, names, "names without commas")
        for name, variant in self.variants.items():
            variant.check(name)
            known = self.variants[name].file in self.files
            require(known, f'variants["{name}"].file', repr(variant.file), f"one of files: {', '.join(self.files)}")
        for name, digest in self.files.items():
            plain = name not in ("", ".", "..") and not set(name) & set("/\\:\0")
            require(plain, "files", repr(name), "plain file names")
            good = len(digest) == 64 and not set(digest) - set("0123456789abcdef")
            require(good, f'files["{name}"]', repr(digest), "a SHA-256 in lower-case hexadecimal")

    def __repr__(self) -> str:
        """Describe the policy in one line; `to_json` shows everything."""
        return (
            f"PolicySpec(method={self.method!r}, environment_id={self.environment_id!r}, "
            f"observation={self.observation_dim} numbers, action={self.action_dim} numbers, "
            f"chunk={self.chunk_size}, {self.integration})"
        )

    @property
    def observation_dim(self) -> int:
        """Dimension of a flattened observation."""
        return sum(box.size for box in self.observation)

    @property
    def action_dim(self) -> int:
        """Dimension of a flattened action."""
        return self.action.size

    @property
    def observation_numbers(self) -> tuple[NamedNumber, ...]:
        """Every number of a flattened observation, with its key, name and unit."""
        return named_numbers(self.observation, self.observation_names)

    @property
    def action_numbers(self) -> tuple[NamedNumber, ...]:
        """Every number of a flattened action, with its name and unit."""
        return named_numbers((self.action,), self.action_names)

    @property
    def chunk_dim(self) -> int:
        """Dimension of a flattened chunk: chunk_size * action_dim."""
        return self.chunk_size * self.action_dim

    @property
    def noise_dim(self) -> int:
        """Dimension of the noise vector of one decision: best_of * chunk_size * action_dim."""
        return self.integration.best_of * self.chunk_dim

    @property
    def recorded_environment(self) -> EnvironmentSpec | None:
        """The environment the data was recorded in, for `make_environment`; None if unknown."""
        return self.environment or (None if self.environment_id is None else EnvironmentSpec(self.environment_id))

    @property
    def observation_space(self) -> spaces.Box | spaces.Dict:
        """The Gymnasium observation space; a Dict keeps the recorded key order."""
        if self.observation[0].key is None:
            return self.observation[0].to_space()
        return spaces.Dict([(str(box.key), box.to_space()) for box in self.observation])

    @property
    def action_space(self) -> spaces.Box:
        """The Gymnasium action space."""
        return self.action.to_space()

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of all fields but `acting`, `files` and `variants`; the policy's graphs carry it."""
        return self._identity(None)

    @typed()
    def identity_in(self, config: Mapping[str, Any]) -> str:
        """The identity that the graphs carry beside a `config.json`, by which they were exported together.

        Files of earlier versions lack fields, or have them under other names: what they do not have was not hashed.

        Args:
            config: The object in `config.json`; this spec was read from it, or is what one of its variants acts by.

        Raises:
            ConfigError: an argument has another type.
        """
        return self._identity(config)

    def _identity(self, config: Mapping[str, Any] | None) -> str:
        # Hashed after a round trip through JSON: 10 and 10.0 are the same rate, but different text.
        same = PolicySpec.from_json(replace(self, files={}, variants={}).to_json())
        data = json.loads(same.to_json())
        del data["acting"]  # whoever draws the noise follows it: no graph depends on it
        data = data if config is None else as_written(data, config)
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    @typed()
    def select(self, variant: str | None) -> tuple[PolicySpec, str]:
        """The spec with which a variant acts, and the file of its graph.

        Args:
            variant: Name in `variants`; None for the policy itself.

        Raises:
            ConfigError: there is no such variant.
        """
        if variant is None:
            return self, GRAPH_FILE
        if variant not in self.variants:
            names = ", ".join(self.variants) or "none"
            raise ConfigError(f'The policy has no variant "{variant}"; it has: {names}.')
        return self.acting_as(self.variants[variant]), self.variants[variant].file

    @typed()
    def acting_as(self, variant: VariantSpec) -> PolicySpec:
        """This spec with a variant's integration.

        The variant acts by the policy's rule, though that was not measured with it. One with another number of samples
        per decision samples: what is best for one chunk says nothing about several to choose from.

        Raises:
            ConfigError: an argument has another type.
        """
        same = self._has_same_samples(variant)
        acting = ActingRule(self.acting.noise_scale) if same else ActingRule()
        return replace(self, integration=variant.integration, acting=acting)

    def _require_comparable(self) -> None:
        """Refuse a difference from the policy of a variant that draws other samples.

        What looks for a faster graph would take it for one that acts like the policy. Only of what was read: a spec
        that acts as one of its variants keeps them all.
        """
        for name, variant in self.variants.items():
            for figure in () if self._has_same_samples(variant) else DIFFERENCES:
                expected = f"none, since its best_of is {variant.integration.best_of} and the policy's is another"
                seen = variant.measured.get(figure)
                require(seen is None, f'variants["{name}"].measured["{figure}"]', seen, expected)

    def _has_same_samples(self, variant: VariantSpec) -> bool:
        return variant.integration.best_of == self.integration.best_of

    @property
    def acting_name(self) -> str:
        """The name of the rule by which it acts; see `acting.rule_name`."""
        return rule_name(self.acting.noise_scale, self.integration.best_of)

    def to_json(self) -> str:
        """The text of `config.json`."""
        data: dict[str, Any] = {}
        for field_ in fields(self):
            value = getattr(self, field_.name)
            data |= value.to_json() if isinstance(value, Integration) else {field_.name: value}
        data["observation"] = [box.to_json() for box in self.observation]
        data["action"] = self.action.to_json()
        data["acting"] = self.acting.to_json()
        data["variants"] = {name: variant.to_json() for name, variant in self.variants.items()}
        data["files"] = dict(sorted(self.files.items()))
        data["hyperparameters"] = dict(self.hyperparameters)
        data["started_from"] = dict(self.started_from)
        data["environment"] = None if self.environment is None else self.environment.to_json()
        for name in ("started_from", "environment", "observation_offset"):
            if not data[name]:
                del data[name]  # keeps the identity of earlier policies, and lets earlier runtimes read it
        ordered = {"format_version": data.pop("format_version"), **data}
        return json.dumps(ordered, indent=2, allow_nan=False) + "\n"

    @classmethod
    @typed()
    def from_json(cls, text: str | bytes) -> PolicySpec:
        """Read the text of `config.json`.

        Raises:
            VersionError: `format_version` is not the one this package reads.
            FormatError: the text is not JSON, or a field is missing, unknown, of the wrong type or out of range.
            ConfigError: an argument has another type.
        """
        return cls.from_object(parse_object(text))

    @classmethod
    @typed()
    def from_object(cls, data: dict[str, Any]) -> PolicySpec:
        """Read the object in `config.json`, with the same errors as `from_json`."""
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise VersionError(
                f"config.json: format_version is {cut(repr(version))}; this meam-policy reads version "
                f"{FORMAT_VERSION}. Upgrade meam-policy, or export the policy again."
            )
        read = JsonReader({"best_of": 1, **with_new_names(data)}, "")  # earlier files lack it
        read.only([f.name for f in (*fields(cls), *fields(Integration)) if f.name != "integration"])
        boxes = read.get("observation", list, "a list of boxes")
        spec = cls(
            observation=tuple(read_box(box, f"observation[{i}]") for i, box in enumerate(boxes)),
            action=read_box(read.get("action", dict, "a box"), "action"),
            chunk_size=read.integer("chunk_size"),
            execute_steps=read.integer("execute_steps"),
            observation_mean=read.numbers("observation_mean"),
            observation_std=read.numbers("observation_std"),
            observation_offset=read.numbers("observation_offset") if "observation_offset" in data else (),
            action_offset=read.numbers("action_offset"),
            action_scale=read.numbers("action_scale"),
            integration=Integration.read(read),
            method=read.text("method"),
            acting=ActingRule.from_json(read.get("acting", dict, "an object")) if "acting" in data else ActingRule(),
            hyperparameters=read.finite("hyperparameters", read.get("hyperparameters", dict, "an object")),
            training_data=read.optional_text("training_data"),
            environment_id=read.optional_text("environment_id"),
            environment=EnvironmentSpec.from_json(data["environment"]) if "environment" in data else None,
            started_from=read.texts("started_from") if "started_from" in data else {},
            control_rate_hz=read.optional_number("control_rate_hz"),
            observation_names=read.optional_words("observation_names"),
            action_names=read.optional_words("action_names"),
            license=read.optional_text("license") if "license" in data else None,
            variants={
                name: VariantSpec.from_json(variant, name)
                for name, variant in (read.get("variants", dict, "an object") if "variants" in data else {}).items()
            },
            files=read.texts("files"),
            format_version=version,
        )
        spec._require_comparable()
        return spec
