import json

import numpy as np
import pytest

from meam_policy import ControlLoop, SafetySettings
from meam_policy.cli import run


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
