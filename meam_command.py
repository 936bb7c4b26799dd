"""The command `meam`, up to where `meam_policy.cli` has it: what takes long to import is imported under `try`.

Outside the package, whose own import is the first that takes long.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit; with 130 for Ctrl-C, from the first import on."""
    try:
        from meam_policy import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("meam: interrupted.\n")
        sys.exit(INTERRUPTED)
