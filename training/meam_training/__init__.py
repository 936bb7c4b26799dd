"""Train flow policies by maximum-entropy adjoint matching (ME-AM), from offline data."""

from meam_training.checkpoint import Checkpoint
from meam_training.collect import collect
from meam_training.config import PRESETS, TrainConfig
from meam_training.dataset import OfflineDataset
from meam_training.sweep import read_sweep, run_sweep
from meam_training.trainer import train

__all__ = ["PRESETS", "Checkpoint", "OfflineDataset", "TrainConfig", "collect", "read_sweep", "run_sweep", "train"]
