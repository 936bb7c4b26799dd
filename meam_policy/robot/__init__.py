"""What a policy's numbers are on its robot: `robot.json`, its words and its checks."""

from meam_policy.robot.contract import ActionNumber, ObservationNumber, RobotContract, Timing

__all__ = ["ActionNumber", "ObservationNumber", "RobotContract", "Timing"]
