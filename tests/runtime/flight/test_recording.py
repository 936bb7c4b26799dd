import contextlib
import errno
import functools
import io
import itertools
import json
import os
import struct
import time
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from mcap.exceptions import McapError
from mcap.reader import NonSeekingReader, make_reader
from mcap.records import Chunk

from meam_policy import ConfigError, FormatError, MeamError, NotFoundError, OutputError
from meam_policy.flight import Recording, read_flight
from meam_policy.flight.flight_file import CHUNK_BYTES, FlightFile
from meam_policy.flight.flight_reader import _unpacked
from meam_policy.flight.recorder import FlightRecorder
from meam_policy.flight.schema import METADATA, TOPICS, encode, numbers
from meam_policy.loop.control_loop import ControlLoop

ABOUT = {"format": "1", "kind": "loop"}
ROWS = np.random.default_rng(0).normal(size=(300, 20))


def number_of(loop):
    assert loop._flight is not None
    return loop._flight._recorder._number


def written(path, count=300):
    file = FlightFile(path, ABOUT)
    for number in range(count):
        file.add(number, 10**18 + number, "tick", {"episode": 0, "tick": number, "observation": ROWS[number]})
    file.finish(count, 10**18 + count)
    return path


@given(
    arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.uint64, np.int64, np.bool_]),
        arrays.array_shapes(max_dims=2, max_side=4),
    )
)
def test_numbers_come_back_bit_for_bit(array):
    found = numbers(json.loads(encode({"value": array}))["value"])
    assert found.shape == array.shape
    again = found.astype(array.dtype)
    if array.dtype.kind == "f":
        nan = np.isnan(array)
        np.testing.assert_array_equal(np.isnan(again), nan)
        again, array = np.where(nan, 0, again), np.where(nan, 0, array)
    assert again.astype(array.dtype).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "thing", [object(), [[1.0], [1.0, 2.0]], 1j, b"bytes", {"a": [None]}, (np.ones(3), {}), "text"]
)
def test_an_observation_that_holds_no_numbers_is_written_as_text(thing):
    json.loads(encode({"observation": thing}))


def test_the_mcap_package_reads_it_with_its_index_and_without(tmp_path):
    path = written(tmp_path / "flight.mcap")
    with path.open("rb") as file:
        reader = make_reader(file)
        summary = reader.get_summary()
        assert summary is not None
        assert summary.statistics is not None
        assert summary.statistics.message_count == 300
        assert {channel.topic for channel in summary.channels.values()} == {f"/meam/{topic}" for topic in TOPICS}
        assert {schema.encoding for schema in summary.schemas.values()} == {"jsonschema"}
        for schema in summary.schemas.values():
            assert json.loads(schema.data)["type"] == "object"
        assert [record.name for record in reader.iter_metadata()] == [METADATA]
        assert len(list(reader.iter_messages(topics=["/meam/tick"]))) == 300
    with path.open("rb") as file:
        assert len(list(NonSeekingReader(file).iter_messages())) == 300


def test_a_file_that_is_cut_anywhere_is_readable_up_to_there(tmp_path):
    whole = written(tmp_path / "flight.mcap").read_bytes()
    everything = read_flight(tmp_path / "flight.mcap").records
    # Opcode and length of the first chunk follow the metadata.
    with (tmp_path / "flight.mcap").open("rb") as file:
        summary = make_reader(file).get_summary()
    assert summary is not None
    metadata_end = summary.chunk_indexes[0].chunk_start_offset
    cuts = sorted({*range(8, len(whole), 997), *range(len(whole) - 40, len(whole))})
    seen = []
    for cut in cuts:
        path = tmp_path / "cut.mcap"
        path.write_bytes(whole[:cut])
        if cut < metadata_end:
            with pytest.raises(FormatError, match="without the record"):
                read_flight(path)
            continue
        flight = read_flight(path)
        assert not flight.complete
        assert flight.records == everything[: len(flight.records)]
        seen.append(len(flight.records))
        theirs = 0
        # Their reader ends with an error where a file is cut, after what is whole.
        with contextlib.suppress(McapError, struct.error, zstandard.ZstdError):
            for _ in NonSeekingReader(io.BytesIO(whole[:cut])).iter_messages(log_time_order=False):
                theirs += 1
        assert theirs == len(flight.records)
    assert seen == sorted(seen)
    assert seen[-1] == 300
    per_chunk = CHUNK_BYTES // (len(encode({"observation": ROWS[0]})) + 40)
    assert max(b - a for a, b in itertools.pairwise(seen)) <= 2 * per_chunk


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = written(tmp_path / "flight.mcap")
    whole, refused = path.read_bytes(), 0
    for place in range(400, len(whole) - 3000, 701):
        data = bytearray(whole)
        data[place] ^= 255
        path.write_bytes(data)
        try:
            assert len(read_flight(path).records) <= 300
        except FormatError:
            refused += 1
    assert refused
    with pytest.raises(NotFoundError):
        read_flight(tmp_path / "nothing.mcap")


def test_what_exists_is_never_written_over_and_a_missing_folder_is_named(make_policy, tmp_path):
    policy = make_policy().load()
    path = tmp_path / "flight.mcap"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        ControlLoop(policy, 50, chunking="naive", record=path)
    assert path.read_text() == "mine"
    with pytest.raises(OutputError, match="is not a folder"):
        ControlLoop(policy, 50, chunking="naive", record=tmp_path / "nowhere" / "flight.mcap")
    wrongs: list[dict[str, Any]] = [{"path": ""}, {"path": 3}, {"path": "a", "queue": 0}]
    wrongs.append({"path": "a", "ring_seconds": 0})
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            Recording(**wrong)
    with ControlLoop(policy, 50, chunking="naive") as loop, pytest.raises(ConfigError, match="record="):
        loop.save_recording()


@pytest.mark.parametrize("ring", [None, 60.0])
def test_a_full_disk_is_said_once_and_the_loop_goes_on(make_policy, tmp_path, monkeypatch, ring):
    path, policy = tmp_path / "flight.mcap", make_policy().load()
    real, room = os.write, [6000]

    def write(descriptor, data):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(descriptor, data[: room[0]])
        room[0] -= done
        return done

    loop = ControlLoop(policy, 50, chunking="naive", simulated_delay=1, record=Recording(path, ring_seconds=ring))
    monkeypatch.setattr("meam_policy.flight.flight_file.os.write", write)

    def fly():
        for _ in range(400):
            loop.step(np.zeros(3, np.float32))
        with pytest.raises(OutputError, match="No space left on device"):
            loop.save_recording()
        for _ in range(400):
            loop.step(np.zeros(3, np.float32))
        loop.close()

    with pytest.warns(RuntimeWarning, match="No space left on device") as said:
        fly()
    monkeypatch.undo()
    health = loop.health()
    assert health.ticks == 800
    if ring is None:
        assert len(said) == 1
        flight = read_flight(path)
        assert not flight.complete
        assert health.dropped_records + len(flight.records) == number_of(loop)
    else:
        assert list(tmp_path.iterdir()) == []
        assert health.dropped_records == number_of(loop)


def test_what_the_queue_cannot_hold_is_dropped_and_counted_in_health_and_file(tmp_path, monkeypatch):
    monkeypatch.setattr("meam_policy.flight.recorder.POLL_S", 3600)
    recorder = FlightRecorder(Recording(tmp_path / "flight.mcap", queue=5), ABOUT)
    for number in range(12):
        recorder.add("tick", {"episode": 0, "tick": number})
    assert recorder.dropped == 7
    recorder.close(10)
    records = read_flight(tmp_path / "flight.mcap").records
    assert [record.message["tick"] for record in records if record.topic == "tick"] == [0, 1, 2, 3, 4]
    assert records[-1].message == {"kind": "dropped", "records": 7}


def test_a_ring_keeps_the_newest_seconds_and_numbers_its_files(tmp_path, monkeypatch):
    now, wall = [10**18], iter(range(10**9))
    monkeypatch.setattr("meam_policy.flight.recorder.time.monotonic_ns", lambda: now[0])
    monkeypatch.setattr("meam_policy.flight.recorder.time.time_ns", lambda: next(wall) * 10**12 % 7)  # set all the time
    recorder = FlightRecorder(Recording(tmp_path / "stop.mcap", ring_seconds=2), ABOUT)
    for tick in range(100):
        now[0] += 10**8
        recorder.add("tick", {"episode": 0, "tick": tick})
    assert recorder.save(10) == tmp_path / "stop.mcap"
    recorder.add("tick", {"episode": 0, "tick": 100})
    assert recorder.save(10) == tmp_path / "stop-2.mcap"
    recorder.close(10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stop-2.mcap", "stop.mcap"]
    flight = read_flight(tmp_path / "stop.mcap")
    assert [record.message["tick"] for record in flight.records] == list(range(79, 100))
    assert flight.complete
    assert recorder.dropped == 0


def test_what_waits_is_in_the_file_once_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("meam_policy.flight.recorder.FLUSH_S", 3600)
    recorder = FlightRecorder(Recording(tmp_path / "flight.mcap"), ABOUT)
    for tick in range(3):
        recorder.add("tick", {"episode": 0, "tick": tick})
    assert len(read_flight(recorder.save(10)).records) == 3
    recorder.close(10)
    start = time.monotonic()
    assert recorder.save(10) == tmp_path / "flight.mcap"  # there is nothing to wait for
    assert time.monotonic() - start < 5


def test_records_wait_a_second_for_their_chunk_to_be_full(tmp_path, monkeypatch):
    monkeypatch.setattr("meam_policy.flight.recorder.FLUSH_S", 0)
    recorder = FlightRecorder(Recording(tmp_path / "flight.mcap"), ABOUT)
    recorder.add("tick", {"episode": 0, "tick": 0})
    deadline = time.monotonic() + 10
    while not read_flight(tmp_path / "flight.mcap").records:
        assert time.monotonic() < deadline
    recorder.close(10)


def test_whoever_does_not_close_loses_nothing_when_the_process_ends(run_python, make_policy, tmp_path):
    code = (
        "import numpy as np\n"
        "from meam_policy import ControlLoop, MeamPolicy, Recording\n"
        f"folder, place = {str(make_policy().folder)!r}, {str(tmp_path)!r}\n"
        "kept = []\n"
        "for name, ring in (('file', None), ('ring', 60)):\n"
        "    policy = MeamPolicy.from_pretrained(folder)\n"
        "    recording = Recording(f'{place}/{name}.mcap', ring_seconds=ring)\n"
        "    kept.append(ControlLoop(policy, 50, chunking='naive', simulated_delay=1, record=recording))\n"
        "    for _ in range(50):\n"
        "        kept[-1].step(np.zeros(3, np.float32))\n"
        "raise KeyboardInterrupt\n"
    )
    assert "KeyboardInterrupt" in run_python("-c", code).stderr
    for name in ("file", "ring"):
        flight = read_flight(tmp_path / f"{name}.mcap")
        assert flight.complete
        assert sum(record.topic == "tick" for record in flight.records) == 50


def test_a_stop_and_the_actions_after_it_are_in_one_file(make_policy, tmp_path):
    def read():
        if len(sent) == 5:
            raise RuntimeError
        return np.zeros(3, np.float32)

    sent: list[Any] = []
    recording = Recording(tmp_path / "stop.mcap", ring_seconds=60)
    loop = ControlLoop(make_policy().load(), 50, chunking="naive", simulated_delay=1, record=recording)
    with loop, pytest.raises(RuntimeError):
        loop.run(read, sent.append, send_neutral_on_exit=True)
    assert [path.name for path in tmp_path.iterdir()] == ["stop.mcap"]
    events = [record.message for record in read_flight(tmp_path / "stop.mcap").records if record.topic == "event"]
    assert [event["kind"] for event in events] == ["begin", "episode", "stop", "neutral"]
    assert events[2]["reason"] == "RuntimeError"


class _Broken(dict[str, Any]):
    def items(self):
        raise RuntimeError("the driver is gone")


@pytest.mark.parametrize("noise", [0.0, "none", np.zeros(3), [[1.0], [1.0, 2.0]]])
def test_nothing_that_is_recorded_stops_the_loop(make_policy, tmp_path, noise):
    policy = make_policy().load()
    policy.last_noise = noise
    policy.predict_action_chunk = functools.partial(_keeping, policy, policy.predict_action_chunk, noise)
    with ControlLoop(policy, 50, chunking="naive", record=tmp_path / "flight.mcap") as loop:
        loop.step(np.zeros(3, np.float32))
        with contextlib.suppress(MeamError):  # as without a recorder
            loop.step(_Broken(a=1))
        loop.step(np.zeros(3, np.float32))
    records = read_flight(tmp_path / "flight.mcap").records
    assert all("noise" not in record.message for record in records if record.topic == "inference")


def _keeping(policy, predict, noise, *arguments, **named):
    chunk = predict(*arguments, **named)
    policy.last_noise = noise
    return chunk


def test_the_loop_says_what_is_missing(make_policy, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mcap.writer", None)
    with pytest.raises(ImportError, match=r"meam-policy\[flight\]"):
        ControlLoop(make_policy().load(), 50, chunking="naive", record=tmp_path / "flight.mcap")


@pytest.mark.parametrize(
    ("compression", "said", "match"), [("zstd", 2**40, "as it says"), ("lz4", 1000, "expected zstd")]
)
def test_a_chunk_that_unpacks_to_something_else_is_refused_before_it_is(compression, said, match):
    packed = zstandard.compress(b"\0" * 1000)
    chunk = Chunk(compression, packed, 0, 0, 0, said)
    with pytest.raises(FormatError, match=match):
        list(_unpacked(chunk))
