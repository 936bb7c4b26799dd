"""Labels and colours of methods: their names, and the settings that differ from their presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meam_policy.errors import ConfigError
from meam_training.config import TrainConfig

__all__ = ["COLOURS", "NAMES", "OBJECTIVES", "method_labels", "setting_text", "shared_settings"]

NAMES = {"bc": "BC flow", "qam": "QAM", "qam-edit": "QAM-EDIT", "trqam": "TRQAM", "me-am": "ME-AM"}
"""The methods' names in the literature."""

COLOURS = {
    "data": "#6b7280",
    "prior": "#b45309",
    "bc": "#2563eb",
    "qam": "#7c3aed",
    "qam-edit": "#0f766e",
    "trqam": "#be185d",
    "me-am": "#dc2626",
}
"""Colours of the data, the prior and the methods, the same in every figure."""

OBJECTIVES = {
    "adjoint": "adjoint matching",
    "bridge": "adjoint matching on bridges",
    "target_score": "target score",
    "reweighted": "reweighted flow matching",
    "two_scale": "weights early, adjoint late",
}
"""Names of the objectives of `TrainConfig.objective`."""

_LENGTHS = ("steps", "pretrain_steps")


def shared_settings(configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """The settings that all methods which take them change to the same value.

    Args:
        configs: Settings of every method; at least one method.
    """
    changes = {method: config.own_settings for method, config in configs.items()}
    # A rate that one method changes may be what another has anyway.
    held = {method: {"learning_rate": configs[method].adam_rate, **changed} for method, changed in changes.items()}
    return {
        name: value
        for changed in changes.values()
        for name, value in changed.items()
        if all(held[method].get(name) == value or not _takes(configs[method], name, value) for method in configs)
    }


def _takes(config: TrainConfig, name: str, value: object) -> bool:
    """Whether a setting may have a value beside the others."""
    try:
        config.changed(**{name: value})
    except ConfigError:
        return False
    return True


def method_labels(configs: Mapping[str, TrainConfig]) -> dict[str, str]:
    """Names of the methods, each with the changed settings that set it apart, e.g. "ME-AM (objective adjoint)".

    Settings shared by all methods, and the numbers of gradient steps, are left out.

    Args:
        configs: Settings of every method, or of several runs of one by any other keys.
    """
    apart = {*shared_settings(configs), *_LENGTHS}
    labels = {}
    for method, config in configs.items():
        own = {name: value for name, value in config.own_settings.items() if name not in apart}
        name = NAMES.get(config.method, config.method)
        labels[method] = f"{name} ({setting_text(own)})" if own else name
    return labels


def setting_text(settings: Mapping[str, Any]) -> str:
    """Settings as text: `{"objective": "adjoint", "steps": 6000}` gives "objective adjoint, steps 6000"."""
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in settings.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return " ".join(_value(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
