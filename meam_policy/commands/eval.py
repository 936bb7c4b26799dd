"""`meam eval`."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.cli import Command, load_command
from meam_policy.commands import parse
from meam_policy.console import print_json, print_mapping, progress_bar
from meam_policy.environments.make import make_environment
from meam_policy.environments.space_check import AnyEnv
from meam_policy.environments.vector_environment import open_vector_environment
from meam_policy.environments.video import make_filmed_environment
from meam_policy.errors import ConfigError
from meam_policy.inference.providers import Device
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episodes import rollout

__all__ = ["evaluate", "run"]

RECORDING = Command("meam_training.collection.record_rollouts", "Record rollouts into a Minari data set.", "train")


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    env_id: str | None = None,
    episodes: int = 20,
    seed: int = 0,
    num_envs: int = 1,
    async_envs: bool = False,
    video: Path | None = None,
    record: str | None = None,
    root: Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    device: Device = "cpu",
    json: bool = False,
) -> None:
    """Run a policy in an environment and report return, success and action latency.

    Episode i resets environment and policy with seed + i, so the same call gives the same returns, however many
    environments run in parallel. The interval is a 95 % bootstrap interval of the mean return. Latency counts the calls
    that run the network, each for all environments that need a new chunk.

    Example: meam eval policies/pockets --episodes 100

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        env_id: Environment; by default the one the policy was trained for.
        episodes: Number of episodes.
        seed: Seed of the first episode.
        num_envs: Environments that run in parallel.
        async_envs: With --num-envs above 1, run each environment in a separate process; worth it if its steps are slow.
        video: New folder for a video of every episode; one environment at a time.
        record: Minari id, e.g. pockets/rollouts-v0, under which to record the episodes; `meam train --data` reads them,
            including those finished before Ctrl-C. Evaluate policies trained on them with another --seed.
        root: Folder of the Minari data sets; by default MINARI_DATASETS_PATH, or ~/.minari/datasets.
        revision: Branch, tag or commit on the Hub.
        variant: Another graph of the policy; `meam info` lists them.
        device: Where to run the network; "cuda" and "tensorrt" fail rather than fall back.
        json: Print one line of JSON to stdout instead of a table.
    """
    if root is not None and record is None:
        raise ConfigError("--root is given without --record; it says where a recorded data set goes.")
    recording = load_command(RECORDING, "meam eval --record") if record is not None else None
    loaded = MeamPolicy.from_pretrained(policy, revision=revision, variant=variant, device=device)
    name = env_id or loaded.spec.environment_id
    if name is None:
        raise ConfigError("The policy does not say which environment it is for; pass --env-id.")
    with (
        _open_environment(name, num_envs, async_envs, video) as env,
        progress_bar(f"Episodes in {name}", episodes, quiet=json) as advance,
    ):
        arguments = (loaded, env, episodes, seed)
        if recording is None:
            result, folder = rollout(*arguments, on_episode=advance), None
        else:
            where = {"root": root, "environment_id": name}
            result, folder = recording.record_rollouts(*arguments, record, **where, on_episode=advance)
    summary = {
        "policy": policy,
        "variant": variant,
        "env_id": name,
        "seed": seed,
        "provider": loaded.provider,
        **result.summary(),
    }
    if video is not None:
        summary["video"] = str(video)
    if folder is not None:
        summary["dataset"] = str(folder)
    if json:
        print_json(summary)
    else:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in summary.items() if v is not None}
        print_mapping(f"{policy} in {name}", shown)


def _open_environment(name: str, num_envs: int, async_envs: bool, video: Path | None) -> AbstractContextManager[AnyEnv]:
    if video is not None and (num_envs != 1 or async_envs):
        raise ConfigError("--video films one environment at a time; leave out --num-envs and --async-envs, or --video.")
    if video is not None:
        return closing(make_filmed_environment(name, video))
    if async_envs and num_envs == 1:
        raise ConfigError("--async-envs has no effect on one environment; leave it out, or set --num-envs above 1.")
    if num_envs != 1:
        return open_vector_environment(name, num_envs, asynchronous=async_envs)
    return closing(make_environment(name))


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and evaluate."""
    parse(evaluate, arguments, prog)
