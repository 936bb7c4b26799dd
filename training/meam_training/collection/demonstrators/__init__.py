"""Demonstrators, scripted or trained policies, whose episodes `meam collect` records."""

from meam_training.collection.demonstrators.episode import Episode
from meam_training.collection.demonstrators.manipulation import MANIPULATION_FAMILIES, ManipulationDemonstrator
from meam_training.collection.demonstrators.pockets import DEFAULT_MODE_SHARES, PocketsDemonstrator
from meam_training.collection.demonstrators.pointmaze import PointmazeDemonstrator
from meam_training.collection.demonstrators.policy import PolicyDemonstrator

__all__ = [
    "DEFAULT_MODE_SHARES",
    "MANIPULATION_FAMILIES",
    "Episode",
    "ManipulationDemonstrator",
    "PocketsDemonstrator",
    "PointmazeDemonstrator",
    "PolicyDemonstrator",
]
