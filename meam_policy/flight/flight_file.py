"""Writing a flight file: MCAP that is readable up to wherever it is cut."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from meam_policy.flight.schema import METADATA, TOPICS, encode

__all__ = ["FlightFile"]

CHUNK_BYTES: Final = 32 * 1024
"""Of messages, before compression: what a power failure loses of them at most."""


class FlightFile:
    """A flight file that is being written.

    Args:
        path: The file, which must not exist.
        about: The policy's identity and the loop's settings.

    Attributes:
        unwritten: Messages that wait for their chunk to be full.

    Raises:
        OSError: it cannot be written, in every method. What was whole before is still there, and nothing of the rest.
    """

    def __init__(self, path: Path, about: Mapping[str, str]) -> None:
        from mcap.writer import Writer

        self._next, self._sink, self.unwritten = 0, _Sink(path), 0
        try:
            # The sink is written through at once; its type is that of a stream.
            self._writer: Any = Writer(self._sink, chunk_size=CHUNK_BYTES)  # pyright: ignore[reportArgumentType]
            self._writer.start(profile="", library="meam-policy")
            self._writer.add_metadata(METADATA, dict(about))
            self._channels = {}
            for topic, schema in TOPICS.items():
                about_it = self._writer.register_schema(f"meam.{topic}", "jsonschema", encode(schema))
                self._channels[topic] = self._writer.register_channel(f"/meam/{topic}", "json", about_it)
            self._sink.flush()
        except BaseException:
            self._sink.close()
            path.unlink()
            raise

    def add(self, number: int, time_ns: int, topic: str, message: Mapping[str, Any]) -> None:
        """Write a record.

        Args:
            number: Of the record; where numbers are left out, the file says how many.
            time_ns: When it was made, nanoseconds since 1970.
            topic: One of `TOPICS`.
            message: What it says.
        """
        self._tell_dropped(number, time_ns)
        self._next = number + 1
        self._put(number, time_ns, topic, message)

    def _tell_dropped(self, number: int, time_ns: int) -> None:
        if number > self._next:
            self._put(self._next, time_ns, "event", {"kind": "dropped", "records": number - self._next})

    def _put(self, number: int, time_ns: int, topic: str, message: Mapping[str, Any]) -> None:
        self.unwritten += 1
        self._writer.add_message(
            self._channels[topic], log_time=time_ns, publish_time=time_ns, data=encode(message), sequence=number % 2**32
        )
        if self._sink.flush():
            self.unwritten = 0

    def flush(self) -> None:
        """Write the chunk that is not full yet."""
        if self.unwritten:
            self._writer.flush()
            self._sink.flush()
            self.unwritten = 0

    def finish(self, number: int, time_ns: int) -> None:
        """Write what waits, the index, and the end of the file.

        Args:
            number: Of the record that would come next.
            time_ns: As of `add`.
        """
        try:
            self._tell_dropped(number, time_ns)
            self._writer.finish()
            self._sink.flush()
            self._sink.sync()
        finally:
            self._sink.close()

    def close(self) -> None:
        """Leave the file as it is."""
        self._sink.close()


class _Sink:
    """A file that takes whole records, or none of them."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        self._written, self._waiting = 0, bytearray()

    def write(self, data: bytes) -> int:
        self._waiting += data
        return len(data)

    def tell(self) -> int:
        return self._written + len(self._waiting)

    def flush(self) -> bool:
        if not self._waiting:
            return False
        data, self._waiting = memoryview(self._waiting), bytearray()
        done = 0
        try:
            while done < len(data):
                step = os.write(self._descriptor, data[done:])
                if not step:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += step
        except OSError:
            os.ftruncate(self._descriptor, self._written)
            raise
        self._written += done
        return True

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
