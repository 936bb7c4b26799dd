"""Commands of `meam` that need only the runtime, and how all of them read their arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from meam_policy.errors import ConfigError

__all__ = ["named_first", "parse", "refuse_empty"]

Parsed = TypeVar("Parsed")


def parse(
    command: Callable[..., Parsed], arguments: Sequence[str], prog: str, *, paired_flags: bool = False, **options: Any
) -> Parsed:
    """Call a command, or build a dataclass, from command-line arguments; its docstring is the help.

    Args:
        command: Function or dataclass to call.
        arguments: The arguments after the command's name.
        prog: The name to show.
        paired_flags: Offer --no-x beside --x for every switch, whatever its default.
        **options: Passed on to `tyro.cli`.

    Raises:
        ConfigError: an argument is empty text.
        SystemExit: with code 0 after `--help`, with code 2 for arguments that do not fit.
    """
    refuse_empty(arguments, prog)
    config = () if paired_flags else (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(command, prog=prog, args=arguments, config=config, **options)


def named_first(arguments: Sequence[str], prog: str, noun: str, summaries: Mapping[str, str]) -> str:
    """What the first argument names, of the parts that a command consists of; `--help` lists them.

    Args:
        arguments: The arguments after the command's name.
        prog: The name to show.
        noun: What the parts are called, such as "benchmark".
        summaries: What each does, by name.

    Raises:
        ConfigError: it names none.
        SystemExit: with code 0 after `--help`.
    """
    if arguments and arguments[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name}  {summary}" for name, summary in summaries.items())
        sys.stdout.write(f"usage: {prog} {noun.upper()} [options]\n\n{noun}s:\n{rows}\n\n")
        sys.stdout.write(f"`{prog} {noun.upper()} --help` explains one.\n")
        sys.exit(0)
    if not arguments or arguments[0] not in summaries:
        seen = f'There is no {noun} "{arguments[0]}"' if arguments else f"No {noun} is named"
        raise ConfigError(f"{seen}; expected {prog} {' or '.join(summaries)}.")
    return arguments[0]


def refuse_empty(arguments: Sequence[str], prog: str) -> None:
    """Refuse arguments that are empty text, such as an unset variable in a shell script.

    A path would take it for the current folder, and a choice with a default for none.

    Args:
        arguments: The arguments after the command's name.
        prog: The name to show.

    Raises:
        ConfigError: an argument, or the value after a flag, is empty or blank.
    """
    after = None
    for position, argument in enumerate(arguments, 1):
        flag, joined, value = argument.partition("=")
        if argument.startswith("--"):
            after = flag
        if (value if argument.startswith("--") and joined else argument).strip():
            continue
        place = f"argument {position}" if after is None else f"the text after {after}"
        raise ConfigError(
            f'`{prog}`: {place} is empty ("{value or argument}"); expected a value. Is a variable of the shell unset? '
            'The current folder is ".".'
        )
