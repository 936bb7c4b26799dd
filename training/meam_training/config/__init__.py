"""Training settings: what they are, what they may be, and the presets that name the methods."""

from meam_training.config.train_config import (
    PRESETS,
    Logger,
    Method,
    Objective,
    Precision,
    Scheme,
    TrainConfig,
)

__all__ = ["PRESETS", "Logger", "Method", "Objective", "Precision", "Scheme", "TrainConfig"]
