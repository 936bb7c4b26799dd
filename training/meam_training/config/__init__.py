"""Training settings, their validation, and one preset per method."""

from meam_training.config.train_config import (
    PRESETS,
    Dual,
    Logger,
    Method,
    Objective,
    Precision,
    Scheme,
    Statistics,
    TrainConfig,
)

__all__ = ["PRESETS", "Dual", "Logger", "Method", "Objective", "Precision", "Scheme", "Statistics", "TrainConfig"]
