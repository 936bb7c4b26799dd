"""Figures of what a policy does: actions over the critics' landscape, and paths of the flow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from meam_export.report.actions import ActionStudy, StateStudy
from meam_export.report.drawing import FAINT, INK, SMALL, Picture, new_axes, shortened, svg, titled
from meam_export.report.groups import Group
from meam_export.report.labels import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_flow", "draw_states"]

_MOST_NUMBERS = 6
"""Numbers of an observation that a caption gives."""


def draw_states(group: Group, study: ActionStudy) -> list[Picture]:
    """One panel for each state: the prior's and the policy's samples over the values of the critics."""
    return [_draw_state(group, study, state) for state in study.states]


def draw_flow(group: Group, study: ActionStudy) -> list[Picture]:
    """The paths of a few draws of noise: each shown number over flow time, and, of two, the paths in their plane."""
    panels = [_draw_time(group, study, column) for column in range(len(study.choice.numbers))]
    return [*panels, _draw_plane(group, study)] if len(study.choice.numbers) == 2 else panels


def _draw_state(group: Group, study: ActionStudy, state: StateStudy) -> Picture:
    axes = new_axes(2.9 if len(study.choice.numbers) == 2 else 2.5, SMALL)
    if len(study.choice.numbers) == 2:
        _scatter(axes, group, study, state)
    else:
        _histogram(axes, group, study, state)
    titled(axes, state.title)
    shown = [f"{float(number):.3g}" for number in state.observation[:_MOST_NUMBERS]]
    more = len(state.observation) - len(shown)
    text = ", ".join(shown) + (f" and {more} more numbers" if more > 0 else "")
    means = ", ".join(f"{mean:.3g}" for mean in state.policy.mean(axis=0))
    moved = "" if state.prior is None else f"; the prior's {', '.join(f'{m:.3g}' for m in state.prior.mean(axis=0))}"
    return Picture(
        svg(axes),
        f"Actions where {state.why}. Mean of the policy's: {means}{moved}.",
        f"Where {state.why}: observation ({text}).",
        "small",
    )


def _scatter(axes: Axes, group: Group, study: ActionStudy, state: StateStudy) -> None:
    (x, y), (left, right), (bottom, top) = state.grid, state.grid[0][[0, -1]], state.grid[1][[0, -1]]
    axes.grid(visible=False)
    if state.landscape is not None:
        extent = (float(left), float(right), float(bottom), float(top))
        image = axes.imshow(
            state.landscape, extent=extent, origin="lower", aspect="auto", cmap="Greys", alpha=0.55, zorder=0
        )
        if np.ptp(state.landscape) > 0:
            axes.contour(x, y, state.landscape, levels=7, colors="#6b7280", linewidths=0.5, alpha=0.7, zorder=1)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=28)
        bar.ax.tick_params(labelsize=7, colors=INK)
        bar.outline.set_visible(False)
        bar.set_label("critics' value, discounted return", fontsize=7.5, color=INK)
    if state.prior is not None:
        axes.scatter(*state.prior.T, s=9, facecolors="none", edgecolors=COLOURS["prior"], linewidths=0.7, zorder=2)
    axes.scatter(*state.policy.T, s=8, color=group.colour, alpha=0.65, linewidths=0, zorder=3)
    padding = 0.04 * np.array([right - left, top - bottom])
    axes.set(xlim=(left - padding[0], right + padding[0]), ylim=(bottom - padding[1], top + padding[1]))
    titled(axes, x=_name(study, 0), y=_name(study, 1))


def _histogram(axes: Axes, group: Group, study: ActionStudy, state: StateStudy) -> None:
    (grid,) = state.grid
    style: dict[str, Any] = {"bins": np.linspace(grid[0], grid[-1], 31), "density": True}
    if state.prior is not None:
        axes.hist(state.prior[:, 0], histtype="step", color=COLOURS["prior"], **style)
    axes.hist(state.policy[:, 0], color=group.colour, alpha=0.45, **style)
    titled(axes, x=_name(study, 0), y="density")
    if state.landscape is not None:
        values = axes.twinx()
        values.plot(grid, state.landscape, color="#6b7280", linewidth=1.2)
        values.set_ylabel("critics' value, discounted return", fontsize=7.5, color=INK)
        values.tick_params(labelsize=7, colors=INK)
        values.spines["top"].set_visible(False)


def _draw_time(group: Group, study: ActionStudy, column: int) -> Picture:
    flow, axes = study.flow, new_axes(2.5, SMALL)
    name = _name(study, column)
    if flow.prior is not None:
        axes.plot(flow.times, flow.prior[:, :, column], color=COLOURS["prior"], linewidth=0.8, alpha=0.55)
    axes.plot(flow.times, flow.policy[:, :, column], color=group.colour, linewidth=1.0, alpha=0.75)
    title = f"Action {study.choice.numbers[column]}, from noise to action"
    titled(axes, title, "flow time t (0: noise, 1: action)", name)
    axes.set_xlim(0, 1)
    return Picture(
        svg(axes),
        f"{flow.policy.shape[1]} paths of the flow from noise to {name}, over flow time.",
        "Paths that end together are one mode of the actions."
        if flow.prior is None
        else "Where the policy's paths leave the prior's, at the same noise, the critics have moved them.",
        "small",
    )


def _draw_plane(group: Group, study: ActionStudy) -> Picture:
    flow, axes = study.flow, new_axes(2.5, SMALL)
    axes.plot(flow.policy[:, :, 0], flow.policy[:, :, 1], color=group.colour, linewidth=0.9, alpha=0.6)
    axes.plot(*flow.policy[0].T, "o", color=FAINT, markersize=3)
    axes.plot(*flow.policy[-1].T, "o", color=group.colour, markersize=4)
    titled(axes, "The policy's paths in the plane", _name(study, 0), _name(study, 1))
    return Picture(
        svg(axes),
        f"{flow.policy.shape[1]} paths of the policy's flow from noise to action, in the plane of two numbers.",
        "Grey dots are the noise, coloured ones the actions that it becomes.",
        "small",
    )


def _name(study: ActionStudy, column: int) -> str:
    """The axis of a number of the action, with its unit."""
    number = study.spec.action_numbers[study.choice.numbers[column]]
    name = f"action {number.index}" if number.name is None else shortened(number.name, 24)
    unit = "environment units" if number.unit is None else shortened(number.unit, 12)
    return f"{name} ({unit})"
