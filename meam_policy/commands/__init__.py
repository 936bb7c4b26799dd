"""Commands of `meam` that need only the runtime, and how all of them read their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from meam_policy.errors import ConfigError

__all__ = ["parse", "refuse_empty"]

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
