"""Bandits over action chunks of 5 to 50 numbers whose optimal policies are known.

The behaviour is a Gaussian mixture with the covariance of an action chunk: smooth in time, alike in every component.
The value is linear, quadratic, or a bump, plus a linear slope along the smoothest direction inside a mode, and the
target is

    pi(a|s) ∝ p(a)^(1 - lambda) · exp(Q(s, a)),  a in the box [-1, 1]^d.

Component by component of the mixture it is a Gaussian mixture again, `Chunks.proposal`: the target itself for a linear
or quadratic value and lambda = 0, and what importance sampling corrects otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from meam_training.data.dataset import OfflineDataset

__all__ = ["CHUNKS", "UNSEEN", "Chunks", "Mixture"]

STD = 0.15
"""Standard deviation of every number of a chunk inside a mode."""
MODE = 0.5
"""Distance of the modes from the origin, in the first component of every step."""
THIRD_MODE = 0.6
"""The same for the third mode, in the second component of every step."""
TIME_LENGTH, WHITE = 2.0, 0.15
"""Correlation length in steps, and the share of the variance that is white."""
BUMP_WIDTH = 0.25
"""Standard deviation of the bump, as a share of the modes' distance from each other over 2 · `MODE`."""
FEATURES = 6
"""Numbers in the contextual cell's observation."""
UNSEEN = 48
"""Observations on which the contextual cell is measured; none is in its data."""
ROWS = 100_000
DATA_SEED = 0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture whose components share the axes of their covariances.

    Attributes:
        weights: Shares of the components [modes]; they sum to 1.
        means: Their centres [modes, dim].
        variances: Their variances along the axes [dim], the same for all.
        axes: Orthonormal directions, in columns [dim, dim].
    """

    weights: Array
    means: Array
    variances: Array
    axes: Array

    def log_density(self, points: Array) -> Array:
        """Log density [n] at points [n, dim], nats."""
        joint = self._log_joint(points @ self.axes, 1.0)[1]
        return np.logaddexp.reduce(joint, axis=1) - 0.5 * len(self.variances) * np.log(2 * np.pi)

    def velocity(self, points: Array, time: float) -> Array:
        """Velocity [n, dim] of the flow from noise to this mixture, at points [n, dim] and a time in [0, 1]."""
        return self.make_velocity(torch.float64)(torch.from_numpy(points), torch.tensor([time])).numpy()

    def make_velocity(self, dtype: torch.dtype = torch.float32) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The same as a differentiable function of points [..., dim] and times [..., 1]."""
        axes, variances = torch.tensor(self.axes, dtype=dtype), torch.tensor(self.variances, dtype=dtype)
        means, logits = (
            torch.tensor(self.means @ self.axes, dtype=dtype),
            torch.tensor(np.log(self.weights), dtype=dtype),
        )

        def velocity(points: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            t = time[..., None]
            spread = t**2 * variances + (1 - t) ** 2
            offsets = (points @ axes)[..., None, :] - t * means
            # Alike for all components, so that the determinant drops out.
            share = torch.softmax(logits - 0.5 * (offsets.square() / spread).sum(dim=-1), dim=-1)[..., None]
            along = means + (t * variances - (1 - t)) / spread * offsets
            return (share * along).sum(dim=-2) @ axes.T

        return velocity

    def sample(self, count: int, generator: np.random.Generator) -> Array:
        """Draw points [count, dim]; what falls outside the box [-1, 1]^dim is drawn again."""
        kept = np.empty((0, len(self.variances)))
        while len(kept) < count:
            component = generator.choice(len(self.weights), count, p=self.weights)
            noise = generator.standard_normal((count, len(self.variances))) * np.sqrt(self.variances)
            drawn = self.means[component] + noise @ self.axes.T
            kept = np.concatenate([kept, drawn[(np.abs(drawn) <= 1).all(axis=1)]])
        return kept[:count]

    def tilt(self, slope: Array, curvature: float = 0.0, centre: Array | float = 0.0, power: float = 1.0) -> Mixture:
        """The mixture in proportion to sum_i (w_i N_i(a))^power exp(slope · a - curvature/2 |a - centre|²).

        Args:
            slope: [dim].
            curvature: 0 or more.
            centre: [dim].
            power: In (0, 1]; only for 1 is the sum of powers the power of the sum.
        """
        prior, means = power / self.variances, self.means @ self.axes
        variances = 1 / (prior + curvature)
        pull = prior * means + (slope + curvature * np.asarray(centre)) @ self.axes
        logits = power * np.log(self.weights) + 0.5 * (pull**2 * variances - prior * means**2).sum(axis=1)
        weights = np.exp(logits - np.logaddexp.reduce(logits))
        return Mixture(weights, (pull * variances) @ self.axes.T, variances, self.axes)

    def _spread(self, time: float) -> Array:
        return time**2 * self.variances + (1 - time) ** 2

    def _log_joint(self, rotated: Array, time: float) -> tuple[Array, Array]:
        """Offsets from the components' centres, and log joint densities without the 2 pi."""
        offsets, spread = rotated[:, None] - time * (self.means @ self.axes), self._spread(time)
        exponent = (np.square(offsets) / spread).sum(axis=2) + np.log(spread).sum()
        return offsets, np.log(self.weights) - 0.5 * exponent


def chunk_correlation(steps: int) -> Array:
    """Correlation [steps, steps] of one component of a chunk: squared-exponential in time, with a white share."""
    time = np.arange(steps)
    smooth = np.exp(-0.5 * np.square((time[:, None] - time) / TIME_LENGTH))
    return (1 - WHITE) * smooth + WHITE * np.eye(steps)


@dataclass(frozen=True)
class Chunks:
    """One training run on chunks.

    Attributes:
        dim: Numbers in a chunk.
        kind: Form of the value between the modes.
        entropy_coef: Lambda.
        masses: Shares of the behaviour's one, two or three modes.
        nats: Value of the second mode's centre above the first's; for a bump its height, on the last mode.
        shift: Slope along the smoothest direction inside a mode, as the shift of the mode in its standard deviations.
        contextual: Whether `nats` and `shift` are scaled by two projections of a normally distributed observation.
    """

    dim: int
    kind: Literal["lin", "quad", "bump"]
    entropy_coef: float = 0.0
    masses: tuple[float, ...] = (0.9, 0.1)
    nats: float = 2.0
    shift: float = 1.0
    contextual: bool = False

    @property
    def name(self) -> str:
        """Such as "25d-lin-0-2m-2-1": dimension, kind, lambda, number of modes, nats and shift."""
        last = "-context" if self.contextual else ""
        parts = f"{self.dim}d-{self.kind}-{self.entropy_coef:g}-{len(self.masses)}m-{self.nats:g}-{self.shift:g}"
        return parts + last

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a job of it changes in the suite's common settings."""
        return {
            "hidden_dims": (128, 128, 128),
            "entropy_coef": self.entropy_coef,
            "inverse_temperature": 1.0,
            "mixture_weight": 0.0,
        }

    @property
    def steps(self) -> int:
        """Actions in a chunk."""
        return 10 if self.dim == 50 else 5

    @property
    def cells(self) -> tuple[str, ...]:
        """Its only cell."""
        return ("unseen",) if self.contextual else ("chunk",)

    @cached_property
    def prior(self) -> Mixture:
        """The behaviour before it is cut off at the box."""
        variances, axes = np.linalg.eigh(chunk_correlation(self.steps))
        # `eigh` leaves the sign open: the slope points away from the third mode where they share a component.
        axes *= -np.sign(axes[0])
        components = self.dim // self.steps
        means = [np.zeros(self.dim)] if len(self.masses) == 1 else [-MODE * self.pattern, MODE * self.pattern]
        if len(self.masses) == 3:
            means.append(THIRD_MODE * np.roll(self.pattern, 1))
        return Mixture(
            np.array(self.masses),
            np.array(means),
            STD**2 * np.repeat(variances, components),
            np.kron(axes, np.eye(components)),
        )

    @property
    def pattern(self) -> Array:
        """One in the first component of every step [dim]: what leads from the first mode to the second."""
        pattern = np.zeros(self.dim)
        pattern[:: self.dim // self.steps] = 1.0
        return pattern

    @property
    def mode_axis(self) -> Array:
        """Unit direction between the first two modes [dim]."""
        return self.pattern / np.linalg.norm(self.pattern)

    @property
    def smooth_axis(self) -> Array:
        """The smoothest axis of the covariance [dim] that is not nearly the modes' direction."""
        return self.prior.axes[:, self._smooth]

    @property
    def smooth_std(self) -> float:
        """Standard deviation along `smooth_axis` inside a mode of the behaviour."""
        return float(np.sqrt(self.prior.variances[self._smooth]))

    @property
    def observations(self) -> Array:
        """Observations on which it is measured [cells, features]."""
        if not self.contextual:
            return np.zeros((1, 1))
        return np.random.default_rng([DATA_SEED, UNSEEN]).standard_normal((UNSEEN, FEATURES))

    def shift_at(self, observation: Array) -> float:
        """The slope along the smooth axis, as the shift it makes, in standard deviations."""
        return self.shift * float(self._scales(observation)[1])

    def proposal(self, observation: Array) -> Mixture:
        """The target without its bump, component by component: the target itself where `exact`."""
        return self.prior.tilt(self._slope(observation), self._curvature, self._centre, 1 - self.entropy_coef)

    @property
    def exact(self) -> bool:
        """Whether `proposal` is the target itself."""
        return self.kind != "bump" and self.entropy_coef == 0

    def value(self, observations: Array, actions: Array) -> Array:
        """Q [n] of actions [n, dim] at observations [n, features]."""
        function = self.make_value()
        return function(torch.from_numpy(observations), torch.from_numpy(actions)).numpy()

    def make_value(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Q as a differentiable function of observations [batch, features] and actions [batch, dim]."""
        slopes, width = torch.from_numpy(self._slopes), BUMP_WIDTH * float(np.linalg.norm(self.pattern))
        centre, curvature = torch.from_numpy(self._centre), self._curvature
        projections = torch.from_numpy(self._projections)

        def value(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
            slope = slopes.to(actions).sum(dim=0)
            if self.contextual:
                slope = observations @ projections.to(actions) @ slopes.to(actions)
            distance = (actions - centre.to(actions)).square().sum(dim=-1)
            result = (actions * slope).sum(dim=-1) - 0.5 * curvature * distance
            if self.kind == "bump":
                result = result + self.nats * torch.exp(-distance / (2 * width**2))
            return result

        return value

    def make_prior(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Velocity of the behaviour's flow at observations, states [..., batch, dim] and times [..., batch, 1].

        The behaviour is the same at every observation; that it is cut off at the box is left out.
        """
        velocity = self.prior.make_velocity()
        return lambda observations, states, times: velocity(states, times)

    def log_tilt(self, observation: Array, actions: Array) -> Array:
        """Log density ratio [n] of the target to the behaviour at actions [n, dim], but for a constant."""
        tilt = self.value(np.tile(observation, (len(actions), 1)), actions)
        return tilt - self.entropy_coef * self.prior.log_density(actions) if self.entropy_coef else tilt

    def log_correction(self, observation: Array, actions: Array) -> Array:
        """Log density ratio [n] of the target to `proposal` at actions [n, dim], but for a constant."""
        density = self.prior.log_density(actions) - self.proposal(observation).log_density(actions)
        return self.log_tilt(observation, actions) + density

    def make_dataset(self, rows: int = ROWS) -> OfflineDataset:
        """Actions of the behaviour, each an episode of one step that terminates."""
        generator = np.random.default_rng([DATA_SEED, self.dim, len(self.masses)])
        actions = self.prior.sample(rows, generator)
        observations = generator.standard_normal((rows, FEATURES)) if self.contextual else np.zeros((rows, 1))
        ended = np.ones(rows, dtype=bool)
        return OfflineDataset.from_arrays(
            observations,
            actions,
            self.value(observations, actions),
            observations,
            terminations=ended,
            truncations=~ended,
            dataset_id=f"accuracy/{self.name}-v0",
        )

    @property
    def _smooth(self) -> int:
        free = np.abs(self.prior.axes.T @ self.mode_axis) < 0.5
        best = np.where(free, self.prior.variances, 0)
        return int(len(best) - 1 - best[::-1].argmax())

    @property
    def _projections(self) -> Array:
        """Orthonormal directions in the observation that scale `nats` and `shift` [features, 2]."""
        return np.linalg.qr(np.random.default_rng(3).standard_normal((FEATURES, FEATURES)))[0][:, :2]

    def _scales(self, observation: Array) -> Array:
        """Factors of the two slopes [2]."""
        return observation @ self._projections if self.contextual else np.ones(2)

    @property
    def _slopes(self) -> Array:
        """Slopes of the value from mode to mode and along the smooth axis [2, dim]."""
        between = self.nats * self.pattern / np.square(self.pattern).sum() if self.kind == "lin" else 0 * self.pattern
        return np.stack([between, self.shift / self.smooth_std * self.smooth_axis])

    def _slope(self, observation: Array) -> Array:
        return self._scales(observation) @ self._slopes

    @property
    def _curvature(self) -> float:
        return 2 * self.nats / float(np.square(self.pattern).sum()) if self.kind == "quad" else 0.0

    @property
    def _centre(self) -> Array:
        return self.prior.means[min(1, len(self.masses) - 1)]


_THREE = (0.6, 0.3, 0.1)
CHUNKS: dict[str, Chunks] = {
    run.name: run
    for run in (
        Chunks(5, "lin"),
        Chunks(5, "bump"),
        Chunks(10, "lin", 0.5),
        Chunks(10, "lin", nats=6.0, shift=2.0),
        Chunks(10, "quad", masses=_THREE),
        Chunks(25, "lin"),
        Chunks(25, "lin", shift=3.0),
        Chunks(25, "lin", masses=(1.0,), nats=0.0, shift=4.0),
        Chunks(25, "quad", 0.5),
        Chunks(50, "lin"),
        Chunks(50, "quad", masses=_THREE),
        Chunks(25, "lin", nats=1.5, contextual=True),
    )
}
"""The suite's runs on chunks, by name."""
