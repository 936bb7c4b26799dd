"""Compares acting rules by what they return on the same episodes."""

from __future__ import annotations

from collections.abc import Mapping

from meam_policy.rollouts.result import RolloutResult, mean_interval
from meam_policy.spec import ActingMeasurement

__all__ = ["best_rule", "gain_interval", "measurement"]

BASELINE = "sample"
"""The rule that another one must beat."""


def gain_interval(result: RolloutResult, baseline: RolloutResult) -> tuple[float, float]:
    """95 % confidence interval of the mean gain over a baseline, from the differences of episodes with the same seed.

    Args:
        result: Episodes of one rule.
        baseline: As many episodes of another rule, in the same order and from the same seeds.
    """
    return mean_interval(result.returns - baseline.returns)


def best_rule(results: Mapping[str, RolloutResult]) -> str:
    """The rule to act by: the one that returned most among those that are clearly better than sampling.

    Clearly better is a rule whose `gain_interval` over sampling lies above 0. If there is none, it is sampling, which
    is what the policy was trained as.

    Args:
        results: Results by rule, "sample" among them, of the same episodes.
    """
    baseline = results[BASELINE]
    better = {rule: result for rule, result in results.items() if gain_interval(result, baseline)[0] > 0}
    return max(better, key=lambda rule: better[rule].return_mean, default=BASELINE)


def measurement(results: Mapping[str, RolloutResult], environment_id: str, seed: int) -> ActingMeasurement:
    """What a policy folder records of results.

    Args:
        results: Results by rule, of the same episodes.
        environment_id: Where they were measured.
        seed: Seed of the first episode.
    """
    returns: dict[str, dict[str, float]] = {}
    for rule, result in results.items():
        low, high = result.return_interval
        figures = {"return_mean": result.return_mean, "return_low": low, "return_high": high}
        if BASELINE in results and rule != BASELINE:
            figures["gain_low"], figures["gain_high"] = gain_interval(result, results[BASELINE])
        if result.success_rate is not None:
            figures["success"] = result.success_rate
        returns[rule] = figures
    episodes = len(next(iter(results.values())).returns)
    return ActingMeasurement(environment_id, episodes, seed, returns)
