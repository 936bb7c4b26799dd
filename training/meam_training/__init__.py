"""Train flow policies by maximum-entropy adjoint matching (ME-AM), from offline data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from meam_training.config import PRESETS, TrainConfig
from meam_training.data.dataset import OfflineDataset

if TYPE_CHECKING:
    from meam_training.collection.collect import collect
    from meam_training.collection.recorder import Recorder
    from meam_training.data.data_report import DataReport, data_report
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

_MODULES = {
    "Checkpoint": "runs.checkpoint",
    "DataReport": "data.data_report",
    "PolicyModule": "networks.policy_module",
    "Recorder": "collection.recorder",
    "collect": "collection.collect",
    "data_report": "data.data_report",
    "load_networks": "runs.trained_policy",
    "read_sweep": "runs.sweep",
    "run_sweep": "runs.sweep",
    "train": "trainer",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: these need PyTorch, which takes a second to import.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
