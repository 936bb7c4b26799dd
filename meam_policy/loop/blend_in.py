"""The first actions of an episode, approached gradually from where the robot is."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.acting.observation import flatten_observation
from meam_policy.errors import ConfigError, FormatError
from meam_policy.robot import RobotContract
from meam_policy.spec import PolicySpec

__all__ = ["BlendIn"]


class BlendIn:
    """Blends the first actions of an episode in, linearly over time.

    Args:
        robot: Says where every action begins: at an observed joint position, at its home pose, or at 0.
        spec: The policy's.
        ticks: Ticks until the policy's actions are executed as they are.

    Attributes:
        ticks: The same.
    """

    def __init__(self, robot: RobotContract, spec: PolicySpec, ticks: int) -> None:
        self._robot, self._spec, self.ticks = robot, spec, ticks
        self._start = np.zeros(spec.action_dim)

    @classmethod
    def of(cls, robot: RobotContract, spec: PolicySpec, seconds: float | None, rate_hz: float) -> BlendIn:
        """The blending over a time; None takes the contract's.

        Raises:
            ConfigError: the time is out of range, or the contract does not say where an action begins.
        """
        seconds = robot.timing.blend_in_s if seconds is None else seconds
        try:
            replace(robot, timing=replace(robot.timing, blend_in_s=seconds))
        except FormatError as error:
            raise ConfigError(str(error).removeprefix("timing.")) from error
        return cls(robot, spec, math.ceil(seconds * rate_hz))

    def begin(self, observation: Any) -> None:
        """Begin an episode at an observation."""
        if not self.ticks:
            return
        rows, _ = flatten_observation(self._spec, observation)
        row = rows[0].astype(np.float64) + np.array(self._spec.observation_offset or 0.0)
        for index, number in enumerate(self._robot.action):
            measured = self._robot.measured_by(number)
            self._start[index] = (number.default or 0.0) if measured is None else row[measured]

    def blend(self, action: NDArray[Any], tick: int) -> NDArray[Any]:
        """The action of a tick, counted from the beginning of the episode; shaped and typed as given."""
        weight = (tick + 1) / (self.ticks + 1)
        if weight >= 1:
            return action
        start = self._start.reshape(action.shape)
        return (start + weight * (action - start)).astype(action.dtype)
