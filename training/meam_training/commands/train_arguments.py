"""Arguments of `meam train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from meam_training.commands.source_options import SourceOptions
from meam_training.config import Method, Statistics, TrainConfig

__all__ = ["Draft", "TrainArguments"]


@dataclass(frozen=True)
class Draft(TrainConfig):
    """Settings as built by the parser, unchecked; they are checked once it is known which of them were given."""

    # The preset chooses the method, and with it the settings of its scheme, which a flag would leave behind.
    method: tyro.conf.Suppress[Method] = "me-am"

    def __post_init__(self) -> None:
        """Check nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments(SourceOptions):
    """Arguments of `meam train`, after the preset."""

    data: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="TEXT...")]
    """Minari id or folder, OGBench .npz, HDF5 file of D4RL or robomimic, or folder of a LeRobot data set; or several,
    which are joined."""
    output_dir: Path
    """Folder of the run."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="", constructor=Draft)]
    env_kwargs: str | None = None
    """Arguments of the environment, as in '{"g": 2}', in place of recorded ones; kept in the policy."""
    max_episode_steps: int | None = None
    """Time limit of the environment, steps, likewise; by default as recorded or registered."""
    start_from: Annotated[str | None, tyro.conf.arg(name="from", metavar="TEXT")] = None
    """Start from the weights of a policy folder, a Hub repo id, a run or a checkpoint, and with its settings unless
    others are given."""
    statistics: Statistics = "kept"
    """With --from: normalisation kept from the policy, or renewed from the data."""
    resume: bool = False
    """Resume from the newest checkpoint in the output folder, with the run's data and settings unless others are
    given."""
    chooses_to_compile: tyro.conf.Suppress[bool] = False
    """Whether updates are compiled if that pays and a compiler is there, in place of what the settings say."""
    json: bool = False
    """Print one line of JSON to stdout at the end."""
