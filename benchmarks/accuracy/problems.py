"""Contextual bandits with known optimal policies: behaviour, reward, and the density that training should reach.

With the behaviour's density p(a|s), its mixture with Q-maximised actions is the prior

    p_w(a|s) = (1 - w) p(a|s) + w N(a; a*(s), BANDWIDTH² I),

and the policy's target, inside the box [-1, 1]^d, is

    pi(a|s) ∝ p_w(a|s)^(1 - lambda) · exp(tau r(s, a)).

Observations are one-hot [contexts]; actions are in the box, so environment units are normalised units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from meam_training.data.dataset import OfflineDataset

__all__ = ["BANDWIDTH", "CONTEXTS", "ROWS", "RUNS", "Context", "Grid", "Run", "make_dataset", "make_grid", "make_value"]

BANDWIDTH = 0.1
"""Standard deviation of the prior's Q-maximised actions."""
REWARD_HEIGHT, REWARD_WIDTH = 2.0, 0.3
ROWS = 20_000
"""Recorded actions per context."""
DATA_SEED = 0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Context:
    """One observation: a behaviour, which is a Gaussian mixture cut off at the box, and a reward.

    Attributes:
        name: What is special about it.
        weights: Shares of the mixture's components; they sum to 1.
        means: Their centres, each [dim].
        stds: Their standard deviations, equal in all directions.
        goal: Centre of the reward [dim], its only maximiser a*.
    """

    name: str
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]
    goal: tuple[float, ...]

    @property
    def modes(self) -> Array:
        """Centres of the regions whose mass is reported [modes, dim]; the last is the rewarding one.

        They are the behaviour's modes; where none of them is at the goal, the goal is one more.
        """
        others = [mean for mean in self.means if mean != self.goal]
        return np.array([*others, self.goal])

    def behaviour(self, actions: Array) -> Array:
        """Density of the behaviour before it is cut off [n], at actions [n, dim]."""
        components = zip(self.weights, self.means, self.stds, strict=True)
        return np.sum([w * _gaussian(actions, np.array(mean), std) for w, mean, std in components], axis=0)

    def reward(self, actions: Array) -> Array:
        """Reward [n] of actions [n, dim]: one bump at the goal."""
        distance = np.square(actions - np.array(self.goal)).sum(axis=1)
        return REWARD_HEIGHT * np.exp(-distance / (2 * REWARD_WIDTH**2))

    def sample(self, count: int, generator: np.random.Generator) -> Array:
        """Draw actions [count, dim] of the behaviour; what falls outside the box is drawn again."""
        kept = np.empty((0, len(self.goal)))
        while len(kept) < count:
            component = generator.choice(len(self.weights), count, p=self.weights)
            noise = generator.standard_normal((count, len(self.goal)))
            drawn = np.array(self.means)[component] + np.array(self.stds)[component, None] * noise
            kept = np.concatenate([kept, drawn[(np.abs(drawn) <= 1).all(axis=1)]])
        return kept[:count]


CONTEXTS: dict[int, tuple[Context, ...]] = {
    1: (
        Context("common", (0.5, 0.5), ((-0.5,), (0.5,)), (0.15, 0.15), goal=(0.5,)),
        Context("rare", (0.9, 0.1), ((-0.5,), (0.5,)), (0.15, 0.15), goal=(0.5,)),
        Context("absent", (1.0,), ((-0.2,),), (0.2,), goal=(0.4,)),
        Context("three modes", (0.8, 0.15, 0.05), ((-0.5,), (0.1,), (0.6,)), (0.15, 0.08, 0.1), goal=(0.6,)),
    ),
    2: (
        Context("common", (0.5, 0.5), ((-0.5, -0.5), (0.5, 0.5)), (0.15, 0.15), goal=(0.5, 0.5)),
        Context(
            "rare",
            (0.3, 0.3, 0.3, 0.1),
            ((-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)),
            (0.15, 0.15, 0.15, 0.15),
            goal=(0.5, 0.5),
        ),
        Context("absent", (1.0,), ((-0.2, -0.2),), (0.2,), goal=(0.22, 0.22)),
        Context(
            "three modes",
            (0.8, 0.15, 0.05),
            ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5)),
            (0.15, 0.08, 0.1),
            goal=(0.5, 0.5),
        ),
    ),
}
"""The contexts by the action's dimension, in the order of the one-hot observation."""


@dataclass(frozen=True)
class Run:
    """One training run: all contexts of a dimension under one setting.

    Attributes:
        dim: Dimension of the action.
        entropy_coef: Lambda, how far the prior is flattened.
        inverse_temperature: Tau, the reward's weight.
        mixture_weight: w, the share of Q-maximised actions in the prior.
        faces: Share of the recorded actions that is moved to the box's face on its side; one dimension, lambda = 0.
        mirror_stages: Stages of mirror descent; the policy of one is the prior of the next.
        adaptive: Whether the mixture shrinks where the critics disagree; the target is that of the full mixture.
    """

    dim: int
    entropy_coef: float
    inverse_temperature: float
    mixture_weight: float
    faces: float = 0.0
    mirror_stages: int = 1
    adaptive: bool = False

    @property
    def name(self) -> str:
        """Such as "1d-0.5-1-0": the dimension, then lambda, tau and w, then what is special."""
        name = f"{self.dim}d-{self.entropy_coef:g}-{self.inverse_temperature:g}-{self.mixture_weight:g}"
        name += "-faces" if self.faces else ""
        name += f"-{self.mirror_stages}-stages" if self.mirror_stages > 1 else ""
        return name + ("-adaptive" if self.adaptive else "")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a job of it changes in the suite's common settings."""
        special = {"mirror_stages": self.mirror_stages} if self.mirror_stages > 1 else {}
        special |= {"adaptive_mixture": True} if self.adaptive else {}
        return special | {
            "entropy_coef": self.entropy_coef,
            "inverse_temperature": self.inverse_temperature,
            "mixture_weight": self.mixture_weight,
        }

    @property
    def cells(self) -> tuple[str, ...]:
        """Names of its contexts."""
        return tuple(context.name for context in CONTEXTS[self.dim])

    def make_dataset(self) -> OfflineDataset:
        """The recorded actions of its contexts."""
        return make_dataset(self.dim, faces=self.faces)

    def make_value(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The true reward."""
        return make_value(self.dim)

    def prior(self, context: Context, grid: Grid) -> Array:
        """Mass of the mixture prior in every cell [cells]; sums to 1."""
        guided = grid.normalise(_gaussian(grid.points, np.array(context.goal), BANDWIDTH))
        behaviour = grid.normalise(context.behaviour(grid.points))
        if self.faces:
            right = behaviour[grid.points[:, 0] > 0].sum()
            behaviour = (1 - self.faces) * behaviour
            behaviour[[0, -1]] += self.faces * np.array([1 - right, right])
        return (1 - self.mixture_weight) * behaviour + self.mixture_weight * guided

    def target(self, context: Context, grid: Grid) -> Array:
        """Mass of the optimal policy in every cell [cells]; sums to 1."""
        mass = self.prior(context, grid)
        tilt = self.inverse_temperature * context.reward(grid.points)
        for _ in range(self.mirror_stages):
            log_density = (1 - self.entropy_coef) * np.log(mass) + tilt
            mass = grid.normalise(np.exp(log_density - log_density.max()))
        return mass


RUNS: dict[str, Run] = {
    run.name: run
    for run in (
        Run(1, 0.0, 1.0, 0.0),
        Run(1, 0.0, 3.0, 0.2),
        Run(1, 0.25, 3.0, 0.0),
        Run(1, 0.5, 1.0, 0.0),
        Run(1, 0.75, 10.0, 0.2),
        Run(1, 0.9, 3.0, 0.0),
        Run(1, 0.0, 1.0, 0.0, faces=0.3),
        Run(1, 0.0, 1.0, 0.0, mirror_stages=2),
        Run(1, 0.0, 3.0, 0.2, adaptive=True),
        Run(2, 0.0, 10.0, 0.0),
        Run(2, 0.5, 3.0, 0.0),
        Run(2, 0.75, 1.0, 0.2),
        Run(2, 0.9, 3.0, 0.2),
    )
}
"""The suite, by name."""


@dataclass(frozen=True)
class Grid:
    """Equal cells over the box [-1, 1]^dim.

    Attributes:
        points: The cells' midpoints [cells, dim], the last dimension fastest.
        width: Edge of a cell.
    """

    points: Array
    width: float

    def normalise(self, density: Array) -> Array:
        """Masses [cells] in proportion to a density [cells]; they sum to 1."""
        return density / density.sum()

    def sample(self, mass: Array, count: int, generator: np.random.Generator) -> Array:
        """Draw points [count, dim] of a distribution given by its masses [cells], uniform within a cell."""
        cells = generator.choice(len(mass), count, p=mass)
        return self.points[cells] + self.width * generator.uniform(-0.5, 0.5, (count, self.points.shape[1]))


@cache
def make_grid(dim: int, cells: int | None = None) -> Grid:
    """The box in `cells` cells per dimension; None takes 4,000 in one dimension and 500 in two."""
    cells = cells or {1: 4000, 2: 500}[dim]
    axis = (np.arange(cells) + 0.5) * 2 / cells - 1
    points = np.stack(np.meshgrid(*[axis] * dim, indexing="ij"), axis=-1).reshape(-1, dim)
    points.flags.writeable = False
    return Grid(points, 2 / cells)


def make_dataset(dim: int, rows: int = ROWS, faces: float = 0.0) -> OfflineDataset:
    """Recorded actions of every context's behaviour, each an episode of one step that terminates.

    Args:
        dim: Dimension of the action.
        rows: Actions per context.
        faces: Share of the actions that is moved to the box's face on its side.
    """
    contexts = CONTEXTS[dim]
    generator = np.random.default_rng([DATA_SEED, dim])
    actions = [context.sample(rows, generator) for context in contexts]
    if faces:
        actions = [np.where(generator.random(drawn.shape) < faces, np.sign(drawn), drawn) for drawn in actions]
    rewards = [context.reward(drawn) for context, drawn in zip(contexts, actions, strict=True)]
    observations = np.repeat(np.eye(len(contexts)), rows, axis=0)
    ended = np.ones(len(observations), dtype=bool)
    return OfflineDataset.from_arrays(
        observations,
        np.concatenate(actions),
        np.concatenate(rewards),
        observations,
        terminations=ended,
        truncations=~ended,
        dataset_id=f"accuracy/bandit-{dim}d{'-faces' if faces else ''}-v0",
    )


def make_value(dim: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The true reward as a differentiable function of observations [batch, contexts] and actions [batch, dim]."""
    goals = torch.tensor([context.goal for context in CONTEXTS[dim]])

    def value(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        distance = (actions - observations @ goals.to(observations)).square().sum(dim=-1)
        return REWARD_HEIGHT * torch.exp(-distance / (2 * REWARD_WIDTH**2))

    return value


def _gaussian(x: Array, mean: Array, std: float) -> Array:
    """Density [n] of N(mean, std² I) at x [n, dim]."""
    exponent = np.square(x - mean).sum(axis=1) / (2 * std**2)
    return np.exp(-exponent) / (np.sqrt(2 * np.pi) * std) ** x.shape[1]
