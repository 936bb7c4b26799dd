"""Scripted demonstrators, which make the data sets that `meam collect` records."""

from meam_training.demonstrators.pockets import DEFAULT_MODE_SHARES, PocketsDemonstrator
from meam_training.demonstrators.pointmaze import PointmazeDemonstrator

__all__ = ["DEFAULT_MODE_SHARES", "PocketsDemonstrator", "PointmazeDemonstrator"]
