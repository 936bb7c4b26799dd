"""How long the Hub is waited for: its client waits for ever, unless it is told not to."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.utils import get_session

__all__ = ["SILENCE_S", "HubTimeout", "within"]

SILENCE_S = 30.0
"""Longest silence of the Hub within a request, seconds."""

T = TypeVar("T")


class HubTimeout(Exception):
    """The Hub did not finish in time."""


class _GivenUp(SystemExit):
    """Raised within a call that is given up; not an Exception, which the client might take for one to try again."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """Call a function that asks the Hub, and give up after a time, however slowly it answers.

    A call that is given up ends as soon as it wakes up, in a thread of its own: the client would go on trying for
    minutes, with the files of the cache locked.

    Args:
        seconds: Longest time to wait.
        call: What to call, once.

    Raises:
        HubTimeout: it has not returned within that time.
        Exception: what it raises.
    """
    found: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with _client_timeout():
                found.append(call())
        except BaseException as error:  # passed on below
            raised.append(error)

    thread = threading.Thread(target=run, name="meam-hub", daemon=True)
    thread.start()
    try:
        thread.join(seconds)
    finally:  # after Ctrl-C, too
        late = thread.is_alive()
        if late:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_GivenUp))
    if late:
        raise HubTimeout(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]
    return found[0]


_lock = threading.Lock()
_waiting: dict[int, tuple[int, object]] = {}
"""By the id of a client: how many calls wait for it, and the timeout that it had before the first."""


@contextlib.contextmanager
def _client_timeout() -> Iterator[None]:
    """Let requests without a timeout of their own end in one; the client is shared by the whole process."""
    client = get_session()
    with _lock:
        count, before = _waiting.get(id(client), (0, getattr(client, "timeout", None)))
        _waiting[id(client)] = count + 1, before
        client.timeout = SILENCE_S
    try:
        yield
    finally:
        with _lock:
            count, before = _waiting.pop(id(client))
            if count > 1:
                _waiting[id(client)] = count - 1, before
            else:
                client.timeout = before  # pyright: ignore[reportAttributeAccessIssue]
