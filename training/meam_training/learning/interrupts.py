"""Interrupts that are deferred to the end of an update."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["collected_interrupts"]


@contextlib.contextmanager
def collected_interrupts() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of stopping in the middle of an update; a second signal stops at once.

    Outside the main thread, where Python handles no signals, nothing is collected.

    Yields:
        Numbers of the signals received so far, at first an empty list.

    Raises:
        KeyboardInterrupt: a second signal was received.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
