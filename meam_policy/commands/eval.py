"""`meam eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from meam_policy import __version__
from meam_policy.atomic_files import given_folder
from meam_policy.cli import Command, load_command
from meam_policy.commands import parse
from meam_policy.commands.acting_rules import loading_of
from meam_policy.commands.environment_options import (
    chosen_environment,
    environment_arguments,
    typed_environment,
)
from meam_policy.console import print_json, print_mapping, print_table, progress_bar, say, say_mapping
from meam_policy.diagnosis.machine import cpu_model
from meam_policy.environments.make import make_environment, named_failures, with_arguments
from meam_policy.environments.space_check import AnyEnv
from meam_policy.environments.vector_environment import open_vector_environment
from meam_policy.environments.video import make_filmed_environment
from meam_policy.errors import ConfigError, WorkerError
from meam_policy.folder.policy_folder import locate_policy, read_spec
from meam_policy.inference.providers import Device
from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.comparison import BASELINE, gain_interval
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.flights import EpisodeFlights
from meam_policy.rollouts.result import RolloutResult
from meam_policy.spec import EnvironmentSpec, parse_acting, rule_name

__all__ = ["evaluate", "run"]

RECORDING = Command("meam_training.collection.record_rollouts", "Record rollouts into a Minari data set.", "train")


def evaluate(
    policy: Annotated[str, tyro.conf.Positional],
    env_id: str | None = None,
    env_kwargs: str | None = None,
    max_episode_steps: int | None = None,
    episodes: int = 20,
    seed: int = 0,
    num_envs: int = 1,
    async_envs: bool = False,
    video: Path | None = None,
    record: str | None = None,
    flight: Path | None = None,
    root: Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    acting: tuple[str, ...] = (),
    device: Device = "cpu",
    packages: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = (),
    json: bool = False,
) -> None:
    """Run a policy in an environment and report return, success and action latency.

    It acts by the rule that its folder records, which is named, unless --acting gives others. Several are compared in
    one table, on the same episodes.

    Episode i resets environment and policy with seed + i, so the same call gives the same returns, however many
    environments run in parallel. The interval is a 95 % bootstrap interval of the mean return. Latency counts the calls
    that run the network, each for all environments that need a new chunk.

    Examples:
      meam eval policies/pockets --episodes 100
      meam eval policies/pockets --acting sample 0.5 zero best-of-4

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        env_id: Environment as it is registered, or module:id; by default the one the policy was trained for, with the
            arguments, time limit and wrappers that its data recorded.
        env_kwargs: Arguments of the environment, as in '{"g": 2}', in place of recorded ones.
        max_episode_steps: Steps after which an episode is cut off; by default as recorded or registered and, where
            there is no limit, 10,000.
        episodes: Number of episodes.
        seed: Seed of the first episode.
        num_envs: Environments that run in parallel.
        async_envs: With --num-envs above 1, run each environment in a separate process; worth it if its steps are slow.
        video: New folder for a video of every episode; one environment at a time.
        record: Minari id, e.g. pockets/rollouts-v0, under which to record the episodes; `meam train --data` reads them,
            including those finished before Ctrl-C. Evaluate policies trained on them with another --seed.
        flight: New folder for a flight file (MCAP) of every episode, from which `meam replay` acts again; one
            environment at a time.
        root: Folder of the Minari data sets; by default MINARI_DATASETS_PATH, or ~/.minari/datasets.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the repository that the policy is in.
        variant: Another graph of the policy; `meam info` lists them.
        acting: Rules to act by: sample; zero, for zero noise; a noise scale from 0 to 1; best-of-N, the chunk of N
            samples with the highest value, of a policy with a graph that chooses (meam export --variants best-of-4).
        device: Where to run the network; "cuda" and "tensorrt" fail rather than fall back.
        packages: Packages to import first, such as gymnasium_robotics, whose environments exist only then.
        json: Print one line of JSON to stdout instead of a table, of which `meam card` makes a model card; with
            "partial" in it if a worker of --async-envs died.
    """
    typed = {"env_kwargs": env_kwargs, "max_episode_steps": max_episode_steps}
    env_id, packages = typed_environment(env_id, packages)
    arguments = environment_arguments(env_kwargs, max_episode_steps)
    if root is not None and record is None:
        raise ConfigError("--root is given without --record; it says where a recorded data set goes.")
    recording = load_command(RECORDING, "meam eval --record") if record is not None else None
    if flight is not None and (record is not None or num_envs != 1 or async_envs):
        raise ConfigError(
            "--flight records one environment at a time, and not beside --record; leave out --num-envs, --async-envs "
            "and --record. `meam replay --to-minari` makes the data set."
        )
    if len(acting) > 1 and (video is not None or record is not None or flight is not None):
        flag = "--video" if video is not None else "--record" if record is not None else "--flight"
        raise ConfigError(
            f"--acting names {len(acting)} rules; expected one with {flag}, which keeps the episodes of one."
        )
    policies = _load(policy, acting, revision=revision, subfolder=subfolder, variant=variant, device=device)
    first = next(iter(policies.values()))
    environment = chosen_environment(env_id, first.spec)
    name, made = environment.id, with_arguments(environment, arguments)
    results: dict[str, RolloutResult] = {}
    folder = None
    about = {"policy": policy, "variant": first.variant, "env_id": name, "seed": seed, "provider": first.provider}
    with (
        _open_environment(environment, arguments, packages, num_envs, async_envs, video) as env,
        progress_bar(f"Episodes in {name}", episodes * len(policies), quiet=json) as advance,
    ):
        for rule, loaded in policies.items():
            done = episodes * len(results)
            count = partial(_advance, advance, done)
            with named_failures(made), _partial_results(about, results, rule, episodes, json):
                if flight is not None:
                    recorder = EpisodeFlights(loaded, given_folder("flight", flight), seed)
                    kept = {"on_episode": count, "on_trajectory": recorder.write}
                    results[rule] = rollout(recorder, env, episodes, seed, **kept)
                elif recording is None:
                    results[rule] = rollout(loaded, env, episodes, seed, on_episode=count)
                else:
                    where = {"root": root, "environment_id": name, "on_episode": count}
                    results[rule], folder = recording.record_rollouts(loaded, env, episodes, seed, record, **where)
    # What a model card needs to say how this was measured, and of which policy.
    how = {"num_envs": num_envs, "device": device, "revision": revision, "subfolder": subfolder, "packages": packages}
    recorded = first.spec.recorded_environment
    if recorded is None or environment != recorded.for_evaluation:
        typed["named_environment"] = name
    how |= {option: value for option, value in typed.items() if value is not None}
    how |= {"machine": cpu_model(), "version": __version__, "config_sha256": first.config_sha256}
    if len(policies) > 1:
        _report_rules({**about, "variant": variant}, results, policies, how if json else None)
        return
    (rule, result), *_ = results.items()
    summary = {**about, "acting": rule, **result.summary()}
    if video is not None:
        summary["video"] = str(video)
    if flight is not None:
        summary["flight"] = str(flight)
    if folder is not None:
        summary["dataset"] = str(folder)
    if json:
        print_json({**summary, **how})
        return
    if not acting:
        summary["acting"] = first.spec.acting.describe(first.spec.integration.best_of)
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in summary.items() if v is not None}
    print_mapping(f"{policy} in {made}", shown)


@contextmanager
def _partial_results(
    about: dict[str, Any], results: dict[str, RolloutResult], rule: str, episodes: int, json: bool
) -> Iterator[None]:
    """Show what was finished, marked as partial, before the error of a worker that died."""
    try:
        yield
    except WorkerError as error:
        finished = results | ({} if error.partial is None else {rule: error.partial})
        rows = [{"acting": each, **result.summary()} for each, result in finished.items()]
        if json:
            print_json({**about, "partial": True, "rules": rows})
            raise
        for row in rows:
            say(f"{about['policy']} in {about['env_id']}, partial: {row['episodes']} of {episodes} episodes finished")
            say_mapping({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v is not None})
        raise


def _advance(advance: Callable[..., None], before: int, episodes: int) -> None:
    advance(before + episodes)


def _load(policy: str, acting: tuple[str, ...], *, variant: str | None, **options: Any) -> dict[str, MeamPolicy]:
    """The policy by every rule that is asked for, by the rule's name; by the one that it records if none is."""
    if not acting:
        loaded = MeamPolicy.from_pretrained(policy, variant=variant, **options)
        return {loaded.spec.acting_name: loaded}
    recorded = read_spec(locate_policy(policy, revision=options["revision"], subfolder=options["subfolder"]))
    ways = {rule_name(*parse_acting(rule)): loading_of(rule, recorded, variant) for rule in acting}
    return {rule: MeamPolicy.from_pretrained(policy, **way, **options) for rule, way in ways.items()}


def _report_rules(
    about: dict[str, Any],
    results: dict[str, RolloutResult],
    policies: dict[str, MeamPolicy],
    how: dict[str, Any] | None,
) -> None:
    """Print one row for every rule; as JSON if it is given how they were measured."""
    baseline = BASELINE if BASELINE in results else next(iter(results))
    gains = {rule: gain_interval(result, results[baseline]) for rule, result in results.items() if rule != baseline}
    rows = [
        {
            "acting": rule,
            "variant": policies[rule].variant,
            **result.summary(),
            "gain_low": gains.get(rule, (None, None))[0],
            "gain_high": gains.get(rule, (None, None))[1],
        }
        for rule, result in results.items()
    ]
    if how is not None:
        print_json({**about, "baseline": baseline, **how, "rules": rows})
        return
    episodes = rows[0]["episodes"]
    print_table(
        f"{about['policy']} in {about['env_id']}, {episodes} episodes from seed {about['seed']}; "
        f"gain over {baseline}, episode by episode",
        ["acting", "return", "95 % interval", "gain, 95 %", "success", "length", "p50 ms"],
        [
            [
                row["acting"],
                f"{row['return_mean']:.4g}",
                f"{row['ci_low']:.4g} … {row['ci_high']:.4g}",
                "" if row["gain_low"] is None else f"{row['gain_low']:.4g} … {row['gain_high']:.4g}",
                "" if row["success"] is None else f"{row['success']:.0%}",
                f"{row['length_mean']:.4g}",
                f"{row['latency_p50_ms']:.3g}",
            ]
            for row in rows
        ],
    )


def _open_environment(
    environment: EnvironmentSpec,
    arguments: dict[str, Any],
    packages: tuple[str, ...],
    num_envs: int,
    async_envs: bool,
    video: Path | None,
) -> AbstractContextManager[AnyEnv]:
    if video is not None and (num_envs != 1 or async_envs):
        raise ConfigError("--video films one environment at a time; leave out --num-envs and --async-envs, or --video.")
    if video is not None:
        return closing(make_filmed_environment(environment, video, packages, **arguments))
    if async_envs and num_envs == 1:
        raise ConfigError("--async-envs has no effect on one environment; leave it out, or set --num-envs above 1.")
    if num_envs != 1:
        return open_vector_environment(environment, num_envs, asynchronous=async_envs, packages=packages, **arguments)
    return closing(make_environment(environment, **arguments))


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and evaluate."""
    parse(evaluate, arguments, prog)
