import json

import pytest

from meam_policy import MeamPolicy
from meam_policy.cli import run
from meam_policy.toml_file import read_toml

NUMBER = '[[action]]\nname = "{name}"\nkind = "target/joint/position"\nunit = "rad"\njoint = "{name}"\n'
CONTRACT = "[timing]\nrate_hz = 10\n" + NUMBER.format(name="elbow") + "max_rate = 2\n" + NUMBER.format(name="wrist")


@pytest.fixture
def folder(make_policy):
    return make_policy(control_rate_hz=10.0).folder


def test_a_skeleton_is_printed_or_written_once(folder, tmp_path, capsys):
    assert run(["robot", "init", str(folder)]) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "robot.toml"
    assert run(["robot", "init", str(folder), "--output", str(file)]) == 0
    assert file.read_text() == printed
    assert len(read_toml(file, "contract")["action"]) == 2
    assert f"meam robot add {folder} {file} --output-dir DIR" in capsys.readouterr().err
    assert run(["robot", "init", str(folder), "--output", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert file.read_text() == printed


def test_a_skeleton_names_the_commands_that_take_it(folder, capsys):
    assert run(["robot", "init", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "with this policy's folder: meam robot add POLICY robot.toml --output-dir DIR" in printed
    assert "with the training run that it comes from: meam export RUN --robot robot.toml --output-dir DIR" in printed


def test_a_contract_is_added_to_a_copy_of_the_folder(folder, tmp_path, capsys):
    (tmp_path / "robot.toml").write_text(CONTRACT)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert run(["robot", "add", str(folder), str(tmp_path / "robot.toml"), "--output-dir", str(tmp_path / "new")]) == 0
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    place = tmp_path / "new"
    said = f"`meam eval {place} --json > results.json`, then `meam card {place} --results results.json`"
    assert said in " ".join(capsys.readouterr().err.split())
    policy = MeamPolicy.from_pretrained(tmp_path / "new")
    assert policy.robot is not None
    assert policy.robot.joints == ("elbow", "wrist")
    old, new = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "new"))
    assert new["files"].pop("robot.json")
    assert new == old
    # Another one in its place.
    (tmp_path / "robot.toml").write_text(CONTRACT.replace("max_rate = 2", "max_rate = 3"))
    arguments = [str(tmp_path / "new"), str(tmp_path / "robot.toml"), "--output-dir", str(tmp_path / "newer")]
    assert run(["robot", "add", *arguments]) == 0
    newer = MeamPolicy.from_pretrained(tmp_path / "newer").robot
    assert newer is not None
    assert newer.action[0].max_rate == 3


def test_info_prints_what_the_contract_says(folder, tmp_path, capsys):
    limited = CONTRACT.replace("max_rate = 2", "max_rate = 2.5\nlower = -0.5\nstiffness = 40.0\ndamping = 2.0")
    (tmp_path / "robot.toml").write_text(limited)
    assert run(["robot", "add", str(folder), str(tmp_path / "robot.toml"), "--output-dir", str(tmp_path / "new")]) == 0
    assert run(["info", str(tmp_path / "new")]) == 0
    title, header, _, *rows = capsys.readouterr().out.partition("On the robot")[2].splitlines()
    assert not title.strip()
    assert [title.strip() for title in header.split("┃")][:4] == ["", "index", "name", "of"]
    said = [[cell.strip() for cell in row.split("│")] for row in rows]
    assert said[0][:7] == ["out", "0", "elbow", "elbow", "target/joint/position", "rad", "absolute"]
    assert said[0][7:] == ["-0.5 to …", "2.5", "40 / 2"]
    assert said[1][7:] == ["", "", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No action is named; expected meam robot init or add."),
        (["write"], 'There is no action "write"; expected meam robot init or add.'),
        (["add", "POLICY", "none.toml", "--output-dir", "new"], "There is no robot contract"),
        (["add", "POLICY", "bad.toml", "--output-dir", "new"], "bad.toml: action[0].unit is 'radian'; expected one of"),
        (["add", "POLICY", "bad.toml", "--output-dir", "full"], "already holds something"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    folder, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text(CONTRACT.replace('"rad"', '"radian"'))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert run(["robot", *(str(folder) if argument == "POLICY" else argument for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "new").exists()
