"""What policies return, beside reference figures: the data's, other runs', and figures that somebody names."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from meam_export.report.drawing import FAINT, INK, RULE, Picture, new_axes, shortened, svg
from meam_export.report.groups import Group, shared_seeds
from meam_export.report.labels import COLOURS
from meam_export.report.subject import Subject
from meam_policy.errors import ConfigError
from meam_policy.rollouts.result import mean_interval
from meam_policy.terminal_text import printable
from meam_policy.toml_file import read_toml

__all__ = ["Measured", "Return", "data_returns", "draw_returns", "group_return", "paired_gain", "read_references"]

BEST_SHARE = 0.1
"""The best tenth of the data's episodes."""


@dataclass(frozen=True)
class Return:
    """A mean return.

    Attributes:
        label: Whose it is.
        mean: Mean return, undiscounted.
        low: Lower end of its 95 % interval; None if unknown.
        high: Upper end.
        colour: Colour of its bar.
        source: What it is a mean of.
    """

    label: str
    mean: float
    low: float | None
    high: float | None
    colour: str
    source: str


@dataclass(frozen=True, eq=False)
class Measured:
    """Returns of one run.

    Attributes:
        mean: Their mean.
        low: Lower end of the 95 % interval over the episodes; None if unknown.
        high: Upper end.
        source: Where they are from.
    """

    mean: float
    low: float | None
    high: float | None
    source: str

    @classmethod
    def of_episodes(cls, returns: NDArray[np.float64]) -> Measured:
        """Of episodes [n] that were run for the report."""
        low, high = mean_interval(returns)
        return cls(float(returns.mean()), low, high, f"{_count(len(returns), 'episode')} run for this report")

    @classmethod
    def logged(cls, subject: Subject) -> Measured | None:
        """What its files say: of its exported policy, or else of an evaluation; None if they say nothing.

        The evaluation is that of the checkpoint that is shown, or else the last.
        """
        acting = None if subject.spec is None or subject.policy is None else subject.spec.acting.measured
        if acting is not None:
            assert subject.spec is not None
            figures = acting.returns[subject.spec.acting_name]
            source = f"{_count(acting.episodes, 'episode')} when it was exported, acting by {subject.spec.acting_name}"
            return cls(figures["return_mean"], figures["return_low"], figures["return_high"], source)
        rows = [row for row in subject.evaluations if "return_mean" in row]
        if not rows:
            return None
        last = next((row for row in rows if row["step"] == subject.step), rows[-1])
        count = subject.config.evaluate_episodes
        half = subject.return_half_width(last)
        low, high = (None, None) if half is None else (last["return_mean"] - half, last["return_mean"] + half)
        source = f"{_count(count, 'evaluation episode')} after step {last['step']:,.0f}"
        return cls(last["return_mean"], low, high, source)


def group_return(group: Group, measured: Mapping[Subject, Measured]) -> Return | None:
    """The mean over a group's seeds, whose interval is over the seeds; of one seed over its episodes.

    Args:
        group: The group.
        measured: Returns by run; those without are left out.
    """
    found = [measured[subject] for subject in group.subjects if subject in measured]
    if not found:
        return None
    if len(found) == 1:
        one = found[0]
        return Return(group.label, one.mean, one.low, one.high, group.colour, one.source)
    means = np.array([each.mean for each in found])
    low, high = mean_interval(means)
    return Return(
        group.label, float(means.mean()), low, high, group.colour, f"{len(found)} seeds, each {found[0].source}"
    )


def paired_gain(one: Group, other: Group, measured: Mapping[Subject, Measured]) -> str:
    """How much more one group returns than another on the seeds that both have, in a sentence."""
    common = shared_seeds([one, other])
    gains = []
    for seed in common:
        pair = [next(s for s in group.subjects if s.config.seed == seed) for group in (one, other)]
        if all(subject in measured for subject in pair):
            gains.append(measured[pair[0]].mean - measured[pair[1]].mean)
    if not common:
        seeds = [", ".join(map(str, group.seeds)) for group in (one, other)]
        return (
            f"{one.label} (seed {seeds[0]}) and {other.label} (seed {seeds[1]}) have no seed in common, so they are "
            "not compared seed by seed."
        )
    if not gains:
        return f"The returns of {one.label} and {other.label} on the same seeds are not known."
    gain = float(np.mean(gains))
    low, high = mean_interval(np.array(gains))
    if gain == 0:
        return f"{one.label} returns as much as {other.label} on the seeds that both have."
    shown = f"{one.label} returns {abs(gain):.4g} {'more' if gain > 0 else 'less'} than {other.label}"
    if len(gains) == 1:
        return f"{shown}, on the one seed that both have."
    return f"{shown} on the {len(gains)} seeds that both have ({low:.4g} … {high:.4g} seed by seed, 95 %)."


def data_returns(returns: NDArray[np.float64]) -> list[Return]:
    """The mean over the data's episodes [n], and that over its best tenth."""
    low, high = mean_interval(returns)
    best = np.sort(returns)[-max(1, math.ceil(BEST_SHARE * len(returns))) :]
    colour, count = COLOURS["data"], _count(len(returns), "recorded episode")
    return [
        Return("data", float(returns.mean()), low, high, colour, count),
        Return("data, best tenth", float(best.mean()), None, None, colour, f"the best {len(best):,} of {count}"),
    ]


def read_references(path: str | os.PathLike[str]) -> list[Return]:
    """Read named figures: a TOML file with lines such as `"random policy" = 0.1`, or `expert = [12.0, 11.5, 12.5]`.

    Args:
        path: The file. A figure is a mean return, or a list of it and the ends of its interval.

    Raises:
        NotFoundError: there is no such file.
        ConfigError: it is no such file.
    """
    found = []
    for label, figure in read_toml(path, "file of reference figures").items():
        numbers = figure if isinstance(figure, list) else [figure]
        good = len(numbers) in (1, 3) and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        if not good or (len(numbers) == 3 and not numbers[1] <= numbers[0] <= numbers[2]):
            raise ConfigError(
                f"{path}: {label!r} is {printable(figure)[:60]}; expected a finite number, or a list of a mean and the "
                "ends of its interval, such as [12.0, 11.5, 12.5]."
            )
        low, high = (float(numbers[1]), float(numbers[2])) if len(numbers) == 3 else (None, None)
        found.append(Return(label, float(numbers[0]), low, high, FAINT, f"given in {os.path.basename(path)}"))
    if not found:
        raise ConfigError(f'{path} names no figure; expected lines such as "random policy" = 0.1.')
    return found


def draw_returns(returns: Sequence[Return]) -> Picture:
    """Bars of mean returns, one below the other."""
    axes = new_axes(height=0.7 + 0.32 * len(returns), width=4.3)
    places = range(len(returns))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.barh(places, [r.mean for r in returns], color=[r.colour for r in returns], height=0.62, alpha=0.85)
    for place, each in zip(places, returns, strict=True):
        if each.low is not None and each.high is not None:
            error = [[max(0.0, each.mean - each.low)], [max(0.0, each.high - each.mean)]]
            axes.errorbar(each.mean, place, xerr=error, color="#111827", linewidth=1, capsize=3)
        end = max(each.mean, each.high or each.mean, 0.0)
        axes.annotate(
            f"{each.mean:.4g}",
            (end, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
        )
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(places, [shortened(each.label, 34) for each in returns], fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlabel("mean return of an episode, undiscounted", fontsize=8.5, color=INK)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    shown = "; ".join(f"{each.label} {each.mean:.4g}" for each in returns)
    return Picture(
        svg(axes),
        f"Bars of mean returns: {shown}.",
        "Further right is better; whiskers are 95 % intervals, over seeds where there are several, else over episodes.",
        "wide",
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
