"""What is in a data set, and what of it is not learned from or should not be there, before anything is learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from meam_policy.typed import typed
from meam_training.data.action_range import action_range
from meam_training.data.dataset import OfflineDataset
from meam_training.data.dataset_cache import array_blocks, moments, rows_per_block
from meam_training.data.still_numbers import stand_still
from meam_training.setting_text import SettingText

__all__ = [
    "ChunkCoverage",
    "Clipping",
    "DataReport",
    "NumberRange",
    "counted",
    "data_report",
    "endless_warning",
    "indifferent_warning",
]

BINS = 40
"""Bins of the histograms of actions, over the box."""

AT_BOUND = 1e-3
"""Distance from a bound at which a number counts as at it, as a share of the box."""

MANY_SHORT = 0.1
"""Share of the rows in episodes shorter than a chunk from which it is warned about, if these are left out: whole
situations are then missing, while of longer episodes only the end is."""

MOST_CUT = 0.5
"""Share of the rows without a whole chunk from which it is warned about, whether or not they are left out."""

MANY_AT_BOUND = 0.2
"""Share of an action number's values at its bounds from which it is warned about."""

LITTLE_USED = 0.1
"""Share of the box used by an action number, below which it is warned about."""

MANY_CLIPPED = 0.01
"""Share of rows with clipped actions from which it is warned about."""

MANY_REPEATED = 0.01
"""Share of repeated rows from which it is warned about."""

NAMED = 5
"""Numbers that a warning names; of more it gives the count."""


@dataclass(frozen=True)
class ChunkCoverage:
    """How chunks fit into the episodes.

    Attributes:
        chunk_size: Actions in a chunk.
        padded: Whether chunks that cross the end of their episode are learned from, with the actions within it.
        whole: Rows at which a whole chunk starts.
        cut: Rows at which a chunk would cross the end of its episode.
        short_episodes: Episodes shorter than a chunk.
        short_rows: Rows in them.
    """

    chunk_size: int
    padded: bool
    whole: int
    cut: int
    short_episodes: int
    short_rows: int

    @classmethod
    def of(cls, dataset: OfflineDataset, chunk_size: int, padded: bool) -> ChunkCoverage:
        """Count the rows of a data set."""
        lengths = _lengths(dataset)
        whole = int(np.maximum(lengths - chunk_size + 1, 0).sum())
        short = lengths < chunk_size
        return cls(chunk_size, padded, whole, len(dataset) - whole, int(short.sum()), int(lengths[short].sum()))

    @property
    def cut_share(self) -> float:
        """Share of the rows at which no whole chunk starts."""
        return self.cut / (self.whole + self.cut)

    @property
    def fact(self) -> str:
        """The counts in words."""
        if not self.whole:
            return f"no episode is as long as a chunk of {self.chunk_size} actions"
        text = f"a whole chunk of {self.chunk_size} starts at {self.whole} rows"
        if self.cut:
            text += f"; the other {self.cut} ({_percent(self.cut_share)}) are too near the end of their episode, and "
            text += "learned from up to there" if self.padded else "left out"
        if self.short_episodes:
            text += f"; shorter than a chunk: {counted(self.short_episodes, 'episode')} ({self.short_rows} rows)"
        return text

    @property
    def warning(self) -> str | None:
        """What is lost, and what to do; None if that is little."""
        if not self.whole:
            text = "No episode is as long as {chunk_size} = {0}: training will refuse. Use shorter chunks."
            return SettingText(text, self.chunk_size)
        lost = not self.padded and self.short_rows >= MANY_SHORT * (self.whole + self.cut)
        if self.cut_share < MOST_CUT and not lost:
            return None
        where = f"{_percent(self.cut_share)} of the rows are within {self.chunk_size - 1} steps of an episode's end"
        if self.short_episodes:
            where += f", {self.short_rows} of them in {counted(self.short_episodes, 'episode')} shorter than a chunk"
        if not self.padded:
            return SettingText(
                "{0}; with {chunk_size} = {1} nothing is learned from them. Set {pad_chunks:True}, or use shorter "
                "chunks.",
                where,
                self.chunk_size,
            )
        return SettingText(
            "{0}; with {chunk_size} = {1} the later actions of a chunk are learned from the others alone. Use shorter "
            "chunks, or execute fewer of their steps.",
            where,
            self.chunk_size,
        )


@dataclass(frozen=True)
class NumberRange:
    """The values of one number of the action or the observation.

    Attributes:
        name: Its index, or its key and the index within.
        low: Lower bound of its box; None if there is none.
        high: Upper bound of its box; None if there is none.
        least: Smallest recorded value.
        greatest: Largest recorded value.
        at_low: Share of the rows at its lower bound, or within a thousandth of the box.
        at_high: Share of the rows at its upper bound.
        outside: Rows that lie beyond the box by rounding; actions are clipped.
        still: Whether it stands still; see `still_numbers.stand_still`.
        counts: Histogram over the box [bins]; empty without two bounds.
    """

    name: str
    low: float | None
    high: float | None
    least: float
    greatest: float
    at_low: float
    at_high: float
    outside: int
    still: bool
    counts: tuple[int, ...]

    @property
    def used(self) -> float | None:
        """Share of its box between the smallest and the largest value; None without two bounds."""
        if self.low is None or self.high is None or self.high <= self.low:
            return None
        return (self.greatest - self.least) / (self.high - self.low)


@dataclass(frozen=True)
class Clipping:
    """Recorded actions that are changed before anything is learned from them.

    Attributes:
        rows: Rows of which an action is clipped.
        excess: Largest distance of an action from where it is clipped, environment units.
        number: Index of the number of the action that is so far out.
    """

    rows: int
    excess: float
    number: int

    def fact(self, rows: int) -> str:
        """The counts in words.

        Args:
            rows: Rows of the data set.
        """
        of_all = f"{counted(self.rows, 'row')} ({_percent(self.rows / rows)})"
        return f"actions of {of_all} by up to {self.excess:.3g} (number {self.number})"

    @classmethod
    def on_reading(cls, dataset: OfflineDataset) -> Clipping | None:
        """What was clipped to the box when the data was read; None if nothing was."""
        if not dataset.clipped:
            return None
        worst = max(dataset.clipped, key=lambda each: each.excess)
        return cls(sum(each.rows for each in dataset.clipped), worst.excess, worst.number)

    @classmethod
    def in_training(cls, dataset: OfflineDataset) -> Clipping | None:
        """What training clips to the range of the data (`action_range`), far from all others; None if nothing."""
        box = dataset.action_box
        low, high = action_range(dataset.actions, box)
        rows, excess = 0, np.zeros(box.size)
        for part in _blocks(len(dataset), box.size):
            block = np.asarray(dataset.actions[part], np.float64).clip(box.low, box.high)
            beyond = np.maximum(low - block, block - high)
            rows += int((beyond > 0).any(axis=1).sum())
            excess = np.maximum(excess, beyond.max(axis=0))
        return cls(rows, float(excess.max()), int(excess.argmax())) if rows else None


@dataclass(frozen=True)
class DataReport:
    """What is in a data set.

    Attributes:
        dataset_id: Name of the data set, if known.
        environment: Environment it was recorded in, with what is beyond its id, if known.
        control_rate_hz: Rate at which actions were applied, Hz, if known.
        rows: Transitions.
        episodes: Recorded episodes.
        lengths: Length of each episode [episodes].
        returns: Undiscounted return of each episode [episodes].
        terminated: Episodes at whose last row the task ended; the others were cut off.
        reward_least: Smallest reward.
        reward_mean: Mean reward.
        reward_greatest: Largest reward.
        indifferent: Warning that no action can be better than another; None if one can.
        endless: Warning that no episode ends; None if one does.
        rewarded: Episodes in which the largest reward occurs, if rewards take two values, so that it marks success.
        chunks: How chunks fit into the episodes.
        actions: Numbers of the action.
        clipped: Actions that were clipped to the box when the data was read; None if none were.
        outlying: Actions far from all others, which are clipped in training (with `action_scaling="data"`); None if
            there are none.
        observations: Numbers of the observation, as they were recorded; None in a quick report.
        repeated_rows: Rows whose observation and action have occurred before; None in a quick report.
        repeated_episodes: Episodes that are copies of earlier ones, row by row; None in a quick report.
    """

    dataset_id: str | None
    environment: str | None
    control_rate_hz: float | None
    rows: int
    episodes: int
    lengths: NDArray[np.int64]
    returns: NDArray[np.float64]
    terminated: int
    reward_least: float
    reward_mean: float
    reward_greatest: float
    indifferent: str | None
    endless: str | None
    rewarded: int | None
    chunks: ChunkCoverage
    actions: tuple[NumberRange, ...]
    clipped: Clipping | None
    outlying: Clipping | None
    observations: tuple[NumberRange, ...] | None
    repeated_rows: int | None
    repeated_episodes: int | None

    @property
    def facts(self) -> dict[str, str]:
        """The report in a few lines, by name."""
        rewards = f"from {self.reward_least:.4g} to {self.reward_greatest:.4g}, mean {self.reward_mean:.4g}"
        if self.rewarded is not None:
            share = _percent(self.rewarded / self.episodes)
            rewards += f"; the larger of two in {counted(self.rewarded, 'episode')} ({share})"
        rate = "not recorded" if self.control_rate_hz is None else f"{self.control_rate_hz:g} Hz"
        facts = {
            "rows": f"{self.rows} in {counted(self.episodes, 'episode')} of {_spread(self.lengths, '.0f')} steps",
            "chunks": self.chunks.fact,
            "ends": f"episodes in which the task ended: {self.terminated}; cut off: {self.episodes - self.terminated}",
            "rewards": rewards,
            "returns": f"{_spread(self.returns, '.4g')} an episode",
            "actions": _numbers(self.actions, "clipped to the box"),
            "rate": rate,
            "environment": self.environment or "not recorded",
        }
        clipped = {"to the box when read": self.clipped, "to the range of the others in training": self.outlying}
        said = [f"{each.fact(self.rows)} {where}" for where, each in clipped.items() if each is not None]
        if said:
            facts["clipped"] = "; ".join(said)
        if self.observations is not None:
            facts["observations"] = _numbers(self.observations, "kept as they are")
        if self.repeated_rows is not None:
            facts["repeated"] = (
                f"{counted(self.repeated_rows, 'row')}, {counted(self.repeated_episodes or 0, 'whole episode')}"
            )
        return facts

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be wrong, each in a sentence or two; a `SettingText` where it names settings."""
        found = [self.chunks.warning] if self.chunks.warning else []
        found += [text for text in (self.indifferent, self.endless) if text is not None]
        found += [
            *_named(self.actions, lambda n: n.still, "Action {} {stands} still: the policy will hold {it} there."),
            *_named(
                self.actions,
                lambda n: not n.still and n.used is not None and n.used < LITTLE_USED,
                f"Action {{}} {{uses}} less than {_percent(LITTLE_USED)} of {{its}} box: check the units and the box.",
            ),
            *_named(
                self.actions,
                lambda n: n.at_low + n.at_high > MANY_AT_BOUND,
                f"Action {{}} {{is}} at a bound in more than {_percent(MANY_AT_BOUND)} of the rows: check whether the "
                "recording clipped commands.",
            ),
        ]
        if self.clipped is not None and self.clipped.rows >= MANY_CLIPPED * self.rows:
            found.append(
                f"The recorded actions of {_percent(self.clipped.rows / self.rows)} of the rows lay beyond the box, by "
                f"up to {self.clipped.excess:.3g}, and were clipped: check the units and the box."
            )
        if self.observations is not None:
            found += _named(
                self.observations, lambda n: n.still, "Observation {} {stands} still: nothing is learned from {it}."
            )
        if self.repeated_episodes:
            found.append(f"Copies of earlier episodes: {self.repeated_episodes}. Leave them out.")
        elif (self.repeated_rows or 0) > MANY_REPEATED * self.rows:
            found.append(
                f"{self.repeated_rows} rows ({_percent((self.repeated_rows or 0) / self.rows)}) repeat an earlier "
                "observation and action: the recording stood still, or holds copies."
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data, with the warnings; of lengths and returns the least, median and greatest."""
        data = dataclasses.asdict(self)
        for name in ("lengths", "returns"):
            values = data.pop(name)
            data[name] = dict(zip(("least", "median", "greatest"), _extent(values), strict=True))
        return {**data, "warnings": list(self.warnings)}


@typed()
def data_report(
    dataset: OfflineDataset,
    chunk_size: int = 1,
    pad_chunks: bool = True,
    quick: bool = False,
    *,
    action_scaling: Literal["data", "box"] = "data",
) -> DataReport:
    """Look through a data set, block by block, so that it may be larger than the memory.

    Args:
        dataset: The data.
        chunk_size: Actions in a chunk, at least 1.
        pad_chunks: Whether chunks that cross the end of their episode are learned from; see `TrainConfig.pad_chunks`.
        quick: Leave out the observations, which are most of the data, and the search for repeated rows.
        action_scaling: How actions will be scaled; see `TrainConfig.action_scaling`.

    Raises:
        ConfigError: an argument has another type.
    """
    boxes, offset = dataset.observation_boxes, dataset.observation_offset
    names = [
        str(index) if box.key is None else f"{box.key}[{index}]" if box.size > 1 else box.key
        for box in boxes
        for index in range(box.size)
    ]
    low, high = (np.concatenate([getattr(box, bound) for box in boxes]) for bound in ("low", "high"))
    rewards = dataset.rewards
    least, greatest = float(rewards.min()) + 0.0, float(rewards.max()) + 0.0  # -0.0 is 0.0
    # Of two values: no reward lies between them.
    two = least < greatest and bool(((rewards == least) | (rewards == greatest)).all())
    ends = np.flatnonzero(dataset.episode_ends)
    starts = np.concatenate([[0], ends[:-1] + 1])
    repeated = (None, None) if quick else _repeated(dataset, starts)
    return DataReport(
        dataset_id=dataset.dataset_id,
        environment=None if dataset.recorded_environment is None else str(dataset.recorded_environment),
        control_rate_hz=dataset.control_rate_hz,
        rows=len(dataset),
        episodes=len(ends),
        lengths=_lengths(dataset),
        returns=dataset.episode_returns,
        terminated=int(dataset.terminations[ends].sum()),
        reward_least=least,
        reward_mean=float(rewards.mean(dtype=np.float64)),
        reward_greatest=greatest,
        indifferent=indifferent_warning(dataset),
        endless=endless_warning(dataset),
        rewarded=int(np.logical_or.reduceat(rewards == greatest, starts).sum()) if two else None,
        chunks=ChunkCoverage.of(dataset, chunk_size, pad_chunks),
        actions=_ranges(
            dataset.actions,
            [str(index) for index in range(dataset.action_dim)],
            np.array(dataset.action_box.low),
            np.array(dataset.action_box.high),
            moments(lambda: array_blocks(dataset.actions)),
        ),
        clipped=Clipping.on_reading(dataset),
        outlying=Clipping.in_training(dataset) if action_scaling == "data" else None,
        observations=None
        if quick
        else _ranges(dataset.observations, names, low, high, dataset.observation_moments, offset),
        repeated_rows=repeated[0],
        repeated_episodes=repeated[1],
    )


def indifferent_warning(dataset: OfflineDataset) -> SettingText | None:
    """Warning that no action can be better than another; None if one can.

    That is where every reward is the same, and is 0 or collected without end: else it matters how long an episode is.
    """
    least, greatest = float(dataset.rewards.min()) + 0.0, float(dataset.rewards.max())
    if least != greatest or (least and dataset.terminations.any()):
        return None
    return SettingText(
        "Every reward in the data is {0:.4g}: no action is better than another, and there is nothing to improve on. "
        'Check the rewards, or imitate: {method:"bc"} needs none.',
        least,
    )


def endless_warning(dataset: OfflineDataset) -> SettingText | None:
    """Warning that no episode ends, neither by a termination nor cut off before the last row; None if one does."""
    if np.count_nonzero(dataset.episode_ends) > 1 or dataset.terminations.any():
        return None
    return SettingText(
        "No episode ends in the data: all {0} rows are one, as if cut off at the last. So the critics learn what "
        "rewards without end are worth, as {discount} weighs them, and no whole return is known to compare policies "
        "with. An evaluation needs an environment with a time limit.",
        len(dataset),
    )


def _lengths(dataset: OfflineDataset) -> NDArray[np.int64]:
    return np.diff(np.flatnonzero(dataset.episode_ends), prepend=-1)


def _blocks(rows: int, numbers: int) -> Iterator[slice]:
    step = rows_per_block(numbers)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _ranges(
    columns: NDArray[np.float32],
    names: list[str],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    mean_and_std: tuple[NDArray[np.float64], NDArray[np.float64]],
    offset: tuple[float, ...] = (),
) -> tuple[NumberRange, ...]:
    """Values of each column [n, columns], to which an offset is added, against its bounds."""
    rows, count = columns.shape
    bounded = np.isfinite(low) & np.isfinite(high) & (high > low)
    with np.errstate(over="ignore", invalid="ignore"):
        width = np.where(bounded, high - low, 1.0)
        bounded &= np.isfinite(width)  # a box of the largest floats has none
    width = np.where(bounded, width, 1.0)
    origin = np.where(bounded, low, 0.0)
    margin = np.where(bounded, AT_BOUND * width, 0.0)
    least, greatest = np.full(count, np.inf), np.full(count, -np.inf)
    at_low, at_high, outside = np.zeros((3, count), np.int64)
    counts = np.zeros((count, BINS), np.int64)
    # A bound in float64 may lie between two floats.
    floor, ceiling = low.astype(np.float32), high.astype(np.float32)
    for part in _blocks(rows, count):
        block = np.asarray(columns[part]) + np.array(offset) if offset else np.asarray(columns[part])
        least, greatest = np.minimum(least, block.min(axis=0)), np.maximum(greatest, block.max(axis=0))
        at_low += (block <= low + margin).sum(axis=0)
        at_high += (block >= high - margin).sum(axis=0)
        outside += ((block < floor) | (block > ceiling)).sum(axis=0)
        if bounded.any():
            bins = np.clip((block - origin) / width * BINS, 0, BINS - 1).astype(np.int64) + BINS * np.arange(count)
            counts += np.bincount(bins.ravel(), minlength=count * BINS).reshape(count, BINS)
    still = stand_still(*mean_and_std, low, high, offset)
    return tuple(
        NumberRange(
            name=name,
            low=float(low[i]) if math.isfinite(low[i]) else None,
            high=float(high[i]) if math.isfinite(high[i]) else None,
            least=float(least[i]),
            greatest=float(greatest[i]),
            at_low=float(at_low[i] / rows),
            at_high=float(at_high[i] / rows),
            outside=int(outside[i]),
            still=bool(still[i]),
            counts=tuple(counts[i].tolist()) if bounded[i] else (),
        )
        for i, name in enumerate(names)
    )


def _repeated(dataset: OfflineDataset, starts: NDArray[np.int64]) -> tuple[int, int]:
    """Rows and episodes that have occurred before, by 64-bit hashes: equal ones of different rows are improbable."""
    hashes = np.empty(len(dataset), np.uint64)
    for part in _blocks(len(dataset), dataset.observation_dim + dataset.action_dim):
        block = np.concatenate([dataset.observations[part], dataset.actions[part]], axis=1)
        block += np.float32(0)  # -0.0 is 0.0
        columns = np.arange(block.shape[1], dtype=np.uint64) << np.uint64(32)
        hashes[part] = _mixed(block.view(np.uint32).astype(np.uint64) | columns).sum(axis=1, dtype=np.uint64)
    repeated = len(hashes) - len(np.unique(hashes))
    # Of an episode: the sum of its rows' hashes, each mixed with its step.
    steps = np.arange(len(hashes), dtype=np.uint64) - np.repeat(starts, _lengths(dataset)).astype(np.uint64)
    episodes = np.add.reduceat(_mixed(_mixed(hashes) + steps), starts)
    return repeated, len(episodes) - len(np.unique(episodes))


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix the bits of numbers, as SplitMix64 does: equal ones stay equal, all others look independent."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.095 or not share else f"{share:.1%}" if share >= 5e-4 else "under 0.1%"


def counted(number: int, thing: str) -> str:
    """A number of things, one or several."""
    return f"{number} {thing}" + "s" * (number != 1)


def _extent(values: NDArray[Any]) -> tuple[float, float, float]:
    return float(values.min()) + 0.0, float(np.median(values)) + 0.0, float(values.max()) + 0.0  # -0.0 is 0.0


def _spread(values: NDArray[Any], form: str) -> str:
    least, median, greatest = (format(value, form) for value in _extent(values))
    return least if least == greatest else f"{least} to {greatest} (median {median})"


def _numbers(ranges: tuple[NumberRange, ...], outside: str) -> str:
    """A few words on the numbers of the action or the observation."""
    text = counted(len(ranges), "number")
    used = [number.used for number in ranges if number.used is not None]
    if used:
        least, most = _percent(min(used)), _percent(max(used))
        text += f", using {least if least == most else f'{least} to {most}'} of the box"
    at = max(number.at_low + number.at_high for number in ranges)
    if at:
        text += f", at its bounds in up to {_percent(at)} of the rows"
    still = sum(number.still for number in ranges)
    if still:
        text += f"; standing still: {still}"
    beyond = sum(number.outside for number in ranges)
    return text + (f"; values beyond it by rounding, {outside}: {beyond}" if beyond else "")


def _named(ranges: tuple[NumberRange, ...], condition: Callable[[NumberRange], bool], text: str) -> list[str]:
    """A warning about the numbers for which the condition holds, if there are any."""
    names = [number.name for number in ranges if condition(number)]
    if not names:
        return []
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    one = {"stands": "stands", "uses": "uses", "is": "is", "it": "it", "its": "its"}
    several = {"stands": "stand", "uses": "use", "is": "are", "it": "them", "its": "their"}
    if len(names) > 1:
        text = text.replace("Action {}", "Actions {}").replace("Observation {}", "Observations {}")
    return [text.format(shown, **(one if len(names) == 1 else several))]
