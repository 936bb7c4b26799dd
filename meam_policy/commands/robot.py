"""`meam robot`: the contract between a policy and its robot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from meam_policy.atomic_files import given_folder, write_atomically
from meam_policy.commands import named_first, parse
from meam_policy.console import say
from meam_policy.errors import OutputError
from meam_policy.folder.policy_folder import (
    CONFIG_FILE,
    check_output_folder,
    locate_policy,
    read_policy_files,
    read_spec,
    sha256,
    write_policy_files,
)
from meam_policy.robot.contract_file import CONTRACT_FILE, contract_text, read_contract_toml, skeleton
from meam_policy.spec import PolicySpec

__all__ = ["add", "init", "run"]


def init(policy: Annotated[str, tyro.conf.Positional], output: Path | None = None, revision: str | None = None) -> None:
    """Write a robot.toml to fill in: what is known of a policy's numbers, and comments on what else may be said.

    Examples:
      meam robot init policies/arm --output robot.toml
      meam robot add policies/arm robot.toml --output-dir policies/arm-on-robot

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        output: File to write, which must not exist; by default it is printed.
        revision: Branch, tag or commit on the Hub.
    """
    text = skeleton(read_spec(locate_policy(policy, revision=revision)))
    if output is None:
        sys.stdout.write(text)
        return
    if output.exists() or output.is_symlink():
        raise OutputError(f"{output} exists already. Choose another --output, or delete it first.")
    try:
        write_atomically(output, text)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error
    then = f"meam robot add {quote(policy)} {quote(str(output))} --output-dir DIR"
    say(f"Wrote {output}. Fill it in, then: {then}")


def add(
    policy: Annotated[str, tyro.conf.Positional],
    contract: Annotated[Path, tyro.conf.Positional],
    output_dir: Path,
    revision: str | None = None,
) -> None:
    """Write a policy folder again, with a robot's contract, or with another one in its place.

    The graphs stay as they are, and so does the model card, which needs new results: those of the old folder are not
    of this one. `meam export --robot` writes the contract with the policy, and on its card.

    Example: meam robot add policies/arm robot.toml --output-dir policies/arm-on-robot

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        contract: The contract, robot.toml.
        output_dir: Policy folder to write; must be empty or not exist.
        revision: Branch, tag or commit on the Hub.
    """
    target = given_folder("output_dir", output_dir)
    check_output_folder(target)
    files = read_policy_files(locate_policy(policy, revision=revision, variants=None, complete=True), weights=False)
    spec = PolicySpec.from_json(files[CONFIG_FILE])
    files[CONTRACT_FILE] = contract_text(read_contract_toml(contract, spec)).encode()
    spec = replace(spec, files={**spec.files, CONTRACT_FILE: sha256(files[CONTRACT_FILE])})
    files[CONFIG_FILE] = spec.to_json().encode()
    write_policy_files(target, files)
    place = quote(str(target))
    say(
        f"Wrote {target}, with {CONTRACT_FILE}: MeamPolicy and ControlLoop follow it. Its card is the old one, and "
        "needs new results, since those of the policy without it are another's: "
        f"`meam eval {place} --json > results.json`, then `meam card {place} --results results.json`."
    )


ACTIONS: dict[str, tuple[Callable[..., None], str]] = {
    "init": (init, "Write a robot.toml to fill in."),
    "add": (add, "Write a policy folder again, with a robot's contract."),
}


def run(arguments: list[str], prog: str) -> None:
    """Run what the first argument names."""
    summaries = {name: summary for name, (_, summary) in ACTIONS.items()}
    action = named_first(arguments, prog, "action", summaries)
    parse(ACTIONS[action][0], arguments[1:], f"{prog} {action}")
