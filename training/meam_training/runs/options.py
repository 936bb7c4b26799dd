"""Settings as arguments of `meam train`."""

from __future__ import annotations

__all__ = ["flag", "option"]


def flag(name: str) -> str:
    """Flag of a setting, such as --num-critics."""
    return "--" + name.replace("_", "-")


def option(name: str, value: object, default: object) -> list[str]:
    """Convert a setting to arguments of `meam train`; a boolean becomes a flag if it differs from its default."""
    if isinstance(value, bool):
        return [] if value == default else [flag(name if value else f"no_{name}")]
    return [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
