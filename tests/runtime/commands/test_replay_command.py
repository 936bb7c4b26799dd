import json

import numpy as np
import pytest

from meam_policy import ControlLoop, SafetySettings
from meam_policy.cli import run
from meam_policy.commands import replay as replay_command
from meam_policy.flight import read_flight
from meam_policy.flight.flight_file import FlightFile


@pytest.fixture
def flown(make_policy, tmp_path):
    linear, path = make_policy(chunk_size=4), tmp_path / "flight.mcap"
    policy = linear.load(safety=SafetySettings(rate_limit=(0.1, 0.2), unfamiliarity_limit=np.inf))
    with ControlLoop(policy, 10, chunking="naive", simulated_delay=1, record=path) as loop:
        for row in np.random.default_rng(0).normal(size=(30, 3)):
            loop.step(row)
    return linear, path


def test_a_flight_is_replayed_with_the_settings_that_it_has(flown, capsys):
    linear, path = flown
    assert run(["replay", str(path), "--policy", str(linear.folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["same"], report["replayed"], report["max_difference"], report["identity"]) == (True, 30, 0.0, [])
    assert run(["replay", str(path), "--policy", str(linear.folder)]) == 0
    assert "the same" in capsys.readouterr().out


def test_a_difference_is_exit_code_1_and_named(flown, make_policy, capsys):
    other = make_policy(chunk_size=4, weight=np.full((3, 8), 0.25))
    assert run(["replay", str(flown[1]), "--policy", str(other.folder)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "DIFFERS" in out
    assert "episode 0, tick 0: chunk of inference 0" in out
    assert "another graph" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Neither --policy nor --to-minari"),
        (["--reward", "0", "--policy", "POLICY"], "without --to-minari"),
        (["--policy", "nowhere"], "nowhere"),
        (["--to-minari", "arm/flight-v0"], "has no rewards"),
    ],
)
def test_what_cannot_be_done_is_said(flown, arguments, said, capsys):
    linear, path = flown
    words = [str(linear.folder) if word == "POLICY" else word for word in arguments]
    assert run(["replay", str(path), *words]) == 2
    assert said in capsys.readouterr().err


def test_an_empty_folder_is_said(tmp_path, capsys):
    assert run(["replay", str(tmp_path), "--policy", "policy"]) == 2
    assert "has no *.mcap" in capsys.readouterr().err


def test_a_file_of_which_nothing_is_compared_is_exit_code_1(flown, tmp_path, capsys):
    linear, path = flown
    flight = read_flight(path)
    file = FlightFile(tmp_path / "late.mcap", flight.about)
    last = flight.records[-1]
    file.add(last.number, last.time_ns, last.topic, last.message)
    file.finish(last.number + 1, 0)
    assert run(["replay", str(tmp_path / "late.mcap"), "--policy", str(linear.folder)]) == 1
    assert "NOTHING COMPARED" in capsys.readouterr().out


def test_files_of_a_ring_come_in_their_order_and_are_read_once(flown, tmp_path, capsys, monkeypatch):
    linear, path = flown
    folder, read = tmp_path / "ring", []
    folder.mkdir()
    for name in ("stop-10", "stop", "stop-2"):
        (folder / f"{name}.mcap").write_bytes(path.read_bytes())
    original = replay_command.read_flight
    monkeypatch.setattr(replay_command, "read_flight", lambda each: read.append(each.stem) or original(each))
    monkeypatch.setattr("meam_policy.replay.run.read_flight", None)
    arguments = ["--to-minari", "arm/flights-v0", "--root", str(tmp_path / "data"), "--reward", "0"]
    assert run(["replay", str(folder), "--policy", str(linear.folder), *arguments]) == 0
    assert read == ["stop", "stop-2", "stop-10"]
