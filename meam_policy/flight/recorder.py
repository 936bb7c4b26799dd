"""`FlightRecorder`: takes records from a control loop without ever keeping it waiting."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from meam_policy.errors import OutputError
from meam_policy.flight.flight_file import FlightFile
from meam_policy.flight.recording import Recording

__all__ = ["FlightRecorder"]

POLL_S = 0.05
"""Between two looks of the writing thread into the queue: it is not woken, which would cost the loop's thread time."""

FLUSH_S = 1.0
"""Longest time that a record waits for its chunk to be full."""

EXIT_S = 30.0
"""Time that the end of the process waits for the disk."""


class _Record(NamedTuple):
    number: int
    time_ns: int
    topic: str
    message: Mapping[str, Any]
    kept_ns: int = 0
    """When it was made, on a clock that nobody sets."""


class FlightRecorder:
    """Writes records in a thread of its own, or keeps the newest in memory.

    `add` never waits for the disk and never raises: what cannot be written is dropped and counted, with one warning for
    a disk that is full or gone. A recorder that nobody closes is closed when the process ends.

    Args:
        recording: Where to, and how.
        about: The policy's identity and the loop's settings.

    Raises:
        OutputError: the file exists, or cannot be made.
        MissingExtraError: mcap is not installed.
    """

    def __init__(self, recording: Recording, about: Mapping[str, str]) -> None:
        self._path, self._about = recording.checked_path(), about
        self._ring_ns = None if recording.ring_seconds is None else int(recording.ring_seconds * 1e9)
        self._limit, self._records, self._lock = recording.queue, deque[_Record](), threading.Lock()
        self._number = self._dropped = self._saved = 0
        self._closed = False
        self._failure: str | None = None
        self._end, self._saving, self._asked, self._flushed = (
            threading.Event(),
            threading.Lock(),
            threading.Event(),
            threading.Event(),
        )
        self._threads: list[threading.Thread] = []
        if self._ring_ns is None:
            try:
                self._file = FlightFile(self._path, about)
            except OSError as error:
                raise OutputError(_unwritable(self._path, error)) from error
            self._begin(self._write)
        atexit.register(self._finish)

    @property
    def dropped(self) -> int:
        """Records that are in no file: the queue was full, or the disk."""
        return self._dropped

    @property
    def is_ring(self) -> bool:
        """Whether only the newest records are kept."""
        return self._ring_ns is not None

    def add(self, topic: str, message: Mapping[str, Any]) -> None:
        """Take a record; nobody may change what it holds any more."""
        now, kept = time.time_ns(), time.monotonic_ns()
        with self._lock:
            number, self._number = self._number, self._number + 1
            full = self._ring_ns is None and (self._failure is not None or len(self._records) >= self._limit)
            if self._closed or full:
                self._dropped += 1
                return
            self._records.append(_Record(number, now, topic, message, kept))
            if self._ring_ns is not None:
                while self._records[0].kept_ns < kept - self._ring_ns:
                    self._records.popleft()

    def save(self, timeout_s: float | None = None) -> Path:
        """Write the ring, in another thread; or what waits in the queue.

        Args:
            timeout_s: Seconds to wait for it; None does not wait.

        Returns:
            The newest file.

        Raises:
            OutputError: it is known by then that it cannot be written, or nothing was ever kept to write. What a ring
                held is kept.
        """
        if self._ring_ns is None:
            return self._flush(timeout_s)
        with self._saving:
            taken = self._take()
            if taken:
                self._failure = None
                self._begin(self._write_ring, self._free_path(), taken)
        for thread in self._threads[-1:] if timeout_s is not None else ():
            thread.join(timeout_s)
        if self._failure is not None:
            raise OutputError(self._failure)
        if not self._saved:
            raise OutputError(f"Nothing was recorded yet that could be written to {self._path}. Act first.")
        return self._numbered(self._saved)

    def close(self, timeout_s: float) -> None:
        """Write what is left, and end; whatever the disk has not taken by then is written when the process ends.

        Args:
            timeout_s: Longest time to wait for the disk, seconds.
        """
        with self._lock:
            closed, self._closed = self._closed, True
        if not closed and self._ring_ns is not None and self._records:
            with contextlib.suppress(OutputError):  # said by a warning
                self.save()
        self._end.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            atexit.unregister(self._finish)

    def _finish(self) -> None:
        """End with the process, whose last threads would be stopped wherever they are."""
        self.close(EXIT_S)
        if any(thread.is_alive() for thread in self._threads):
            _warn(f"The recording {self._path} is not whole: the disk did not take it within {EXIT_S:g} s.")

    def _flush(self, timeout_s: float | None) -> Path:
        self._flushed.clear()
        self._asked.set()
        if timeout_s is not None and self._failure is None and self._threads[0].is_alive():
            self._flushed.wait(timeout_s)
        if self._failure is not None:
            raise OutputError(self._failure)
        return self._path

    def _take(self) -> list[_Record]:
        with self._lock:
            taken = list(self._records)
            self._records.clear()
        return taken

    def _free_path(self) -> Path:
        while True:
            self._saved += 1
            path = self._numbered(self._saved)
            if not (path.exists() or path.is_symlink()):
                return path

    def _numbered(self, number: int) -> Path:
        return self._path if number == 1 else self._path.with_name(f"{self._path.stem}-{number}{self._path.suffix}")

    def _begin(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, name="meam-policy-recorder", daemon=True)
        self._threads = [*(each for each in self._threads if each.is_alive()), thread]
        thread.start()

    def _write(self) -> None:
        ended, flushed_at = False, time.monotonic()
        taken: list[_Record] = []
        try:
            while not ended:
                ended = self._end.wait(POLL_S)
                asked = self._asked.is_set()
                self._asked.clear()
                taken = self._take()
                while taken:
                    self._file.add(*taken.pop(0)[:4])
                if asked or time.monotonic() - flushed_at > FLUSH_S:
                    self._file.flush()
                    flushed_at = time.monotonic()
                if ended:
                    self._file.finish(self._number, time.time_ns())
                if asked:
                    self._flushed.set()
        except Exception as error:  # whatever it is, the loop goes on
            self._file.close()
            with self._lock:
                self._failure = _unwritable(self._path, error)
                self._dropped += self._file.unwritten + len(taken) + len(self._records)
                self._records.clear()
            _warn(f"{self._failure} {_GOES_ON}")
        finally:
            self._flushed.set()

    def _write_ring(self, path: Path, records: list[_Record]) -> None:
        first, last = records[0], records[-1]
        try:
            file = FlightFile(path, self._about)
            try:
                # Numbered from 0: what came before is not dropped, but older than the ring.
                for record in records:
                    file.add(*record._replace(number=record.number - first.number)[:4])
                file.finish(last.number + 1 - first.number, last.time_ns)
            except BaseException:
                file.close()
                path.unlink()
                raise
        except Exception as error:
            with self._lock:
                self._failure = _unwritable(path, error)
                self._saved -= 1
                if self._closed:
                    self._dropped += len(records)
                else:  # for another try, as long as they are new enough
                    self._records.extendleft(reversed(records))
            _warn(f"{self._failure} {_GOES_ON}")


_GOES_ON = "The loop goes on, and what it does is not recorded."


def _warn(sentence: str) -> None:
    with contextlib.suppress(Warning):  # where warnings are errors, this thread has nobody to tell
        warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def _unwritable(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return f"The recording {path} cannot be written: {reason}."
