"""`meam eval`."""

from __future__ import annotations

from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import print_json, print_mapping, progress_bar
from meam_policy.environments import make_environment
from meam_policy.errors import ConfigError
from meam_policy.policy import MeamPolicy
from meam_policy.rollout import rollout
from meam_policy.session import Device

__all__ = ["evaluate", "run"]


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    env_id: str | None = None,
    episodes: int = 20,
    seed: int = 0,
    revision: str | None = None,
    variant: str | None = None,
    device: Device = "cpu",
    json: bool = False,
) -> None:
    """Run a policy in an environment and report return, success and action latency.

    Episode i resets environment and policy with seed + i, so the same call gives the same returns. The interval is a
    95 % bootstrap interval of the mean return. Latency counts the calls that run the network.

    Example: meam eval policies/pockets --episodes 100

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        env_id: Environment; by default the one the policy was trained for.
        episodes: Number of episodes.
        seed: Seed of the first episode.
        revision: Branch, tag or commit on the Hub.
        variant: Another graph of the policy; `meam info` lists them.
        device: Where to run the network; "cuda" and "tensorrt" fail rather than fall back.
        json: Print one line of JSON to stdout instead of a table.
    """
    loaded = MeamPolicy.from_pretrained(policy, revision=revision, variant=variant, device=device)
    name = env_id or loaded.spec.environment_id
    if name is None:
        raise ConfigError("The policy does not say which environment it is for; pass --env-id.")
    env = make_environment(name)
    try:
        with progress_bar(f"Episodes in {name}", episodes, quiet=json) as advance:
            result = rollout(loaded, env, episodes, seed, on_episode=advance)
    finally:
        env.close()
    what = {"policy": policy, "variant": variant, "env_id": name, "seed": seed, "provider": loaded.provider}
    summary = what | result.summary()
    if json:
        print_json(summary)
    else:
        print_mapping(f"{policy} in {name}", {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in summary.items()})


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and evaluate."""
    parse(evaluate, arguments, prog)
