"""Replaying a flight: every action computed again from what was recorded, by the code that gave it."""

from meam_policy.replay.report import Difference, ReplayReport
from meam_policy.replay.run import replay_flight

__all__ = ["Difference", "ReplayReport", "replay_flight"]
