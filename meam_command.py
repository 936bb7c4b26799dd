"""The command `meam`, up to where `meam_policy.cli` has it: what takes long to import is imported under `try`.

Outside the package, whose own import is the first that takes long.
"""

from __future__ import annotations

import sys
from typing import NoReturn

__all__ = ["main"]

USER_ERROR = 2
INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit; with 130 for Ctrl-C, from the first import on."""
    try:
        from meam_policy import cli

        cli.main()
    except KeyboardInterrupt:
        _exit("interrupted.", INTERRUPTED)
    except Exception as error:
        if _is_interrupt(error):
            _exit("interrupted.", INTERRUPTED)
        if type(error).__module__ == "meam_policy.errors":  # of the import itself: all others are said by `cli`
            _exit(str(error), USER_ERROR)
        raise


def _exit(text: str, code: int) -> NoReturn:
    sys.stderr.write(f"meam: {text}\n")
    sys.exit(code)


def _is_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C stands behind an error: Python 3.11 wraps it while a class is made."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__
    return cause is not None
