"""Training data of what a flight recorder recorded."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from meam_policy.errors import ConfigError, DatasetError
from meam_policy.flight import Flight
from meam_policy.replay.training_steps import of_evaluation, recorded_rate_hz, recorded_spec, stretches
from meam_training.collection.recorder import Recorder

__all__ = ["record_flights"]


def record_flights(
    flights: Sequence[Flight],
    dataset_id: str,
    *,
    root: str | os.PathLike[str] | None = None,
    reward: float | None = None,
) -> tuple[Path, int, int]:
    """Write flights of one policy as a local Minari data set: an episode for every stretch without a gap.

    The data set's control rate is that of the loop, and its environment the policy's if all of them are evaluations.

    Args:
        flights: Of the same observation and action spaces, at the same rate.
        dataset_id: Minari id.
        root: Folder of the Minari data sets; None takes Minari's own.
        reward: Reward of the steps for which none was recorded, as on a robot; None refuses them.

    Returns:
        The folder of the data set, its episodes, and its steps.

    Raises:
        ConfigError: a reward is missing, or the reward or the name is not valid.
        DatasetError: there is no step in them, or their spaces or rates differ.
        FormatError: a message has a field that is missing, or of another type or size.
        OutputError: the data set exists, or cannot be written.
        MissingExtraError: minari is not installed.
    """
    if reward is not None and not math.isfinite(reward):
        raise ConfigError(f"reward is {reward}; expected a finite number.")
    if not flights:
        raise DatasetError("There is no flight; expected one or more.")
    spec, rate_hz = recorded_spec(flights[0]), recorded_rate_hz(flights[0])
    for flight in flights:
        other = recorded_spec(flight)
        if (other.observation, other.action) != (spec.observation, spec.action):
            raise DatasetError(
                f"{flight.path} has other spaces than {flights[0].path}; expected flights of one policy. Convert them "
                "one by one."
            )
        if (other_hz := recorded_rate_hz(flight)) != rate_hz:
            raise DatasetError(
                f"{flight.path} was flown at {_hz(other_hz)}, and {flights[0].path} at {_hz(rate_hz)}; expected "
                "flights of one rate. Convert them one by one."
            )
    found = [(flight, stretch) for flight in flights for stretch in stretches(flight)]
    if not found:
        raise DatasetError(f"{flights[0].path} has no two ticks one after the other; expected a longer recording.")
    for flight, stretch in found:
        if reward is None and any(step.reward is None for step in stretch.steps):
            raise ConfigError(
                f"{flight.path} has no rewards: a robot gives none. Pass a number for them, such as --reward 0 "
                "(reward=0.0), with which behaviour cloning, bc, can learn from it."
            )
    with Recorder(
        dataset_id,
        spec.observation_space,
        spec.action_space,
        root=root,
        control_rate_hz=rate_hz,
        environment_id=spec.environment_id if all(map(of_evaluation, flights)) else None,
    ) as recorder:
        for _, stretch in found:
            recorder.reset(stretch.first)
            for number, (action, observation, earned, terminated) in enumerate(stretch.steps, 1):
                last = number == len(stretch.steps) and not terminated
                gained = reward if earned is None else earned
                assert gained is not None
                recorder.step(action, observation, gained, terminated, last)
        counts = recorder.episodes, recorder.transitions
        return recorder.finish(), *counts


def _hz(rate: float | None) -> str:
    return "no rate" if rate is None else f"{rate:g} Hz"
