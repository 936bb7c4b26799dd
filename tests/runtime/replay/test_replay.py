import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType, Writer

from meam_policy import ActionError, ConfigError, FormatError, MeamError, SafetySettings
from meam_policy.flight import Recording, read_flight
from meam_policy.flight.flight_file import FlightFile
from meam_policy.flight.schema import numbers
from meam_policy.loop.control_loop import ControlLoop, StampedObservation
from meam_policy.replay import replay_flight

RATE = 50.0


class Clock:
    """Time that passes where a test lets it."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def linear(make_policy):
    return make_policy(chunk_size=8, execute_steps=3)


def recorder_of(loop):
    assert loop._flight is not None
    return loop._flight._recorder


def observations(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


def record(policy, path, ticks=40, recording=None, **arguments):
    """Record a simulated episode or two; the actions."""
    arguments = {"chunking": "naive", "simulated_delay": 2, **arguments}
    with ControlLoop(policy, RATE, record=recording or path, **arguments) as loop:
        loop.reset(seed=3)
        found = [loop.step(row) for row in observations(ticks)]
        loop.reset()
        return found + [loop.step(row) for row in observations(ticks // 2, 1)]


def written(flight, path, part=slice(None)):
    """Write the records of a flight, or some of them, as they were read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meam_policy.flight.flight_file.encode", lambda message: json.dumps(message).encode())
        file = FlightFile(path, flight.about)
        for each in flight.records[part]:
            file.add(each.number, each.time_ns, each.topic, each.message)
        file.finish(flight.records[part][-1].number + 1, 0)
    return path


def record_and_read(policy, folder):
    record(policy, folder / "flight.mcap")
    return read_flight(folder / "flight.mcap")


@pytest.mark.parametrize("chunking", ["naive", "blocking"])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_simulated_loop_replays_bit_for_bit(linear, tmp_path, chunking, delay):
    path = tmp_path / "flight.mcap"
    policy = linear.load(safety=SafetySettings(rate_limit=0.1))
    record(policy, path, chunking=chunking, simulated_delay=delay)
    report = replay_flight(path, linear.load(safety=SafetySettings(rate_limit=0.1)))
    assert (report.first, report.identity, report.max_difference) == (None, (), 0.0)
    assert report.same
    assert (report.ticks, report.replayed, report.dropped, report.complete) == (60, 60, 0, True)
    assert report.inferences > 10


def test_a_loop_in_real_time_replays_bit_for_bit_whenever_its_chunks_arrived(linear, tmp_path):
    path = tmp_path / "flight.mcap"
    rows = iter(observations(1000))
    with ControlLoop(linear.load(), 500, chunking="naive", any_rate=True, overrun="zero", record=path) as loop:
        loop.run(lambda: StampedObservation(next(rows), time.monotonic()), lambda _: None, steps=200)
        loop.run(lambda: next(rows), lambda _: None, steps=20)
    report = replay_flight(path, linear.load())
    assert report.first is None
    assert report.replayed == report.ticks == 220


class Continuing:
    """Real-time chunking: a policy whose chunk is its prefix where that weighs, and else what another one gives."""

    takes_prefix = True

    def __init__(self, policy):
        self._policy = policy

    def __getattr__(self, name):
        return getattr(self._policy, name)

    def predict_action_chunk(self, observation, *, prefix=None, prefix_weight=None, noise=None):
        chunk = self._policy.predict_action_chunk(observation, noise=noise)
        assert prefix_weight is not None
        return (chunk + prefix_weight[:, None] * (prefix - chunk)).astype(np.float32)


@pytest.mark.parametrize("ring", [None, 60.0])
def test_real_time_chunks_and_their_prefixes_replay(linear, tmp_path, ring):
    path = tmp_path / "flight.mcap"
    recording = Recording(path, ring_seconds=ring)
    record(Continuing(linear.load()), path, chunking="realtime", recording=recording)
    found = [record for record in read_flight(path).records if record.topic == "inference"]
    assert np.any(numbers(found[1].message["prefix"]))
    report = replay_flight(path, Continuing(linear.load()))
    assert (report.first, report.replayed) == (None, 60)


def test_failed_inferences_and_held_actions_replay(linear, tmp_path):
    class Failing(Continuing):
        calls = 0

        def predict_action_chunk(self, observation, *, prefix=None, prefix_weight=None, noise=None):
            self.calls += 1
            if self.calls in (3, 4, 5, 6):
                raise ActionError("It failed.")
            return self._policy.predict_action_chunk(observation, noise=noise)

    path = tmp_path / "flight.mcap"
    record(Failing(linear.load()), path)
    report = replay_flight(path, Failing(linear.load()))
    assert (report.first, report.replayed) == (None, 60)
    report = replay_flight(path, linear.load())
    assert report.first is not None
    assert "recorded ActionError: It failed., now a chunk" in report.first.reason


def test_an_interrupt_in_a_tick_is_a_gap(linear, tmp_path, monkeypatch):
    path, rows = tmp_path / "flight.mcap", observations(40)
    with ControlLoop(linear.load(), RATE, chunking="naive", simulated_delay=1, record=path) as loop:
        for tick, row in enumerate(rows):
            if tick == 10:
                with monkeypatch.context() as patch:
                    patch.setattr(loop, "_is_accepted", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
                    with pytest.raises(KeyboardInterrupt):
                        loop.step(row)
            loop.step(row)
    report = replay_flight(path, linear.load())
    assert report.first is None
    assert (report.ticks, report.differing) == (41, 0)
    assert 35 <= report.replayed < 41


def test_pauses_stale_and_refused_observations_replay(linear, tmp_path):
    path, clock = tmp_path / "flight.mcap", Clock()
    safety = SafetySettings(on_bad_observation="hold")
    arguments = {"chunking": "naive", "max_observation_age_s": 0.1, "clock": clock, "sleep": clock.sleep}
    rows = observations(60)
    rows[20] = np.nan
    rows[21, 1] = np.inf
    pauses = {10: 3.5 / RATE, 30: 0.5, 45: -1.0}
    with ControlLoop(linear.load(safety=safety), RATE, record=path, **arguments) as loop:
        for tick, row in enumerate(rows):
            clock.now += pauses.get(tick, 1 / RATE)
            loop.step(row, clock.now - (0.2 if tick in (15, 16) else 0.0))
        assert loop.health().stale_observations == 2
    report = replay_flight(path, linear.load(safety=safety))
    assert report.first is None
    assert report.replayed == 60


def test_ten_thousand_ticks_replay_with_difference_zero(linear, tmp_path):
    path = tmp_path / "flight.mcap"
    with ControlLoop(linear.load(), RATE, chunking="naive", simulated_delay=2, record=path) as loop:
        loop.reset(seed=0)
        for row in observations(10_000):
            loop.step(row)
            while len(recorder_of(loop)._records) > 5000:  # a simulation is faster than any robot
                time.sleep(0.01)
    report = replay_flight(path, linear.load())
    assert (report.replayed, report.max_difference, report.first) == (10_000, 0.0, None)


def test_another_policy_is_named_first(linear, make_policy, tmp_path):
    path = tmp_path / "flight.mcap"
    record(linear.load(), path)
    other = make_policy(chunk_size=8, execute_steps=3, weight=np.full((3, 16), 0.25))
    report = replay_flight(path, other.load())
    assert not report.same
    assert report.first is not None
    assert report.first.what == "chunk of inference 0"
    assert report.first.tick == 0
    assert "another graph" in report.first.reason
    assert report.max_difference > 0


def test_a_changed_limit_is_named(linear, tmp_path):
    path = tmp_path / "flight.mcap"
    record(linear.load(safety=SafetySettings(rate_limit=0.1)), path)
    report = replay_flight(path, linear.load(safety=SafetySettings(rate_limit=0.05)))
    assert report.first is not None
    assert report.first.what == "action"
    assert "limits gave another action" in report.first.reason
    assert "rate_limit" in report.first.reason
    assert report.first.reason.index("limits") < report.first.reason.index("rate_limit")


def test_a_refusal_that_is_new_is_named(linear, tmp_path):
    path = tmp_path / "flight.mcap"
    record(linear.load(safety=SafetySettings(on_unfamiliar="hold", unfamiliarity_limit=100.0)), path)
    report = replay_flight(path, linear.load(safety=SafetySettings(on_unfamiliar="raise", unfamiliarity_limit=2.0)))
    assert report.first is not None
    assert "safety" in report.first.reason


def test_a_ring_holds_a_stop_and_replays_from_its_first_chunk_on(linear, tmp_path):
    path, clock = tmp_path / "stop.mcap", Clock()
    rate = SafetySettings(rate_limit=0.1)
    ring = Recording(path, ring_seconds=0.3)
    late = threading.Event()
    policy = linear.load(safety=rate)
    arguments = {"chunking": "naive", "overrun": "stop", "max_observation_age_s": 0.1, "clock": clock}
    with ControlLoop(policy, RATE, record=ring, sleep=clock.sleep, **arguments) as loop:
        rows = observations(200)
        for row in rows:
            clock.now += 1 / RATE
            loop.step(row, clock.now)
            late.wait(0.005)
        with pytest.raises(ActionError, match="older than"):
            loop.step(rows[0], clock.now - 1.0)
        loop.save_recording()
    report = replay_flight(path, linear.load(safety=rate))
    assert report.first is None
    assert 200 > report.ticks > report.replayed > 10


def test_dropped_records_are_a_gap_after_which_the_replay_goes_on(linear, tmp_path, monkeypatch):
    path = tmp_path / "flight.mcap"
    policy = linear.load(safety=SafetySettings(rate_limit=0.1))
    with ControlLoop(policy, RATE, chunking="naive", simulated_delay=2, record=path) as loop:
        recorder = recorder_of(loop)
        for tick, row in enumerate(observations(60)):
            monkeypatch.setattr(recorder, "_limit", 0 if 20 <= tick < 25 else 10_000)
            loop.step(row)
        assert loop.health().dropped_records >= 5
    report = replay_flight(path, linear.load(safety=SafetySettings(rate_limit=0.1)))
    assert report.first is None
    assert report.dropped >= 5
    assert 45 <= report.replayed < report.ticks < 60


def test_a_policy_that_acted_before_replays_like_one_that_was_just_loaded(linear, tmp_path):
    path, policy = tmp_path / "flight.mcap", linear.load(safety=SafetySettings(rate_limit=0.01))
    with ControlLoop(policy, RATE, chunking="naive", simulated_delay=1, record=path) as loop:
        for row in observations(20):
            loop.step(row)
    assert replay_flight(path, policy).same
    assert replay_flight(path, policy).same


def test_an_episode_without_a_reset_goes_on_from_the_last_action(linear, tmp_path):
    path, rate = tmp_path / "flight.mcap", SafetySettings(rate_limit=0.1)
    rows = iter(observations(100))
    arguments = {"chunking": "naive", "simulated_delay": 1, "overrun": "zero"}
    with ControlLoop(linear.load(safety=rate), RATE, record=path, **arguments) as loop:
        loop.run(lambda: next(rows), lambda _: None, steps=20)
        loop.run(lambda: next(rows), lambda _: None, steps=20)
    report = replay_flight(path, linear.load(safety=rate))
    assert report.first is None
    assert report.replayed == 40


def test_what_is_no_flight_or_no_policy_is_refused(linear, make_policy, tmp_path):
    path = tmp_path / "flight.mcap"
    record(linear.load(), path)
    with pytest.raises(ConfigError, match="chunk_size is 4; expected 8"):
        replay_flight(path, make_policy(chunk_size=4).load())
    with pytest.raises(ConfigError, match="expected a MeamPolicy"):
        replay_flight(path, "policy")
    (tmp_path / "text.mcap").write_text("text")
    with pytest.raises(FormatError, match="no MCAP file"):
        replay_flight(tmp_path / "text.mcap", linear.load())


def test_recording_changes_no_action(linear, tmp_path):
    actions = record(linear.load(), tmp_path / "flight.mcap")
    with ControlLoop(linear.load(), RATE, chunking="naive", simulated_delay=2) as loop:
        loop.reset(seed=3)
        bare = [loop.step(row) for row in observations(40)]
    np.testing.assert_array_equal(actions[:40], bare)


def test_a_flight_of_which_nothing_can_be_compared_is_not_the_same(linear, tmp_path):
    flight = read_flight(written(record_and_read(linear.load(), tmp_path), tmp_path / "late.mcap", slice(5, 8)))
    report = replay_flight(flight.path, linear.load())
    assert (report.ticks > 0, report.replayed, report.first) == (True, 0, None)
    assert (report.same, report.verdict, report.to_json()["same"]) == (False, "NOTHING COMPARED", False)


def test_a_policy_that_acted_in_another_loop_before_is_named_with_its_remedy(linear, tmp_path):
    slow = SafetySettings(rate_limit=0.01)
    policy, arguments = linear.load(safety=slow), {"chunking": "naive", "simulated_delay": 1}
    for number, reset in enumerate((False, False, True)):
        path = tmp_path / f"{number}.mcap"
        with ControlLoop(policy, RATE, record=path, **arguments) as loop:
            if reset:
                loop.reset()
            for row in observations(20, number):
                loop.step(row)
    reports = [replay_flight(tmp_path / f"{number}.mcap", linear.load(safety=slow)) for number in range(3)]
    assert [report.same for report in reports] == [True, False, True]
    first = reports[1].first
    assert first is not None
    assert (first.what, first.tick) == ("action", 0)
    assert "had acted before" in first.reason
    assert "loop.reset()" in first.reason
    assert ".." not in first.reason


class Wrapped(Continuing):
    """Another class that acts alike."""


def test_the_identity_names_class_processor_and_python(linear, tmp_path, monkeypatch):
    path = tmp_path / "flight.mcap"
    record(Continuing(linear.load()), path, chunking="realtime")
    assert read_flight(path).about["policy"].endswith("test_replay.Continuing")
    for name, value in (("python_version", "3.99"), ("machine", "other")):
        monkeypatch.setattr(f"platform.{name}", lambda value=value: value)
    monkeypatch.setattr("meam_policy.flight.identity._processor", lambda: "another one")
    report = replay_flight(path, Wrapped(linear.load()))
    assert report.same
    assert [each.split(":")[0] for each in report.identity] == [
        "another class of policy",
        "another Python",
        "another machine",
        "another processor",
    ]


def test_noise_of_another_size_is_refused_in_one_sentence(linear, tmp_path):
    flight = record_and_read(linear.load(), tmp_path)
    next(record for record in flight.records if record.topic == "inference").message["noise"] = []
    report = replay_flight(written(flight, tmp_path / "other.mcap"), linear.load())
    assert report.first is not None
    assert "Noise has shape (0,); expected" in report.first.reason
    assert ".." not in report.first.reason


@pytest.mark.parametrize("compression", list(CompressionType))
def test_an_mcap_file_of_others_is_said_to_be_none_of_ours(tmp_path, compression):
    if compression == CompressionType.LZ4:
        pytest.importorskip("lz4")
    writer = Writer(str(tmp_path / "theirs.mcap"), compression=compression)
    writer.start()
    channel = writer.register_channel("/theirs", "json", 0)
    writer.add_message(channel, 0, b"{}", 0)
    writer.finish()
    with pytest.raises(FormatError, match="no recording of ours"):
        read_flight(tmp_path / "theirs.mcap")


WRONG = st.sampled_from([None, "text", -1, 2**60, 1e300, "NaN", [], [[1.0], [2.0, 3.0]], {}, True, [0.0] * 7, ["x"]])
FIELDS = {
    "tick": ("tick", "observation", "age_s", "pause", "skipped", "asked", "arrived", "chosen", "action", "error"),
    "inference": ("number", "tick", "opening", "noise", "chunk", "seconds", "delays", "expected", "error"),
    "event": ("kind", "reset", "action"),
}


@pytest.fixture(scope="module")
def flown(tmp_path_factory, make_policy):
    linear, folder = make_policy(chunk_size=8, execute_steps=3), tmp_path_factory.mktemp("flown")
    record(linear.load(), folder / "flight.mcap", ticks=12)
    return read_flight(folder / "flight.mcap"), linear.load(), folder / "other.mcap"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flight_with_wrong_fields_is_compared_or_refused(flown, data):
    flight, policy, path = flown
    number = data.draw(st.integers(0, len(flight.records) - 1))
    topic = flight.records[number].topic
    message = {**flight.records[number].message, data.draw(st.sampled_from(FIELDS[topic])): data.draw(WRONG)}
    path.unlink(missing_ok=True)
    records = [each._replace(message=message) if each.number == number else each for each in flight.records]
    written(replace(flight, records=records), path)
    try:
        report = replay_flight(path, policy)
    except MeamError:
        return
    assert report.ticks >= 17
