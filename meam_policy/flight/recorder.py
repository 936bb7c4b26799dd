"""`FlightRecorder`: takes records from a control loop without ever keeping it waiting."""

from __future__ import annotations

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


class _Record(NamedTuple):
    number: int
    time_ns: int
    topic: str
    message: Mapping[str, Any]


class FlightRecorder:
    """Writes records in a thread of its own, or keeps the newest in memory.

    `add` never waits and never raises: what cannot be written is dropped and counted, with one warning for a disk that
    is full or gone.

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
        self._limit, self._records = recording.queue, deque[_Record]()
        self._number = self._dropped = self._lost = self._saved = 0
        self._failed = self._closed = False
        self._end, self._saving, self._flushed = threading.Event(), threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []
        if self._ring_ns is None:
            try:
                self._file = FlightFile(self._path, about)
            except OSError as error:
                raise OutputError(_sentence(self._path, error)) from error
            self._begin(self._write)

    @property
    def dropped(self) -> int:
        """Records that are in no file: the queue was full, or the disk."""
        return self._dropped + self._lost

    @property
    def is_ring(self) -> bool:
        """Whether only the newest records are kept."""
        return self._ring_ns is not None

    def add(self, topic: str, message: Mapping[str, Any]) -> None:
        """Take a record; nobody may change what it holds any more. From one thread at a time."""
        now, records = time.time_ns(), self._records
        number, self._number = self._number, self._number + 1
        if self._closed or (self._ring_ns is None and (self._failed or len(records) >= self._limit)):
            self._dropped += 1
            return
        records.append(_Record(number, now, topic, message))
        if self._ring_ns is not None:
            oldest = now - self._ring_ns
            with contextlib.suppress(IndexError):  # another thread saves them
                while records[0].time_ns < oldest:
                    records.popleft()

    def save(self, timeout_s: float | None = None) -> Path:
        """Write the ring, in another thread; or what waits in the queue.

        Args:
            timeout_s: Seconds to wait for it; None does not wait.

        Returns:
            The file.
        """
        with self._saving:
            path = self._path
            if self._ring_ns is not None:
                taken: list[_Record] = []
                with contextlib.suppress(IndexError):
                    while True:
                        taken.append(self._records.popleft())
                if taken:
                    path = self._free_path()
                    self._begin(self._write_ring, path, taken)
        if timeout_s is not None:
            self._wait(timeout_s)
        return path

    def close(self, timeout_s: float) -> None:
        """Write what is left, and end.

        Args:
            timeout_s: Longest time to wait for the disk, seconds; what it has not taken by then goes on being written
                until the process ends.
        """
        if self._closed:
            return
        self._closed = True
        if self._ring_ns is not None:
            self.save()
        self._end.set()
        for thread in self._threads:
            thread.join(timeout_s)

    def _wait(self, timeout_s: float) -> None:
        if self._ring_ns is not None:
            self._threads[-1].join(timeout_s) if self._threads else None
            return
        self._flushed.clear()
        self._flushed.wait(timeout_s)

    def _free_path(self) -> Path:
        while True:
            self._saved += 1
            number = "" if self._saved == 1 else f"-{self._saved}"
            path = self._path.with_name(f"{self._path.stem}{number}{self._path.suffix}")
            if not (path.exists() or path.is_symlink()):
                return path

    def _begin(self, work: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, name="meam-policy-recorder", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _write(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(POLL_S)
            try:
                while self._records:
                    self._file.add(*self._records.popleft())
                if ended:
                    self._file.finish(self._number, time.time_ns())
            except Exception as error:  # whatever it is, the loop goes on
                self._failed = True
                self._file.close()
                self._lost += self._file.unwritten + len(self._records)
                self._records.clear()
                self._flushed.set()
                self._warn(self._path, error)
                return
            self._flushed.set()

    def _write_ring(self, path: Path, records: list[_Record]) -> None:
        first, last = records[0], records[-1]
        try:
            file = FlightFile(path, self._about)
            try:
                # Numbered from 0: what came before is not dropped, but older than the ring.
                for record in records:
                    file.add(*record._replace(number=record.number - first.number))
                file.finish(last.number + 1 - first.number, last.time_ns)
            except BaseException:
                file.close()
                path.unlink()
                raise
        except Exception as error:
            self._lost += len(records)
            self._warn(path, error)

    def _warn(self, path: Path, error: Exception) -> None:
        with contextlib.suppress(Warning):  # where warnings are errors, this thread has nobody to tell
            warnings.warn(_sentence(path, error), RuntimeWarning, stacklevel=2)


def _sentence(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return f"The recording {path} cannot be written: {reason}. The loop goes on, and what it does is not recorded."
