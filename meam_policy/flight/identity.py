"""What a recording says of the policy that acted: enough to tell whether another one is the same."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from meam_policy.flight.schema import FORMAT

__all__ = ["changes", "identity_of"]

_WORDS = {
    "policy": "another class of policy",
    "spec_sha256": "another policy (spec_sha256)",
    "config_sha256": "another export (config_sha256)",
    "files": "another graph, or robot.json",
    "variant": "another variant",
    "acting": "another acting rule",
    "provider": "another execution provider",
    "safety": "other safety settings, which hold limits",
    "robot_sha256": "another robot contract, which holds limits",
    "onnxruntime": "another onnxruntime",
    "numpy": "another NumPy",
    "meam_policy": "another meam-policy",
    "python": "another Python",
    "machine": "another machine",
    "processor": "another processor",
}


def identity_of(policy: Any) -> dict[str, str]:
    """The identity of a policy, and of what computes its actions here; what it does not say is left out."""
    spec, robot, safety = policy.spec, getattr(policy, "robot", None), getattr(policy, "safety", None)
    found = {
        "format": FORMAT,
        "policy": f"{type(policy).__module__}.{type(policy).__qualname__}",
        "spec": spec.to_json(),
        "spec_sha256": spec.identity,
        "config_sha256": getattr(policy, "config_sha256", None),
        "files": json.dumps(dict(sorted(spec.files.items()))),
        "variant": str(getattr(policy, "variant", None)),
        "acting": spec.acting_name,
        "provider": getattr(policy, "provider", None),
        "safety": None if safety is None else json.dumps(asdict(safety)),
        "robot_sha256": None if robot is None else hashlib.sha256(json.dumps(robot.to_json()).encode()).hexdigest(),
        "onnxruntime": _version("onnxruntime") or _version("onnxruntime-gpu"),
        "numpy": _version("numpy"),
        "meam_policy": _version("meam-policy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
    }
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _processor() -> str | None:
    """The model of the CPU, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, None) or platform.processor() or None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def changes(recorded: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """What of an identity is another one now: a sentence for each, by its name."""
    return {
        name: f"{words}: recorded {_short(recorded.get(name))}, now {_short(now.get(name))}"
        for name, words in _WORDS.items()
        if recorded.get(name) != now.get(name)
    }


def _short(value: str | None) -> str:
    if value is None:
        return "none"
    return value if len(value) < 200 and not (len(value) == 64 and " " not in value) else f"{value[:12]}…"
