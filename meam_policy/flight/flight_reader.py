"""Reading flight files, whole ones and those that were cut."""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from meam_policy.errors import FormatError, NotFoundError, VersionError
from meam_policy.extras import needs
from meam_policy.flight.schema import FORMAT, METADATA, TOPICS
from meam_policy.given_files import given_path, open_regular

__all__ = ["Flight", "FlightRecord", "read_flight"]

_MAGIC = b"\x89MCAP0\r\n"
_FOOTER = 2
_LARGEST_RECORD = 2**28


class FlightRecord(NamedTuple):
    """One message.

    Attributes:
        number: Of the record in its flight, without those that say what was dropped.
        time_ns: When it was made, nanoseconds since 1970.
        topic: "tick", "inference" or "event".
        message: What it says; see `schema`.
    """

    number: int
    time_ns: int
    topic: str
    message: dict[str, Any]


@dataclass(frozen=True)
class Flight:
    """What a flight file holds.

    Attributes:
        path: The file.
        about: The policy's identity and the loop's settings.
        records: In the order in which they were made.
        complete: Whether the file has its end: false after a crash, or where it was cut.
    """

    path: Path
    about: dict[str, str]
    records: list[FlightRecord]
    complete: bool


def read_flight(path: str | os.PathLike[str]) -> Flight:
    """Read a flight file, up to where it was cut if it was.

    Raises:
        NotFoundError: there is no such file.
        FormatError: it is no flight file, or damaged.
        VersionError: it is of another version.
        ConfigError: the path is none that a file system can hold.
        MissingExtraError: mcap is not installed.
    """
    file = given_path("file", path)
    with needs("Reading a recording", "mcap", "flight"):
        import mcap.stream_reader
    try:
        opened = open_regular(file)
    except FileNotFoundError as error:
        raise NotFoundError(f"{file} does not exist; expected a flight file, *.mcap.") from error
    except OSError as error:
        raise FormatError(f"{file} cannot be read: {error.strerror or error}.") from error
    with opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise FormatError(f"{file} is no MCAP file; expected one that a ControlLoop or `meam eval` recorded.")
        end, complete = _whole_records(opened)
        opened.seek(0)
        source: Any = _Beginning(opened, end)
        reader = mcap.stream_reader.StreamReader(source, emit_chunks=True, record_size_limit=_LARGEST_RECORD)
        try:
            about, records = _collect(reader, end, source)
        except FormatError as error:
            raise FormatError(f"{file}: {error}") from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise FormatError(f"{file} is damaged ({reason}). Take an undamaged copy.") from error
    if about is None:
        cut = "" if complete else ", or cut at its very beginning"
        raise FormatError(
            f"{file} is no recording of ours{cut}: an MCAP file without the record {METADATA}. Expected one that "
            "a ControlLoop or `meam eval` recorded."
        )
    if about.get("format") != FORMAT:
        raise VersionError(
            f"{file} is of format {about.get('format')!r}; this meam-policy reads {FORMAT}. Upgrade meam-policy."
        )
    return Flight(file, about, records, complete)


def _collect(reader: Any, end: int, source: _Beginning) -> tuple[dict[str, str] | None, list[FlightRecord]]:
    from mcap.exceptions import EndOfFile
    from mcap.records import Channel, Chunk, Message, Metadata

    about: dict[str, str] | None = None
    topics: dict[int, str] = {}
    records: list[FlightRecord] = []
    try:
        # A recording of ours says that it is one before its first chunk.
        ours = itertools.takewhile(lambda packed: about is not None or not isinstance(packed, Chunk), reader.records)
        for record in itertools.chain.from_iterable(map(_unpacked, ours)):
            if isinstance(record, Metadata) and record.name == METADATA:
                about = record.metadata
            elif isinstance(record, Channel):
                topics[record.id] = record.topic.removeprefix("/meam/")
            elif isinstance(record, Message) and (topic := topics.get(record.channel_id)) in TOPICS:
                message = json.loads(record.data)
                if not isinstance(message, dict):
                    raise FormatError(f"A message of {topic} is {str(message)[:40]!r}; expected an object.")
                records.append(FlightRecord(record.sequence, record.log_time, str(topic), message))
    except EndOfFile:
        if source.position < end:
            raise
    return about, records


def _unpacked(record: Any) -> Iterable[Any]:
    """A record, or those in a chunk, which must not be larger than it says when it is unpacked."""
    from mcap.records import Chunk
    from mcap.stream_reader import breakup_chunk

    if not isinstance(record, Chunk):
        return (record,)
    if record.compression != "zstd":
        raise FormatError(f'A chunk is compressed by "{record.compression}"; expected zstd, as this package writes.')
    import zstandard

    size = zstandard.frame_content_size(record.data)
    if size != record.uncompressed_size or size > _LARGEST_RECORD:
        raise FormatError(
            f"A chunk has {size} bytes when unpacked; expected {record.uncompressed_size}, as it says, and at most "
            f"{_LARGEST_RECORD}."
        )
    return breakup_chunk(record, validate_crc=True)


def _whole_records(file: BinaryIO) -> tuple[int, bool]:
    """Where the last whole record ends, and whether that is the end of a complete file."""
    size = os.fstat(file.fileno()).st_size
    position = len(_MAGIC)
    while position + 9 <= size:
        file.seek(position)
        kind, length = struct.unpack("<BQ", file.read(9))
        if position + 9 + length > size:
            break
        position += 9 + length
        if kind == _FOOTER:
            file.seek(position)
            if file.read(len(_MAGIC)) == _MAGIC:
                return position + len(_MAGIC), True
            break
    return position, False


class _Beginning:
    """The first bytes of a file, as a stream."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file, self._end, self.position = file, end, 0

    def read(self, length: int) -> bytes:
        data = self._file.read(max(0, min(length, self._end - self.position)))
        self.position += len(data)
        return data
