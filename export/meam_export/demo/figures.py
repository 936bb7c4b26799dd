"""The figures of the demo's report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from meam_export.demo.run import DemoResult
from meam_export.report.drawing import new_figure, png
from meam_export.report.labels import COLOURS, NAMES, OBJECTIVES
from meam_policy.environments.make import make_environment
from meam_policy.environments.pockets import ARENA_HALF_WIDTH, POCKET_RADIUS, POCKETS, POST_RADIUS, POSTS
from meam_policy.policy import MeamPolicy
from meam_training.runs.run_log import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DIRECTIONS",
    "NEIGHBOURS",
    "SAMPLES",
    "curves",
    "direction_shares",
    "draw_actions",
    "draw_curves",
    "draw_rollouts",
    "episode_paths",
    "first_actions",
    "rewarding_directions",
]

DIRECTIONS = {"west": (-1.0, 0.0), "east": (1.0, 0.0), "north": (0.0, 1.0), "south": (0.0, -1.0)}

SAMPLES = 1000
"""Chunks sampled from every policy at the state."""

NEIGHBOURS = 500
"""How many of the recorded chunks nearest to the state are shown."""

MAX_PATHS = 20
"""Largest number of episodes plotted from above."""


def first_actions(result: DemoResult, state: tuple[float, ...]) -> dict[str, NDArray[np.float64]]:
    """Action chunks that data, prior and policies choose at one state, each averaged over the chunk.

    Args:
        result: The demo's result.
        state: Observation [obs].

    Returns:
        Mean actions [samples, 2] by name: "data", of the recorded chunks nearest to the state; "prior", of samples from
        the checkpoint's ME-AM prior; and every method's, of samples from its exported policy.
    """
    dataset, checkpoint = result.dataset, result.checkpoints["me-am"]
    chunk_size = checkpoint.spec.chunk_size
    sampler = dataset.chunk_sampler(chunk_size, 1.0)
    scaled = (sampler.observations[: len(sampler)] - np.array(state)) / np.array(checkpoint.spec.observation_std)
    distance = np.where(sampler.targets(np.arange(len(sampler))).valid > 0, np.linalg.norm(scaled, axis=1), np.inf)
    nearest = np.argsort(distance)[:NEIGHBOURS]
    found = {"data": sampler.batch(nearest).actions.mean(axis=1).astype(np.float64)}

    networks = checkpoint.load_networks()
    noise = torch.randn(SAMPLES, checkpoint.spec.chunk_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = networks.encoder(torch.tensor([state], dtype=torch.float32))
        chunks = networks.flow(networks.prior, features, noise).clamp(-1, 1)
    found["prior"] = chunks.view(SAMPLES, chunk_size, -1).mean(dim=1).double().numpy()

    observations = np.tile(np.array(state, dtype=np.float32), (SAMPLES, 1))
    for method in result.checkpoints:
        policy = MeamPolicy.from_pretrained(result.policy.parent / method)
        found[method] = policy.sample(observations, seed=0).mean(axis=1).astype(np.float64)
    return found


def direction_shares(actions: NDArray[np.float64]) -> dict[str, float]:
    """Share of actions [n, 2] that point west, east, north and south."""
    scores = actions @ np.array(list(DIRECTIONS.values())).T
    counts = np.bincount(scores.argmax(axis=1), minlength=len(DIRECTIONS))
    return {name: float(count / len(actions)) for name, count in zip(DIRECTIONS, counts, strict=True)}


def draw_actions(
    actions: Mapping[str, NDArray[np.float64]], rewarding: Mapping[str, str], labels: Mapping[str, str]
) -> bytes:
    """Plot the action distributions, and the share of each direction; rewarding directions are marked.

    Args:
        actions: From `first_actions`.
        rewarding: Label of every direction that leads to reward.
        labels: Titles of data, prior and methods.
    """
    figure = new_figure(len(actions) * 2.5, 5.2)
    grid = figure.add_gridspec(2, len(actions), height_ratios=(2.2, 1))
    for column, (name, values) in enumerate(actions.items()):
        axes = figure.add_subplot(grid[0, column])
        axes.scatter(*values.T, s=4, alpha=0.25, color=COLOURS[name], linewidths=0)
        for direction, label in rewarding.items():
            x, y = DIRECTIONS[direction]
            axes.annotate(
                label, (x * 0.97, y * 0.97), ha="center", va="center", fontsize=8, color="#15803d", weight="bold"
            )
        axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[-1, 0, 1])
        axes.set_title(labels[name], fontsize=10)
        axes.set_yticks([-1, 0, 1], [] if column else ["-1", "0", "1"])
        axes.axhline(0, color="#e5e7eb", zorder=0)
        axes.axvline(0, color="#e5e7eb", zorder=0)
        shares = direction_shares(values)
        bars = figure.add_subplot(grid[1, column])
        colours = ["#15803d" if d in rewarding and rewarding[d].startswith("★") else COLOURS[name] for d in shares]
        drawn = bars.bar(list(shares), list(shares.values()), color=colours)
        bars.bar_label(drawn, [f"{s:.0%}" for s in shares.values()], fontsize=7)
        bars.set(ylim=(0, 1.15), yticks=[])
        bars.tick_params(axis="x", labelsize=7)
        bars.spines[["top", "right", "left"]].set_visible(False)
    return png(figure)


def draw_curves(result: DemoResult) -> bytes:
    """Plot the training curves from the runs' metrics.csv."""
    return png(curves(result))


def curves(result: DemoResult) -> Figure:
    """The training curves, one panel per metric; a policy's loss is labelled with its objective."""
    panels = {
        "prior_loss": "prior: flow-matching loss",
        "critic_loss": "critic: TD loss",
        "policy_loss": "policy: loss of its objective",
        "value_mean": "mean value of the data",
    }
    figure = new_figure(12.5, 2.9)
    for axes, (column, title) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for method, checkpoint in result.checkpoints.items():
            run = checkpoint.path.parent.parent
            if not (run / METRICS_FILE).is_file():
                continue
            with (run / METRICS_FILE).open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if row.get(column)]
            if rows:
                steps, values = zip(*((int(row["step"]), float(row[column])) for row in rows), strict=True)
                label = result.labels[method]
                if column == "policy_loss":
                    label = f"{NAMES[method]}: {OBJECTIVES[checkpoint.config.objective]}"
                axes.plot(steps, values, color=COLOURS[method], label=label, linewidth=1.2)
        if column in ("critic_loss", "policy_loss"):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("gradient steps", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def episode_paths(result: DemoResult) -> dict[str, list[NDArray[Any]]]:
    """Observations [steps + 1, obs] of the first episodes, at most `MAX_PATHS`, of "data" and of every method."""
    ends = np.flatnonzero(result.dataset.episode_ends)[:MAX_PATHS] + 1
    recorded = np.split(result.dataset.observations[: ends[-1]], ends[:-1])
    return {"data": recorded} | {name: list(acted.observations[:MAX_PATHS]) for name, acted in result.rollouts.items()}


def draw_rollouts(result: DemoResult) -> bytes:
    """Plot the paths of the recorded episodes and of the policies' episodes, seen from above."""
    figure, paths = new_figure(12.5, 3.5), episode_paths(result)
    env_id = result.task.environment_id
    scene = _pockets_scene if env_id == "meam/Pockets-v0" else _maze_scene(env_id)
    for axes, (name, episodes) in zip(np.ravel(figure.subplots(1, len(paths))), paths.items(), strict=True):
        scene(axes)
        for path in episodes:
            axes.plot(path[:, 0], path[:, 1], color=COLOURS[name], alpha=0.45, linewidth=0.9)
            axes.plot(*path[0, :2], "o", color="#111827", markersize=2.5)
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.set_title(result.labels[name], fontsize=10)
    return png(figure)


def _pockets_scene(axes: Axes) -> None:
    from matplotlib.patches import Circle

    for name, pocket in POCKETS.items():
        best = name == "north"
        axes.add_patch(Circle(pocket.centre, POCKET_RADIUS, color="#f59e0b" if best else "#fde68a", zorder=0))
        axes.annotate(f"{pocket.value:g}", pocket.centre, ha="center", va="center", fontsize=8, zorder=3)
    for post in POSTS:
        axes.add_patch(Circle(post, POST_RADIUS, color="#374151", zorder=0))
    axes.set(xlim=(-ARENA_HALF_WIDTH, ARENA_HALF_WIDTH), ylim=(-ARENA_HALF_WIDTH, ARENA_HALF_WIDTH))


def _maze_scene(env_id: str) -> Callable[[Axes], None]:
    env = make_environment(env_id)
    env.reset(seed=0)
    maze: Any = env.unwrapped
    walls, goal = np.array(maze.maze_map), np.array(maze.cur_goal_xy)
    left, bottom = np.array(maze.ij_to_xy((0, 0))) - 2.0
    right, top = np.array(maze.ij_to_xy((walls.shape[0] - 1, walls.shape[1] - 1))) + 2.0
    env.close()

    def draw(axes: Axes) -> None:
        axes.imshow(walls, extent=(left, right, bottom, top), origin="lower", cmap="Greys", vmin=0, vmax=2.2, zorder=0)
        axes.plot(*goal, marker="*", color="#15803d", markersize=13, zorder=3)

    return draw


def rewarding_directions(env_id: str, state: tuple[float, ...]) -> dict[str, str]:
    """Labels of the directions that lead to reward from a state; the best one's begins with a star."""
    if env_id == "meam/Pockets-v0":
        return {n: f"{'★ ' if n == 'north' else ''}{p.value:g}" for n, p in POCKETS.items()}
    env = make_environment(env_id)
    env.reset(seed=0)
    maze: Any = env.unwrapped
    subgoal, _ = maze.get_oracle_subgoal(np.array(state), maze.cur_goal_xy)
    env.close()
    towards = (subgoal - np.array(state)) @ np.array(list(DIRECTIONS.values())).T
    return {list(DIRECTIONS)[int(towards.argmax())]: "★ goal"}
