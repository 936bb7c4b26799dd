"""What a run logged, drawn over its steps: learning curves, and diagnostics of mixture, temperature and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from meam_export.report.drawing import FAINT, Picture, new_axes, svg, titled
from meam_export.report.groups import Group
from meam_export.report.subject import Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DIAGNOSTICS", "LEARNING", "Curve", "Panel", "at_common_steps", "draw_panels", "seed_curve"]

DECADE_SHARE = 6.0
"""Ratio of the greatest to the least number from which a logarithmic axis has ticks enough."""

GAP = 4.0
"""Steps between two numbers, as a multiple of what is usual, from which a line is broken."""


@dataclass(frozen=True)
class Panel:
    """What is drawn of a log.

    Attributes:
        column: Column of the file.
        title: What it is.
        unit: Unit, or what the number is measured in.
        reading: How to read it, in a sentence.
        log: Whether the axis is logarithmic.
        file: Which file it is in.
        share_of: Setting by which it is divided; runs without that setting are left out.
        level: Level that is marked; None for none.
    """

    column: str
    title: str
    unit: str
    reading: str
    log: bool = False
    file: Literal["metrics", "evaluations"] = "metrics"
    share_of: str | None = None
    level: float | None = None


LEARNING = (
    Panel(
        "return_mean",
        "Return while training",
        "return, undiscounted",
        "Higher is better; of a single run, the band is the 95 % interval over its evaluation episodes.",
        file="evaluations",
    ),
    Panel("success", "Success while training", "share of episodes", "Higher is better.", file="evaluations"),
    Panel(
        "action_difference",
        "Difference from the data's chunks",
        "rms, normalised action units",
        "Not a score: a policy that improves on the data differs from it.",
        file="evaluations",
    ),
    Panel(
        "value_mean",
        "Value of the data's chunks",
        "discounted return",
        "It levels off where the critics have found the scale of the returns.",
    ),
    Panel(
        "critic_loss",
        "Critics' loss",
        "squared, in the critics' scale",
        "After pretraining it is of TD targets and no longer of the data's returns, so that it may jump.",
        log=True,
    ),
    Panel(
        "prior_loss",
        "Prior's flow-matching loss",
        "squared normalised action units",
        "Its floor is the variance of the noise, so only its fall says something.",
    ),
    Panel(
        "policy_loss",
        "Policy's loss",
        "of its own objective",
        "Objectives have losses of their own: compare no two of them.",
        log=True,
    ),
)
"""Panels of the learning curves."""

DIAGNOSTICS = (
    Panel(
        "value_gain",
        "Gain of the policy, as the critics see it",
        "discounted return",
        "Value of the policy's chunks above the data's: below 0 the policy is worse than the data to its own critics.",
        level=0.0,
    ),
    Panel(
        "mixture_gain",
        "Gain of the mixture",
        "discounted return",
        "What Q-maximised chunks promise above the data's own.",
        level=0.0,
    ),
    Panel(
        "mixture_distance",
        "Distance of the mixture",
        "rms, normalised action units",
        "How far Q-maximised chunks are from the nearest chunk of the data.",
    ),
    Panel(
        "mixture_disagreement",
        "Disagreement at the mixture",
        "standard deviation of the critics",
        "Not to be above the gain: else the promise is one critic's.",
    ),
    Panel(
        "value_std",
        "Disagreement at the data",
        "standard deviation of the critics",
        "The scale with which the disagreement elsewhere is compared.",
    ),
    Panel(
        "kl_average",
        "KL budget used",
        "share of the budget",
        "1 spends the whole budget; far below, the policy has hardly left its prior.",
        share_of="kl_budget",
        level=1.0,
    ),
    Panel(
        "inverse_temperature",
        "Inverse temperature τ",
        "1 / discounted return",
        "How strongly values tilt the prior; a KL budget finds it while training.",
        log=True,
    ),
    Panel(
        "effective_samples",
        "Effective samples",
        "share of the candidates",
        "Near 1 the values do nothing; near 1 / candidates a single sample decides.",
    ),
    Panel("edit_entropy", "Entropy of the edits", "nats", "It falls as the edits become certain."),
)
"""Panels of the diagnostics."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A number over the steps of one run, or of several with different seeds.

    Attributes:
        steps: Steps [n].
        mean: Mean over the seeds [n].
        low: Lower edge of the band [n].
        high: Upper edge [n].
        seeds: How many runs it is of.
    """

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    seeds: int


def seed_curve(panel: Panel, subjects: Sequence[Subject]) -> Curve | None:
    """The mean over the seeds at the steps that all runs have, with a band from the lowest to the highest seed.

    Of two or three seeds that is also the bootstrapped 95 % interval of their mean. Of a single run, the band of its
    return is the 95 % interval over its evaluation episodes; those of other numbers are empty.

    Returns:
        The curve; None if the runs log no such number, or at no common step.
    """
    tables = [table for table in (_column(panel, subject) for subject in subjects) if table]
    common = sorted(set.intersection(*map(set, tables))) if tables else []
    if not common:
        return None
    values = np.array([[table[step] for step in common] for table in tables])
    mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
    if len(tables) == 1 and panel.column == "return_mean":
        subject = next(s for s in subjects if _column(panel, s))
        halves = {row["step"]: subject.return_half_width(row) or 0.0 for row in subject.evaluations}
        half = np.array([halves[step] for step in common])
        low, high = mean - half, mean + half
    return Curve(np.array(common, dtype=float), mean, low, high, len(tables))


def _column(panel: Panel, subject: Subject) -> dict[float, float]:
    unit = 1.0 if panel.share_of is None else getattr(subject.config, panel.share_of)
    if not unit:
        return {}
    rows = subject.metrics if panel.file == "metrics" else subject.evaluations
    return {row["step"]: row[panel.column] / unit for row in rows if panel.column in row}


def draw_panels(panels: Sequence[Panel], groups: Sequence[Group]) -> tuple[list[Picture], list[str]]:
    """Draw the panels that any of the groups has numbers for, all groups in each.

    Returns:
        The pictures, and the titles of the panels that nothing can be drawn for.
    """
    pictures, absent = [], []
    for panel in panels:
        found = {group: curve for group in groups if (curve := seed_curve(panel, group.subjects)) is not None}
        if found:
            pictures.append(_draw(panel, found))
        elif any(_column(panel, subject) for group in groups for subject in group.subjects):
            absent.append(f"{panel.title} (logged by the seeds at no common step)")
        else:
            absent.append(panel.title)
    return pictures, absent


def at_common_steps(group: Group) -> bool:
    """Whether the group's runs have logged metrics at the same steps, so that all of them are drawn."""
    return len({tuple(row["step"] for row in subject.metrics) for subject in group.subjects if subject.metrics}) <= 1


def _draw(panel: Panel, curves: Mapping[Group, Curve]) -> Picture:
    axes = new_axes()
    for group, curve in curves.items():
        if len(curve.steps) == 1:
            axes.errorbar(
                curve.steps, curve.mean, [curve.mean - curve.low, curve.high - curve.mean], fmt="o", color=group.colour
            )
            continue
        # A line across what was not logged would be read as values.
        breaks = np.flatnonzero(np.diff(curve.steps) > GAP * np.median(np.diff(curve.steps))) + 1
        for part in np.split(np.arange(len(curve.steps)), breaks):
            axes.plot(curve.steps[part], curve.mean[part], color=group.colour, linestyle=group.line, linewidth=1.4)
            low, high = curve.low[part], curve.high[part]
            axes.fill_between(curve.steps[part], low, high, color=group.colour, alpha=0.15, linewidth=0)
    if panel.level is not None:
        axes.axhline(panel.level, color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
    if panel.log:
        _take_logarithms(axes, curves)
    for end in _pretraining(curves):
        axes.axvline(end, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
    titled(axes, panel.title, "gradient steps", panel.unit)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_thousands)
    ends = "; ".join(f"{g.label}: {c.mean[-1]:.4g} at step {c.steps[-1]:,.0f}" for g, c in curves.items())
    return Picture(
        svg(axes),
        f"{panel.title}, {panel.unit}, over gradient steps. {ends}.",
        panel.reading,
    )


def _take_logarithms(axes: Axes, curves: Mapping[Group, Curve]) -> None:
    """Make the vertical axis logarithmic, where it spans enough for that and nothing is 0 or below."""
    from matplotlib.ticker import LogLocator, NullFormatter

    least, greatest = min(c.low.min() for c in curves.values()), max(c.high.max() for c in curves.values())
    if least <= 0 or greatest < DECADE_SHARE * least:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if greatest < 100 * least else (1.0,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _pretraining(curves: Mapping[Group, Curve]) -> list[int]:
    """Where pretraining ended, within the drawn steps."""
    last = max(curve.steps[-1] for curve in curves.values())
    return sorted({s.config.pretraining for group in curves for s in group.subjects if 0 < s.config.pretraining < last})


def _thousands(value: float, _: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}"
