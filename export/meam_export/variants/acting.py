"""Chooses how an exported policy acts, by what each rule returns in the environment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from meam_export.variants.build import BuiltVariant
from meam_export.variants.ladder import LadderTask
from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError, NotFoundError
from meam_policy.inference.session import PolicySession
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.comparison import best_rule, measurement
from meam_policy.rollouts.result import RolloutResult
from meam_policy.spec import ActingRule, PolicySpec, checked_noise_scale, parse_acting, rule_name

__all__ = ["ACTING_SEED", "AUTO", "CANDIDATES", "acting_by", "acting_task", "check_acting", "single_sample"]

AUTO = "auto"
"""The rule that measures others, and takes the best."""

CANDIDATES = (1.0, 0.5, 0.0)
"""Noise scales that `AUTO` compares for one sample per decision."""

ACTING_SEED = 2_000_000
"""Seed of the first episode; far from those of `meam eval` and of evaluation while training, whose results the choice
would bias."""

LEAST_EPISODES = 10
"""Of fewer episodes an interval says too little to choose by: five are all better by chance in one case of 32."""

EPISODES = 50
"""Episodes of each rule where no `LadderTask` gives their number."""

_REMEDY = (
    "Give a rule (sample, zero or a noise scale from 0 to 1), or in Python task=LadderTask(env, episodes=50, seed=0)."
)


def check_acting(acting: str | float | None, spec: PolicySpec, task: LadderTask | None) -> None:
    """Check that a policy can be exported with a rule, before anything is built.

    Args:
        acting: `AUTO`, "sample", "zero" or a noise scale; "best-of-N" of a policy that draws N samples; None for none.
        spec: The policy that is exported.
        task: Where rules are measured.

    Raises:
        ConfigError: there is no such rule, it does not fit the policy, or rules are to be compared without an
            environment or over too few episodes.
    """
    if acting is not None and acting != AUTO:
        _fitting_scale(acting, spec.integration.best_of)
    elif acting == AUTO and task is not None and task.episodes < LEAST_EPISODES:
        raise ConfigError(
            f'episodes is {task.episodes}; expected {LEAST_EPISODES} or more with acting "auto", which chooses by the '
            "returns of the episodes."
        )
    elif acting == AUTO and task is None and spec.environment_id is None:
        raise ConfigError(f'acting is "auto", and the data names no environment to measure in; expected one. {_REMEDY}')


@contextlib.contextmanager
def acting_task(acting: str | float | None, spec: PolicySpec, task: LadderTask | None) -> Iterator[LadderTask | None]:
    """Where rules are measured: in `task`, or for `AUTO` without one in the environment of the data.

    Args:
        acting: A rule that `check_acting` accepts.
        spec: The policy that is exported.
        task: As it was given.

    Raises:
        NotFoundError: there is no environment of the name that the data has.
        ConfigError: it cannot be made as it was recorded.
        MissingExtraError: its simulator is not installed.
    """
    if acting != AUTO or task is not None or spec.recorded_environment is None:
        yield task
        return
    try:
        environment = spec.recorded_environment.for_evaluation
        env = make_environment(environment)
    except (NotFoundError, ConfigError) as error:
        raise type(error)(f'acting is "auto", and rules cannot be measured: {error} {_REMEDY}') from error
    with contextlib.closing(env):
        yield LadderTask(env, EPISODES, ACTING_SEED, environment)


def _fitting_scale(acting: str | float, best_of: int) -> float:
    """The noise scale of a rule for a policy that draws so many samples per decision."""
    scale, samples = parse_acting(acting) if isinstance(acting, str) else (checked_noise_scale(acting), 1)
    if samples > 1 and samples != best_of:
        raise ConfigError(
            f'acting is "{acting}", and best_of is {best_of}; expected the same number. Export with '
            f"best_of={samples} (--best-of {samples})."
        )
    if samples == 1 and best_of > 1:
        raise ConfigError(
            f"acting is {acting!r}, a rule for one sample per decision, and best_of is {best_of}; expected best_of=1 "
            f'(--best-of 1), or acting "best-of-{best_of}".'
        )
    return scale


def single_sample(spec: PolicySpec) -> PolicySpec:
    """A policy's spec with one sample per decision."""
    return replace(spec, integration=replace(spec.integration, best_of=1))


def acting_by(
    acting: str | float | None, graphs: Sequence[BuiltVariant], task: LadderTask | None
) -> tuple[BuiltVariant, ActingRule]:
    """The graph and the rule by which the exported policy acts, measured if there is an environment.

    Args:
        acting: A rule that `check_acting` accepts.
        graphs: The policy; for `AUTO` of one that chooses among samples, then also the one that draws a single one.
        task: Where rules are measured.
    """
    policy, single = graphs[0], graphs[-1]
    if acting is None:
        return policy, ActingRule()
    if acting == AUTO:
        candidates = [(single, scale) for scale in CANDIDATES] + [(graph, 1.0) for graph in graphs[:-1]]
    else:
        candidates = [(policy, _fitting_scale(acting, policy.policy_spec.integration.best_of))]
    by_rule = {rule_name(scale, graph.policy_spec.integration.best_of): (graph, scale) for graph, scale in candidates}
    if task is None:
        return candidates[0][0], ActingRule(candidates[0][1])
    results = {rule: _measure(graph, scale, task) for rule, (graph, scale) in by_rule.items()}
    graph, scale = by_rule[best_rule(results) if acting == AUTO else next(iter(by_rule))]
    name = policy.policy_spec.environment_id if task.env.spec is None else task.env.spec.id
    return graph, ActingRule(scale, measurement(results, name or type(task.env.unwrapped).__name__, ACTING_SEED))


def _measure(graph: BuiltVariant, scale: float, task: LadderTask) -> RolloutResult:
    spec = replace(graph.policy_spec, acting=ActingRule(scale))
    policy = MeamPolicy(spec, PolicySession(graph.graph, spec, name=graph.spec.file))
    return task.run(policy, ACTING_SEED)
