"""Results of rollouts, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError
from meam_policy.typed import typed

__all__ = ["RolloutResult", "mean_interval"]


@dataclass(frozen=True, eq=False)
class RolloutResult:
    """Returns, lengths, successes and latencies of a number of episodes.

    Attributes:
        returns: Undiscounted return of every episode [episodes].
        lengths: Steps of every episode [episodes].
        successes: Whether the environment reported success at any step (`info["success"]` or `info["is_success"]`)
            [episodes]; false where it did not report, None if it never did.
        latencies: Seconds of every `act` call that ran the network, in a vector environment for all slots that needed
            it; the calls in between only take queued actions.
        observations: The observations of every episode, each [steps + 1, observation_dim], if they were recorded.
        partial: Whether these are only those of the episodes that were finished before an error, short ones rather than
            long ones.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    successes: NDArray[np.bool_] | None
    latencies: NDArray[np.float64]
    observations: list[NDArray[np.float32]] = field(default_factory=list)
    partial: bool = False

    def __repr__(self) -> str:
        """One line: how many episodes, and their means."""
        success = "None" if self.success_rate is None else f"{self.success_rate:.4g}"
        return (
            f"RolloutResult(episodes={len(self.returns)}, return_mean={self.return_mean:.4g}, "
            f"success_rate={success}, length_mean={self.lengths.mean():.4g}{', partial' * self.partial})"
        )

    @property
    def return_mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def return_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the mean return; see `mean_interval`."""
        return mean_interval(self.returns)

    @property
    def success_rate(self) -> float | None:
        """Share of episodes with success, or None if the environment never reports it."""
        return None if self.successes is None else float(self.successes.mean())

    @typed()
    def latency_ms(self, percentile: float) -> float:
        """A percentile (0 to 100) of the inference latency, in milliseconds.

        Raises:
            ConfigError: the percentile is out of range.
        """
        if not 0 <= percentile <= 100:
            raise ConfigError(f"percentile is {percentile}; expected 0 to 100.")
        return float(np.percentile(self.latencies, percentile) * 1e3)

    def summary(self) -> dict[str, Any]:
        """The figures as JSON data: return, success and action latency; and that they are partial, if they are."""
        low, high = self.return_interval
        return {
            "episodes": len(self.returns),
            "return_mean": self.return_mean,
            "ci_low": low,
            "ci_high": high,
            "success": self.success_rate,
            "length_mean": float(self.lengths.mean()),
            "latency_p50_ms": self.latency_ms(50),
            "latency_p99_ms": self.latency_ms(99),
            **({"partial": True} if self.partial else {}),
        }


def mean_interval(values: NDArray[Any], level: float = 0.95, resamples: int = 10_000) -> tuple[float, float]:
    """Confidence interval of a mean by the percentile bootstrap, with a fixed seed.

    Args:
        values: Independent draws [n], n >= 1; for one value, or equal values, the interval is a point.
        level: Coverage, between 0 and 1.
        resamples: Bootstrap resamples.

    References:
        Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    draws, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    means = [draws[generator.integers(len(draws), size=len(draws))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
