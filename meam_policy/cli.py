"""The command line `meam`: dispatches to the commands, and turns errors into one sentence."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from difflib import get_close_matches
from types import ModuleType
from typing import NamedTuple

from meam_policy.errors import ConfigError, MeamError
from meam_policy.extras import needs
from meam_policy.terminal_text import printable

__all__ = ["Command", "load_command", "main", "run"]


class Command(NamedTuple):
    """Where a command is implemented. Named, not imported: the runtime does not depend on what is built on it."""

    module: str
    summary: str
    extras: str


COMMANDS = {
    "demo": Command(
        "meam_export.commands.demo",
        "Run the whole way on real data, and write a report.",
        "cpu,train,export,mujoco,viz",
    ),
    "collect": Command(
        "meam_training.commands.collect",
        "Record a scripted demonstrator or a policy into a Minari data set.",
        "train,mujoco",
    ),
    "data": Command("meam_training.commands.data", "Look through a data set before learning from it.", "train"),
    "train": Command("meam_training.commands.train", "Train a policy from a data set.", "train"),
    "sweep": Command("meam_training.commands.sweep", "Train over tasks, seeds and settings.", "train"),
    "export": Command("meam_export.commands.export", "Export a checkpoint as a policy folder.", "cpu,train,export"),
    "deploy": Command("meam_export.commands.deploy", "Write a policy in other runtimes' forms.", "cpu,deploy"),
    "eval": Command("meam_policy.commands.eval", "Run a policy in its environment.", "cpu"),
    "replay": Command("meam_policy.commands.replay", "Compute a recording's actions again.", "cpu,flight"),
    "card": Command(
        "meam_export.commands.card", "Write what was measured on a policy's model card.", "cpu,train,export"
    ),
    "report": Command(
        "meam_export.commands.report", "Write a page about runs and policies, with figures.", "cpu,train,export,viz"
    ),
    "push": Command("meam_policy.commands.push", "Publish a policy on the Hugging Face Hub.", "cpu"),
    "robot": Command("meam_policy.commands.robot", "Say what a policy's numbers are on its robot.", "cpu"),
    "cpp": Command("meam_policy.commands.cpp", "Write a C++ project that acts with a policy.", "cpu"),
    "info": Command("meam_policy.commands.info", "Show what a policy is, or how a training run went.", "cpu"),
    "verify": Command("meam_policy.commands.verify", "Check a policy's files, and how it acts on this machine.", "cpu"),
    "doctor": Command("meam_policy.commands.doctor", "Check what of this machine matters for acting.", "cpu"),
    "bench": Command("meam_policy.commands.bench", "Measure how fast training and acting are on this machine.", "cpu"),
}

_CLOSE = 0.7
"""Least similarity at which a name is suggested: enough for one typo in a short name, not for another word."""

USER_ERROR = 2
INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit: 0 for success, 1 where a replay differs, 2 for a mistake, 130 for Ctrl-C."""
    warnings.showwarning = _say_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an accent in a path is no reason to fail where all is ASCII
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:]))


def _say_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Say a warning as the commands say theirs; where it was raised helps whoever changes the code, not its users."""
    print(f"Warning: {printable(message)}", file=sys.stderr, flush=True)


def run(arguments: list[str]) -> int:
    """Run the command line with the given arguments and return its exit code."""
    try:
        try:
            return _dispatch(arguments)
        finally:
            # Here, not at exit, where a closed pipe can no longer be caught.
            sys.stdout.flush()
    except MeamError as error:
        sys.stderr.write(f"meam: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("meam: interrupted; what was finished is kept.\n")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # the machine's refusals: permissions, a full disk
        place = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"meam: {printable(f'{place}{error.strerror or error}.')}\n")
        return USER_ERROR


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0 if arguments else USER_ERROR
    name = arguments[0]
    if name == "--version":
        from meam_policy import __version__

        sys.stdout.write(f"meam-policy {__version__}\n")
        return 0
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1, cutoff=_CLOSE)
        hint = f"Did you mean `meam {close[0]}`?" if close else f"The commands are {', '.join(COMMANDS)}."
        raise ConfigError(f'There is no command "{name}". {hint} `meam --help` explains them.')
    return load_command(COMMANDS[name], f"meam {name}").run(arguments[1:], prog=f"meam {name}") or 0


def load_command(command: Command, name: str) -> ModuleType:
    """Import the module of a command, which has `run(arguments, prog)`; that may return an exit code.

    Args:
        command: The command.
        name: Its name on the command line.

    Raises:
        MissingExtraError: an optional dependency of the command is not installed, or cannot be imported.
    """
    with needs(f"`{name}`", None, command.extras):
        return importlib.import_module(command.module)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: meam COMMAND [options]\n\n"
        "Train flow policies from offline data, export them to ONNX, and act with them.\n\n"
        f"commands:\n{rows}\n\n"
        "The usual way:\n"
        "  meam collect meam/Pockets-v0 --transitions 20000 --root data\n"
        "  meam train me-am --data data/meam/pockets-v0 --output-dir runs/pockets \\\n"
        "      --steps 5000 --pretrain-steps 4000 --chunk-size 5 --learning-rate 1e-3 --batch-size 128 \\\n"
        "      --hidden-dims 128 128 --critic-hidden-dims 128 128 --num-critics 2\n"
        "  meam export runs/pockets --output-dir policies/pockets\n"
        "  meam eval policies/pockets --episodes 100\n\n"
        "`meam COMMAND --help` explains a command; `meam --version` prints the version.\n"
    )


if __name__ == "__main__":
    main()
