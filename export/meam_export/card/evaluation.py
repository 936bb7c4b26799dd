"""What `meam eval --json` wrote, read strictly, for the model card of the policy that it measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn

from meam_policy.errors import ConfigError, FormatError, NotFoundError
from meam_policy.folder.policy_folder import Config
from meam_policy.given_files import given_path, open_regular

__all__ = ["Evaluation", "Measured", "read_evaluation"]

MAX_BYTES = 2**20
"""An evaluation has about a thousand bytes."""

_TEXT, _COUNT = "one line of text", "a whole number"
_NUMBER, _TEXT_OR_NULL, _NUMBER_OR_NULL = "a finite number", "one line of text, or null", "a finite number, or null"
_SETTINGS = {
    "policy": _TEXT,
    "env_id": _TEXT,
    "seed": _COUNT,
    "num_envs": _COUNT,
    "device": _TEXT,
    "provider": _TEXT,
    "machine": _TEXT,
    "version": _TEXT,
    "config_sha256": _TEXT,
    "revision": _TEXT_OR_NULL,
    "subfolder": _TEXT_OR_NULL,
}
_OPTIONS = {"env_kwargs": _TEXT, "max_episode_steps": _COUNT, "named_environment": _TEXT}
"""How another environment was made than the policy's own; absent unless asked for."""
_FIGURES = {
    "acting": _TEXT,
    "variant": _TEXT_OR_NULL,
    "episodes": _COUNT,
    "return_mean": _NUMBER,
    "ci_low": _NUMBER,
    "ci_high": _NUMBER,
    "success": _NUMBER_OR_NULL,
    "latency_p50_ms": _NUMBER,
    "latency_p99_ms": _NUMBER,
}
_GAINS = {"gain_low": _NUMBER_OR_NULL, "gain_high": _NUMBER_OR_NULL}


@dataclass(frozen=True)
class Measured:
    """The figures of one acting rule; see `RolloutResult.summary`.

    Attributes:
        acting: The rule by which the policy acted.
        variant: The graph that it ran; None for the policy itself.
        episodes: Number of episodes.
        return_mean: Mean return.
        ci_low: Lower end of its 95 % interval.
        ci_high: Upper end of it.
        success: Share of successful episodes; None if the environment does not report it.
        latency_p50_ms: Median milliseconds of the calls that ran the network.
        latency_p99_ms: 99th percentile of it.
        gain_low: Lower end of the 95 % interval of the gain over the baseline; None without one.
        gain_high: Upper end of it.
    """

    acting: str
    variant: str | None
    episodes: int
    return_mean: float
    ci_low: float
    ci_high: float
    success: float | None
    latency_p50_ms: float
    latency_p99_ms: float
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """One call of `meam eval`: what was asked, where it ran, and what it measured.

    Attributes:
        policy: The policy, as it was given; of an absolute path only its last part.
        env_id: The environment.
        seed: Seed of the first episode.
        num_envs: Environments that ran in parallel.
        provider: onnxruntime's execution provider.
        machine: Processor of the machine.
        version: Version of this package.
        command: The command that measures it again.
        baseline: The rule over which gains are; None if one rule was measured.
        rules: The figures of every rule.
    """

    policy: str
    env_id: str
    seed: int
    num_envs: int
    provider: str
    machine: str
    version: str
    command: str
    baseline: str | None
    rules: tuple[Measured, ...]


def read_evaluation(file: Path, config: Config) -> Evaluation:
    """Read the line that `meam eval --json` printed.

    Args:
        file: The file.
        config: The policy's `config.json`.

    Raises:
        NotFoundError: the file does not exist, or cannot be read.
        FormatError: it is not what `meam eval --json` writes, or only a part of the episodes was finished.
        ConfigError: another policy was measured, or another export of it.
    """
    data = _parse(file)
    if data.get("partial"):
        _refuse(file, "partial", data["partial"], "the episodes of a finished evaluation")
    many = "rules" in data
    rows = data["rules"] if many else [data]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        _refuse(file, "rules", rows, "a list of figures by rule")
    settings = {name: _field(file, data, name, kind) for name, kind in _SETTINGS.items()}
    settings |= {name: _field(file, data, name, kind) for name, kind in _OPTIONS.items() if name in data}
    packages = data.get("packages")
    if not isinstance(packages, list) or not all(_is(package, _TEXT) for package in packages):
        _refuse(file, "packages", packages, "a list of package names")
    if settings["config_sha256"] != config.sha256:
        raise ConfigError(
            f"{file} is of another policy, or of another export of it: it measured {settings['policy']}, whose "
            f"config.json has SHA-256 {settings['config_sha256'][:16]}…; expected {config.sha256[:16]}…, this one's. "
            "Measure this policy: meam eval POLICY --json > FILE."
        )
    fields = _FIGURES | (_GAINS if many else {})
    rules = tuple(Measured(**{name: _field(file, row, name, kind) for name, kind in fields.items()}) for row in rows)
    for rule in rules:
        if rule.variant is not None and rule.variant not in config.spec.variants:
            _refuse(file, "variant", rule.variant, f"one of {', '.join(config.spec.variants) or 'none'}")
        if rule.episodes < 1 or not rule.ci_low <= rule.return_mean <= rule.ci_high:
            _refuse(file, "return_mean", rule.return_mean, "one or more episodes, and a mean within its interval")
        if rule.success is not None and not 0 <= rule.success <= 1:
            _refuse(file, "success", rule.success, "a share from 0 to 1")
    path = given_path(f'{file}: "policy"', settings["policy"])
    settings["policy"] = path.name if path.is_absolute() else settings["policy"]
    given = data.get("variant")
    command = _command(settings, rules, given if _is(given, _TEXT) else None, packages, config)
    kept = ("policy", "env_id", "seed", "num_envs", "provider", "machine", "version")
    baseline = _field(file, data, "baseline", _TEXT) if many else None
    return Evaluation(**{name: settings[name] for name in kept}, command=command, baseline=baseline, rules=rules)


def _command(
    settings: Mapping[str, Any], rules: tuple[Measured, ...], variant: str | None, packages: list[str], config: Config
) -> str:
    words = ["meam", "eval", settings["policy"]]
    for name in ("revision", "subfolder"):
        words += [f"--{name}", settings[name]] if settings[name] is not None else []
    words += ["--env-id", settings["named_environment"]] if "named_environment" in settings else []
    words += ["--env-kwargs", settings["env_kwargs"]] if "env_kwargs" in settings else []
    words += ["--max-episode-steps", str(settings["max_episode_steps"])] if "max_episode_steps" in settings else []
    words += ["--episodes", str(rules[0].episodes), "--seed", str(settings["seed"])]
    words += ["--num-envs", str(settings["num_envs"])] if settings["num_envs"] != 1 else []
    words += ["--variant", variant] if variant is not None else []
    own = config.spec.select(variant)[0].acting_name
    named = [rule.acting for rule in rules]
    words += ["--acting", *named] if named != [own] else []
    words += ["--device", settings["device"]] if settings["device"] != "cpu" else []
    words += ["--import", *packages] if packages else []
    return " ".join(map(quote, words))


def _parse(file: Path) -> dict[str, Any]:
    try:
        with open_regular(file) as opened:
            text = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise NotFoundError(
            f"The results {file} cannot be read: {error.strerror}. Write them with: meam eval POLICY --json > FILE."
        ) from error
    try:
        data = json.loads(text) if len(text) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        seen = f"more than {MAX_BYTES} bytes" if len(text) > MAX_BYTES else repr(text[:40])
        raise FormatError(
            f"{file} is not what `meam eval --json` writes: it holds {seen}; expected one JSON object. Write it with: "
            "meam eval POLICY --json > FILE."
        )
    return data


def _field(file: Path, data: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in data:
        _refuse(file, name, "missing", kind)
    if not _is(data[name], kind):
        _refuse(file, name, data[name], kind)
    return data[name]


def _is(value: Any, kind: str) -> bool:
    if value is None:
        return kind in (_TEXT_OR_NULL, _NUMBER_OR_NULL)
    if kind in (_TEXT, _TEXT_OR_NULL):
        return isinstance(value, str) and 1 <= len(value) <= 300 and value.isprintable() and "`" not in value
    if kind == _COUNT:
        return type(value) is int and 0 <= value < 2**63
    return type(value) in (int, float) and abs(value) <= 1e300 and math.isfinite(value)


def _refuse(file: Path, name: str, seen: Any, expected: str) -> NoReturn:
    raise FormatError(
        f'{file} is not what `meam eval --json` writes in this version: "{name}" is {str(seen)[:60]!r}; expected '
        f"{expected}. Measure again: meam eval POLICY --json > FILE."
    )
