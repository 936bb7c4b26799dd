"""Train flow policies by maximum-entropy adjoint matching (ME-AM), from offline data."""

from meam_training.collection.collect import collect
from meam_training.collection.recorder import Recorder
from meam_training.config import PRESETS, TrainConfig
from meam_training.data.data_report import DataReport, data_report
from meam_training.data.dataset import OfflineDataset
from meam_training.networks.policy_module import PolicyModule
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.sweep import read_sweep, run_sweep
from meam_training.runs.trained_policy import load_networks
from meam_training.trainer import train

__all__ = [
    "PRESETS",
    "Checkpoint",
    "DataReport",
    "OfflineDataset",
    "PolicyModule",
    "Recorder",
    "TrainConfig",
    "collect",
    "data_report",
    "load_networks",
    "read_sweep",
    "run_sweep",
    "train",
]
