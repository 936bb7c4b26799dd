"""`meam deploy`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from meam_export.deploy.exploy import write_exploy
from meam_export.deploy.leapp import kinds_by_message, write_leapp_bundle
from meam_export.deploy.manifest import write_manifest
from meam_export.deploy.plain import write_plain
from meam_export.deploy.source import Source, read_source
from meam_export.deploy.tick_graph import Form, Noise, TickSettings
from meam_export.deploy.tick_player import write_tick
from meam_policy.acting.observation import lost_digits, unflatten_observation
from meam_policy.commands import parse
from meam_policy.commands.environment_options import (
    chosen_environment,
    environment_arguments,
    typed_environment,
)
from meam_policy.console import print_json, print_table, say
from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError

__all__ = ["DeployArguments", "run"]

DESCRIPTION = """Write a policy folder in the forms that other runtimes of robots read.

Needs neither the checkpoint nor PyTorch. Each form but --plain, which is another policy, is run in onnxruntime and
compared with the policy, bit for bit, before it is written.

Examples:
  meam deploy policies/arm --tick arm.onnx
  meam deploy policies/arm --leapp bundles/arm --form if
  meam deploy policies/arm --plain arm.onnx --episodes 50"""


@dataclass(frozen=True)
class DeployArguments:
    """Arguments of `meam deploy`."""

    policy: Annotated[str, tyro.conf.Positional]
    """Policy folder, or Hub repo id owner/name."""
    tick: Path | None = None
    """ONNX file to write: one control tick a call, with the state of the chunk handed back."""
    leapp: Path | None = None
    """Folder to write: a LEAPP bundle, for leapp and Isaac ROS Deploy."""
    exploy: Path | None = None
    """ONNX file to write: the tick graph with the names that the C++ controller exploy reads."""
    manifest: Path | None = None
    """Folder to write: a package for physicalai, which acts by zero noise. Experimental."""
    plain: Path | None = None
    """ONNX file to write: one observation in, one action out, no state. Another policy; needs --episodes."""
    variant: str | None = None
    """Another graph of the policy folder."""
    form: Form | None = None
    """Of tick graphs. where: the network runs in every tick, in constant time (the default). if: only where a chunk
    begins."""
    noise: Noise | None = None
    """Of tick graphs: rows of a table in the graph, zeros, or an input. By default as the policy acts."""
    rows: int | None = None
    """Rows of the noise table; 64 by default."""
    noise_seed: int | None = None
    """Seed of the noise table; 0 by default."""
    episodes: int = 0
    """With --plain: episodes in the policy's environment to measure it over."""
    env_id: str | None = None
    """With --plain: environment as it is registered, or module:id; by default the policy's, as it was recorded."""
    env_kwargs: str | None = None
    """With --plain: arguments of the environment, as in '{"g": 2}', in place of recorded ones."""
    max_episode_steps: int | None = None
    """With --plain: time limit of the environment, steps; by default as recorded or registered."""
    packages: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Packages to import first, such as gymnasium_robotics, whose environments exist only then."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    subfolder: str | None = None
    """Folder of the repository that the policy is in."""
    json: bool = False
    """Print one line of JSON to stdout instead of the table."""


def deploy(arguments: DeployArguments) -> None:
    """Write the forms that are asked for."""
    a = arguments
    _refuse_idle(a)
    given = {"form": a.form, "rows": a.rows, "seed": a.noise_seed, "noise": a.noise}
    settings = TickSettings(**{name: value for name, value in given.items() if value is not None})
    source = read_source(a.policy, revision=a.revision, subfolder=a.subfolder, variant=a.variant)
    middle = np.array(source.spec.observation_mean) + np.array(source.spec.observation_offset or 0.0)
    if lost_digits(source.spec, unflatten_observation(source.spec, middle.astype(np.float32))):
        say(
            "These graphs take observations in float32, in which the policy's large coordinates lose digits (`meam "
            "info` shows the offset): MeamPolicy, which takes float64, would see smaller differences."
        )
    for name in ("rows", "noise_seed"):
        if getattr(a, name) is not None and (how := settings.noise_of(source.spec)) != "table":
            raise ConfigError(f"{_flag(name)} has no effect with noise {how}; leave it out.")
    found: dict[str, dict[str, Any]] = {}
    writers = {"tick": write_tick, "leapp": write_leapp_bundle, "exploy": write_exploy}
    for name, writer in writers.items():
        if (target := getattr(a, name)) is not None:
            file, check = writer(source, target, settings)
            found[name] = {"path": str(file), **check._asdict()}
    if a.leapp is not None and source.robot is not None and (kinds := kinds_by_message(source.robot)):
        say(
            f"Isaac ROS Deploy's ros2_control runtime has no converter for {', '.join(kinds)}: it needs messages for "
            "them, and feeds zeros without."
        )
    if a.manifest is not None:
        folder, check = write_manifest(source, a.manifest)
        found["manifest"] = {"path": str(folder), **check._asdict()}
        if source.spec.acting.noise_scale:
            say(f"The package acts by zero noise, which physicalai needs; {source.name} itself draws noise.")
    if a.plain is not None:
        found["plain"] = _plain(a, source, a.plain)
    if a.json:
        print_json(found)
        return
    _print(found)


def _plain(a: DeployArguments, source: Source, file: Path) -> dict[str, Any]:
    env_id, _ = typed_environment(a.env_id, a.packages)
    kwargs = environment_arguments(a.env_kwargs, a.max_episode_steps)
    environment = chosen_environment(env_id, source.spec)
    with contextlib.closing(make_environment(environment, **kwargs)) as env:
        written, result = write_plain(source, file, env, str(environment), a.episodes)
    low, high = result.return_interval
    return {
        "path": str(written),
        "episodes": a.episodes,
        "return_mean": result.return_mean,
        "return_low": low,
        "return_high": high,
    }


def _refuse_idle(a: DeployArguments) -> None:
    """Refuse what would have no effect, and a plain graph that nobody measures.

    Raises:
        ConfigError: there is one; the message says how it would have an effect.
    """
    targets = ("tick", "leapp", "exploy", "manifest", "plain")
    if all(getattr(a, name) is None for name in targets):
        raise ConfigError(f"Nothing is to be written; give {', '.join(map(_flag, targets))}.")
    ticks = a.tick or a.leapp or a.exploy
    for name in ("form", "noise", "rows", "noise_seed"):
        if getattr(a, name) is not None and not ticks:
            why = "has no effect without --tick, --leapp or --exploy"
            raise ConfigError(f"{_flag(name)} {why}; leave it out, or give one.")
    if a.plain is not None and a.episodes < 1:
        raise ConfigError(
            "--plain is another policy than the one that was trained, and is written only with its own measured "
            f"return; --episodes is {a.episodes}, expected 1 or more."
        )
    for name in ("episodes", "env_id", "env_kwargs", "max_episode_steps"):
        if getattr(a, name) and a.plain is None:
            raise ConfigError(f"{_flag(name)} has no effect without --plain; leave it out, or give --plain.")


def _flag(name: str) -> str:
    """The option of a field."""
    return f"--{name.replace('_', '-')}"


def _print(found: Mapping[str, Mapping[str, Any]]) -> None:
    checked = {name: figures for name, figures in found.items() if "ticks" in figures}
    if checked:
        rows = [
            [name, figures["path"], figures["ticks"], f"{figures['p50_ms']:.3f}", f"{figures['p99_ms']:.3f}"]
            for name, figures in checked.items()
        ]
        print_table("Compared with the policy, bit for bit", ["form", "written", "ticks", "p50 ms", "p99 ms"], rows)
    if "plain" in found:
        f = found["plain"]
        say(
            f"Wrote {f['path']}, which returned {f['return_mean']:.4g} [{f['return_low']:.4g}, {f['return_high']:.4g}] "
            f"over {f['episodes']} episodes: compare it with `meam eval`."
        )


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and write."""
    deploy(parse(DeployArguments, arguments, prog, description=DESCRIPTION))
