import json

import numpy as np
import pytest

from meam_policy.cli import run as meam
from meam_training.commands.data import _row
from meam_training.data.data_report import NumberRange


@pytest.fixture
def data(tmp_path):
    """A file in OGBench's form: ten episodes of three transitions and one of twenty, without an end of the task."""
    generator = np.random.default_rng(0)
    lengths = [4] * 10 + [21]
    rows = sum(lengths)
    np.savez(
        tmp_path / "walk.npz",
        observations=generator.normal(size=(rows, 3)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        rewards=generator.normal(size=rows).astype(np.float32),
        terminals=np.isin(np.arange(rows), np.cumsum(lengths) - 1).astype(np.float32),
    )
    return str(tmp_path / "walk.npz")


def test_a_data_set_is_shown_with_its_numbers_and_warnings(data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert meam(["data", data, "--chunk-size", "5", "--no-pad-chunks"]) == 0
    shown = capsys.readouterr()
    assert "50 in 11 episodes of 3 to 20 (median 3) steps" in shown.out
    assert "a whole chunk of 5 starts at 16 rows; the other 34 (68%)" in shown.out
    assert shown.out.count("\nActions") == shown.out.count("\nObservations") == 1
    assert "Warning: 68% of the rows are within 4 steps of an episode's end" in shown.err


def test_the_json_is_one_line_with_the_same_numbers(data, capsys):
    assert meam(["data", data, "--chunk-size", "5", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["rows"], found["episodes"], len(found["actions"]), len(found["observations"])) == (50, 11, 2, 3)
    assert found["chunks"] == {
        "chunk_size": 5,
        "padded": True,
        "whole": 16,
        "cut": 34,
        "short_episodes": 10,
        "short_rows": 30,
    }


def test_a_picture_is_written(data, tmp_path, capsys):
    assert meam(["data", data, "--output", str(tmp_path / "walk.png")]) == 0
    assert (tmp_path / "walk.png").read_bytes().startswith(b"\x89PNG")
    assert "Wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chunk-size", "0"], "--chunk-size is 0; expected 1 or more"),
        (["--output", "walk.jpg"], "--output is walk.jpg; expected a file that ends in .png"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(data, capsys, arguments, message):
    assert meam(["data", data, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_training_says_the_same_before_it_starts(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tiny = [
        "--steps",
        "3",
        "--chunk-size",
        "5",
        "--hidden-dims",
        "8",
        "--batch-size",
        "8",
        "--nfe",
        "2",
        "--device",
        "cpu",
    ]
    assert meam(["train", "bc", "--data", data, "--output-dir", str(tmp_path / "run"), *tiny]) == 0
    said = " ".join(capsys.readouterr().err.split())
    before = said.partition("Training bc")[0]
    assert "a whole chunk of 5 starts at 16 rows; the other 34 (68%)" in before
    assert "68% of the rows are within 4 steps of an episode's end" in before


def test_what_is_refused_can_be_looked_at_with_the_options_that_the_message_names(data, tmp_path, capsys):
    with np.load(data) as arrays:
        np.savez(tmp_path / "wide.npz", **{**arrays, "actions": arrays["actions"] * 3})
    wide = str(tmp_path / "wide.npz")
    assert meam(["data", wide]) == 2
    assert "--clip-actions" in capsys.readouterr().err
    assert meam(["data", wide, "--clip-actions"]) == 0
    assert "clipped" in capsys.readouterr().out
    assert meam(["data", wide, "--clip-actions", "--episodes", "0:2"]) == 0
    assert "6 in 2 episodes" in capsys.readouterr().out


def test_several_data_sets_are_shown_together(data, capsys):
    assert meam(["data", data, data, "--shares", "0.5", "0.5"]) == 0
    assert "100 in 22 episodes" in capsys.readouterr().out
    assert meam(["data"]) == 2
    assert "expected meam data DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("least", "greatest", "shown"), [(5500000.25, 5500012.5, ["5500000.25", "5500012.5"]), (-1, 1, ["-1", "1"])]
)
def test_numbers_far_from_zero_are_shown_with_the_digits_that_move(least, greatest, shown):
    number = NumberRange("x", None, None, least, greatest, 0.0, 0.0, outside=0, still=False, counts=())
    assert _row(number)[1:3] == shown
