"""The table of a robot's contract, for model cards and `meam info`."""

from __future__ import annotations

from meam_policy.robot.contract import RobotContract

__all__ = ["COLUMNS", "contract_rows"]

COLUMNS = ("", "index", "name", "of", "kind", "unit", "frame", "says", "limits", "rate, per s", "gains", "home")
"""Titles of the columns."""


def contract_rows(robot: RobotContract) -> list[list[str]]:
    """A row of `COLUMNS` for every number of a contract: whether it is observed ("in") or an action ("out"), and so on.

    Empty text stands for what it does not say.
    """
    rows = []
    for side, numbers in (("in", robot.observation), ("out", robot.action)):
        for index, number in enumerate(numbers):
            said = {
                name: "" if value is None else f"{value:g}" if isinstance(value, (int, float)) else str(value)
                for name, value in vars(number).items()
            }
            lower, upper = said.get("lower", ""), said.get("upper", "")
            gains = " / ".join(part for part in (said.get("stiffness"), said.get("damping")) if part)
            own = [said["name"], said["joint"] or said["body"], said["kind"], said["unit"], said["frame"]]
            limits = f"{lower or '…'} to {upper or '…'}" if lower or upper else ""
            says, rate, home = (said.get(name, "") for name in ("representation", "max_rate", "default"))
            rows.append([side, str(index), *own, says, limits, rate, gains, home])
    return rows
