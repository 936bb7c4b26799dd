"""`meam info`."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import tyro

from meam_policy.cli import Command, load_command
from meam_policy.commands import parse
from meam_policy.commands.numbers import print_numbers
from meam_policy.console import print_json, print_mapping, print_table
from meam_policy.folder.policy_folder import GRAPH_FILE, locate_policy, read_graph, verify_files
from meam_policy.given_files import given_path
from meam_policy.graph.graph_check import check_graph
from meam_policy.inference.session import PolicySession
from meam_policy.inference.versions import requires_onnxruntime
from meam_policy.policy import MeamPolicy
from meam_policy.robot import RobotContract
from meam_policy.robot.table import COLUMNS, contract_rows
from meam_policy.spec import PolicySpec

__all__ = ["info", "run"]

RUN_INFO = Command("meam_training.commands.run_info", "Show a training run.", "train")


def info(
    policy: Annotated[str, tyro.conf.Positional],
    revision: str | None = None,
    subfolder: str | None = None,
    json: bool = False,
) -> None:
    """Show a policy's spec, numbers and graphs, after checking that its files are intact and that it loads here.

    Given the folder of a training run, show its settings, the numbers that mean something, and its warnings.

    Example: meam info policies/pockets

    Args:
        policy: Policy folder, or Hub repo id owner/name; or the folder of a training run.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the repository that the policy is in.
        json: Print config.json, or a run's settings, metrics and warnings, as one line of JSON to stdout.
    """
    folder = locate_policy(policy, revision=revision, subfolder=subfolder, variants=None)
    loaded = MeamPolicy.from_pretrained(folder)
    spec, how = loaded.spec, loaded.spec.integration
    missing = verify_files(folder, spec)
    if json:
        print_json(json_module.loads(spec.to_json()))
        return
    rate = f"{spec.control_rate_hz:g} Hz" if spec.control_rate_hz else "unknown"
    print_mapping(
        policy,
        {
            "method": spec.method,
            "environment": str(spec.recorded_environment or "unknown"),
            "training data": spec.training_data or "unknown",
            "observation space": spec.observation_space,
            **_offset(spec),
            "action space": spec.action_space,
            "chunk": f"{spec.chunk_size} actions, {spec.execute_steps} executed",
            "integration": f"{how.nfe} evaluations, {how.solver}",
            "chunks drawn": f"{how.best_of}, the one of highest value acts" if how.best_of > 1 else "1",
            "acts by": spec.acting.describe(how.best_of),
            "control rate": rate,
            **({} if loaded.robot is None else {"robot": loaded.robot.describe(spec)}),
            "runs on": loaded.provider,
            "needs onnxruntime": _needs(folder, loaded),
            "variants": ", ".join(spec.variants) or "none",
            "files": ", ".join(f"{name} {digest[:8]}" for name, digest in spec.files.items() if name not in missing),
            **({"missing": ", ".join(missing)} if missing else {}),
        },
    )
    print_numbers(spec)
    if loaded.robot is not None:
        _print_contract(loaded.robot)


def _print_contract(robot: RobotContract) -> None:
    """Print what the contract says of every number, without columns in which it says nothing."""
    rows = contract_rows(robot)
    told = [index for index in range(len(COLUMNS)) if any(row[index] for row in rows)]
    if rows:
        print_table("On the robot", [COLUMNS[index] for index in told], [[row[i] for i in told] for row in rows])


def _needs(folder: Path, loaded: MeamPolicy) -> str:
    """The oldest onnxruntime that loads the policy, and each variant that needs a newer one and is there."""
    spec, session = loaded.spec, loaded.session
    assert isinstance(session, PolicySession)
    needed = {"": requires_onnxruntime(session.structure)}
    for name, variant in spec.variants.items():
        if (folder / variant.file).exists():
            graph = check_graph(read_graph(folder, spec, variant.file), variant.file)
            needed[name] = requires_onnxruntime(graph)
    others = "".join(f"; {name} {version}" for name, version in needed.items() if version != needed[""])
    return f"{needed['']} or newer{others}"


def _offset(spec: PolicySpec) -> dict[str, str]:
    """The numbers of an observation that have an offset, by their index."""
    shown = ", ".join(f"{number!r} of {index}" for index, number in enumerate(spec.observation_offset) if number)
    return {"observation offset": f"{shown}; give observations in float64"} if shown else {}


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and show; a training run's folder is shown by the package that trained it."""
    named = (argument for argument in arguments if argument.strip() and not argument.startswith("-"))
    folders = [given_path("The policy", argument) for argument in named]
    if any((folder / "run.json").is_file() and not (folder / GRAPH_FILE).exists() for folder in folders):
        load_command(RUN_INFO, prog).run(arguments, prog)
        return
    parse(info, arguments, prog)
