"""`meam replay`."""

from __future__ import annotations

import json as json_text
import re
from pathlib import Path
from typing import Annotated, Any

import tyro

from meam_policy.acting.safety import SafetySettings
from meam_policy.cli import Command, load_command
from meam_policy.commands import parse
from meam_policy.console import print_json, print_lines, print_mapping, say
from meam_policy.errors import ConfigError, FormatError, NotFoundError
from meam_policy.flight import Flight, read_flight
from meam_policy.given_files import given_path
from meam_policy.inference.providers import Device
from meam_policy.policy import MeamPolicy
from meam_policy.replay.report import ReplayReport
from meam_policy.replay.run import replay_read
from meam_policy.replay.training_steps import recorded_spec

__all__ = ["replay", "run"]

CONVERSION = Command("meam_training.collection.record_flights", "Write flights as a Minari data set.", "train")


def replay(
    file: Annotated[Path, tyro.conf.Positional],
    policy: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    device: Device = "cpu",
    to_minari: str | None = None,
    root: Path | None = None,
    reward: float | None = None,
    json: bool = False,
) -> bool:
    """Compute every action of a recording again, compare it bit for bit, and name the first tick that differs.

    The policy is loaded with the variant, noise scale and safety settings that were recorded. Ends with exit code 1 if
    anything differs, or if no tick of a file could be compared.

    Examples:
      meam replay flight.mcap --policy policies/arm
      meam replay flights --to-minari arm/flights-v0 --root data --reward 0

    Args:
        file: Flight file of `ControlLoop(record=)`, or folder of those of `meam eval --flight`.
        policy: Policy folder, or Hub repo id owner/name.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the repository that the policy is in.
        device: Where to run the network.
        to_minari: Minari id, e.g. arm/flights-v0, under which to write what was recorded; `meam train --data` reads it.
        root: Folder of the Minari data sets; by default MINARI_DATASETS_PATH, or ~/.minari/datasets.
        reward: With --to-minari: reward of steps for which none was recorded; without it they are refused.
        json: Print one line of JSON to stdout for each file.

    Returns:
        Whether something was compared in every file, and all of it is the same.
    """
    if policy is None and to_minari is None:
        raise ConfigError("Neither --policy nor --to-minari is given; expected a policy to replay the recording with.")
    if to_minari is None and (root is not None or reward is not None):
        raise ConfigError("--root or --reward is given without --to-minari, whose data set they are for.")
    files = _files(given_path("file", file))
    conversion = None if to_minari is None else load_command(CONVERSION, "meam replay --to-minari")
    same, flights = True, list[Flight]()
    if policy is not None:
        where: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "device": device}
        loaded: dict[str, MeamPolicy] = {}
        for flight in map(read_flight, files):
            how = _recorded_loading(flight)
            key = repr(sorted(how.items()))
            if key not in loaded:
                loaded[key] = MeamPolicy.from_pretrained(policy, **how, **where)
            report = replay_read(flight, loaded[key])
            same &= report.same
            print_json(report.to_json()) if json else _print(report, short=len(files) > 1)
            if conversion is not None:
                flights.append(flight)
    if conversion is not None:
        flights = flights or [read_flight(each) for each in files]
        folder, episodes, steps = conversion.record_flights(flights, to_minari, root=root, reward=reward)
        say(f"Wrote {folder}: {episodes} episodes of {steps} steps in all. `meam train bc --data {folder}` reads it.")
    return same


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.mcap"), key=_with_numbers)
    if not files:
        raise NotFoundError(f"{path} has no *.mcap; expected a folder of `meam eval --flight`, or a file.")
    return files


def _with_numbers(path: Path) -> list[Any]:
    """By which stop comes before stop-2, and that before stop-10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", path.stem))]


def _recorded_loading(flight: Flight) -> dict[str, Any]:
    """How the policy was loaded that acted, as arguments of `from_pretrained`."""
    spec, about = recorded_spec(flight), flight.about
    how: dict[str, Any] = {"noise_scale": spec.acting.noise_scale}
    if spec.integration.best_of > 1:
        how["best_of"] = spec.integration.best_of
    if (variant := about.get("variant", "None")) != "None":
        how["variant"] = variant
    if (safety := about.get("safety")) is not None:
        try:
            how["safety"] = SafetySettings(**json_text.loads(safety))
        except (TypeError, ValueError) as error:
            raise FormatError(f"{flight.path} has safety settings that cannot be read: {str(error)[:200]}") from error
    return how


def _print(report: ReplayReport, short: bool) -> None:
    if short and report.same and report.replayed == report.ticks and report.complete and not report.identity:
        print_lines(f"{report.path}: the same, {report.ticks} ticks and {report.inferences} inferences")
        return
    rows = {
        "ticks": f"{report.ticks}, of which {report.replayed} were computed again",
        "inferences": str(report.inferences),
        "largest difference": f"{report.max_difference:g}",
        "differing ticks": str(report.differing),
    }
    if report.dropped:
        rows["missing records"] = str(report.dropped)
    if not report.complete:
        rows["file"] = "cut; replayed up to there"
    if report.identity:
        rows["not as recorded"] = "; ".join(report.identity)
    if report.first is not None:
        first = report.first
        rows["first difference"] = f"episode {first.episode}, tick {first.tick}: {first.what}; {first.reason}"
    print_mapping(f"{report.path}: {report.verdict}", rows)


def run(arguments: list[str], prog: str) -> int:
    """Parse the arguments and replay; 1 if something differs."""
    return 0 if parse(replay, arguments, prog) else 1
