"""Refuses sessions of onnxruntime in any process but the one that made them."""

from __future__ import annotations

import os

from meam_policy.errors import ForkError

__all__ = ["require_process"]


def require_process(loaded_in: int) -> None:
    """Check that a session is not used after a fork, where onnxruntime hangs or crashes.

    Args:
        loaded_in: Id of the process that made the session.

    Raises:
        ForkError: this is another process.
    """
    process = os.getpid()
    if process != loaded_in:
        raise ForkError(
            f"The policy was loaded in process {loaded_in} and is used in process {process}, after a fork. Load it in "
            "the process that uses it, or start processes by spawn; and leave this one by os._exit(), since with "
            "onnxruntime loaded before the fork a normal exit hangs."
        )
