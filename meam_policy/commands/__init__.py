"""Commands of `meam` that need only the runtime, and how all of them read their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

__all__ = ["parse"]

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
        SystemExit: with code 0 after `--help`, with code 2 for arguments that do not fit.
    """
    config = () if paired_flags else (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(command, prog=prog, args=arguments, config=config, **options)
