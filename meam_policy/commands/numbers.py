"""The tables of what each number of an observation and an action is."""

from __future__ import annotations

from typing import Any

from meam_policy.console import print_table
from meam_policy.spec import PolicySpec

__all__ = ["numbers_as_json", "print_numbers"]


def print_numbers(spec: PolicySpec) -> None:
    """Print index, key, name, unit and range of every number that has a name, or the indices of every key."""
    named = spec.observation_names is not None
    if named or spec.observation[0].key is not None:
        rows, start = [], 0
        for box in spec.observation:
            numbers = spec.observation_numbers[start : start + box.size]
            key = box.key or ""
            if named:
                rows += [[n.index, key, n.name, n.unit or "", f"[{n.low:g}, {n.high:g}]"] for n in numbers]
            else:
                rows.append([f"{start} … {start + box.size - 1}", key, "", "", ""])
            start += box.size
        print_table("Numbers of the observation", ["index", "key", "name", "unit", "range"], rows)
    if spec.action_names is not None:
        rows = [[n.index, n.name, n.unit or "", f"[{n.low:g}, {n.high:g}]"] for n in spec.action_numbers]
        print_table("Numbers of the action", ["index", "name", "unit", "range"], rows)


def numbers_as_json(spec: PolicySpec) -> dict[str, Any]:
    """Index, key, name and unit of every number that has a name, as JSON data."""
    found = {"observation": spec.observation_numbers, "action": spec.action_numbers}
    return {
        where: [{"index": n.index, "key": n.key, "name": n.name, "unit": n.unit} for n in numbers if n.name is not None]
        for where, numbers in found.items()
    }
