"""Settings as arguments of `meam train`."""

from __future__ import annotations

import ast

__all__ = ["as_flag", "flag", "option"]


def flag(name: str) -> str:
    """Flag of a setting, such as --num-critics."""
    return "--" + name.replace("_", "-")


def option(name: str, value: object, default: object) -> list[str]:
    """Convert a setting to arguments of `meam train`; a boolean becomes a flag if it differs from its default."""
    if isinstance(value, bool):
        return [] if value == default else [flag(name if value else f"no_{name}")]
    return [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]


def as_flag(name: str, value: str = "") -> str:
    """A setting on the command line, for `SettingText`: --chunk-size, --chunk-size 5, --no-compile, preset bc.

    Args:
        name: Its name; the method is chosen by a preset.
        value: Its value in Python's notation; empty for its flag alone.
    """
    given = ast.literal_eval(value) if value else None
    if name == "method":
        return f"preset {given}" if value else "preset"
    return " ".join(option(name, given, None)) if value else flag(name)
