import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import meam_policy
from meam_policy import BoxSpec
from meam_policy.cli import COMMANDS, run
from meam_policy.rollouts.episodes import rollout

PENDULUM = BoxSpec((3,), "float32", (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0))
TORQUE = BoxSpec((1,), "float32", (-2.0,), (2.0,))


@pytest.fixture
def swinger(make_policy):
    return make_policy(observation=[PENDULUM], action=TORQUE, environment_id="Pendulum-v1", control_rate_hz=20.0)


def test_help_lists_every_command(capsys):
    assert run(["--help"]) == 0
    output = capsys.readouterr()
    for name, command in COMMANDS.items():
        assert f"{name} " in output.out
        assert command.summary in output.out
    assert output.err == ""


def test_no_command_shows_the_help_and_is_a_mistake(capsys):
    assert run([]) == 2
    assert "usage: meam" in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"meam-policy {meam_policy.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help(capsys, name):
    pytest.importorskip("tyro")
    if "train" in COMMANDS[name].extras:
        pytest.importorskip("torch")
    with pytest.raises(SystemExit) as caught:
        run([name, "--help"])
    assert caught.value.code == 0
    output = capsys.readouterr().out
    assert f"usage: meam {name}" in output
    assert "--help" in output


def test_every_option_of_eval_is_explained(capsys):
    with pytest.raises(SystemExit):
        run(["eval", "--help"])
    output = capsys.readouterr().out
    for option in ("--env-id", "--episodes", "--seed", "--revision", "--variant", "--device", "--json"):
        assert option in output


@pytest.mark.parametrize(
    ("typo", "hint"),
    [
        ("evl", "Did you mean `meam eval`?"),
        ("trian", "Did you mean `meam train`?"),
        ("inof", "Did you mean `meam info`?"),
        ("exports", "Did you mean `meam export`?"),
        ("plot", "The commands are demo, collect, data, train"),
        ("zzz", "The commands are demo"),
        ("--evil", "meam"),
    ],
)
def test_unknown_command_is_a_mistake_with_a_hint(capsys, typo, hint):
    assert run([typo]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f'"{typo}"' in output.err
    assert hint in output.err
    assert "`meam --help` explains them" in output.err


@pytest.mark.parametrize("command", ["info", "eval"])
def test_missing_folder_is_one_line_on_stderr(capfd, tmp_path, command):
    folder = tmp_path / "missing"
    assert run([command, str(folder)]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("meam: ")
    assert str(folder) in output.err


@pytest.mark.parametrize("command", ["info", "eval", "verify"])
def test_empty_name_of_a_policy_is_refused(capfd, swinger, monkeypatch, command):
    monkeypatch.chdir(swinger.folder)
    assert run([command, ""]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"meam: `meam {command}`: argument 1 is empty")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["eval", "policy", "--env-id", ""], "the text after --env-id"),
        (["eval", "policy", "--revision="], "the text after --revision"),
        (["info", "policy", "--revision", "  "], "the text after --revision"),
        (["verify", "--json", "policy", "--variant", ""], "the text after --variant"),
    ],
)
def test_empty_text_on_the_command_line_is_refused_by_its_flag(capfd, arguments, place):
    assert run(arguments) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"meam: `meam {arguments[0]}`: {place} is empty")


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_a_training_run_is_not_taken_for_a_newer_policy(capfd, tmp_path, command):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"method": "qam"}')
    assert run([command, str(tmp_path)]) == 2
    assert f"Export it first: `meam export {tmp_path} --output-dir DIR`, then give DIR." in capfd.readouterr().err


@pytest.mark.parametrize("command", ["info", "eval", "verify"])
def test_a_folder_on_this_machine_has_no_revision(capfd, swinger, command):
    assert run([command, str(swinger.folder), "--revision", "main"]) == 2
    assert 'revision is "main", but' in capfd.readouterr().err


def test_eval_shows_no_row_for_a_variant_that_was_not_asked_for(capfd, swinger):
    assert run(["eval", str(swinger.folder), "--episodes", "1"]) == 0
    output = capfd.readouterr().out
    assert "return_mean" in output
    assert "variant" not in output
    assert "None" not in output


@pytest.mark.parametrize(
    "arguments", [["eval", "x", "--no-such-option"], ["info"], ["eval", "x", "--episodes", "many"]]
)
def test_wrong_arguments_are_a_mistake(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


def test_info_as_json_is_one_line_with_the_config(capfd, swinger):
    assert run(["info", str(swinger.folder), "--json"]) == 0
    output = capfd.readouterr()
    assert output.out.count("\n") == 1
    assert json.loads(output.out) == json.loads((swinger.folder / "config.json").read_text())
    assert output.err == ""


def test_info_shows_the_spaces_and_where_the_policy_runs(capfd, swinger):
    assert run(["info", str(swinger.folder)]) == 0
    output = capfd.readouterr().out
    for fragment in ("by hand", "Pendulum-v1", "4 actions, 2 executed", "20 Hz", "CPUExecutionProvider"):
        assert fragment in output


def test_eval_as_json_is_one_line_with_the_figures_of_rollout(capfd, swinger):
    assert run(["eval", str(swinger.folder), "--episodes", "2", "--seed", "3", "--json"]) == 0
    output = capfd.readouterr()
    assert output.out.count("\n") == 1
    assert output.err == ""
    figures = json.loads(output.out)
    expected = rollout(swinger.load(), meam_policy.make_environment("Pendulum-v1"), 2, 3).summary()
    for name in ("episodes", "return_mean", "ci_low", "ci_high", "success", "length_mean"):
        assert figures[name] == expected[name]
    assert figures["policy"] == str(swinger.folder)
    assert figures["env_id"] == "Pendulum-v1"
    assert figures["provider"] == "CPUExecutionProvider"


def test_eval_of_a_variant_runs_its_graph(capfd, swinger, make_policy):
    idle = make_policy(observation=[PENDULUM], action=TORQUE, weight=np.zeros((3, 4)), noise_weight=np.zeros((4, 4)))
    swinger.add_variant("idle", idle.graph)
    figures = {}
    for variant in ([], ["--variant", "idle"]):
        assert run(["eval", str(swinger.folder), "--episodes", "1", "--json", *variant]) == 0
        output = json.loads(capfd.readouterr().out)
        figures[output["variant"]] = output["return_mean"]
    expected = rollout(idle.load(), meam_policy.make_environment("Pendulum-v1"), 1, 0).summary()["return_mean"]
    assert figures["idle"] == expected != figures[None]


def test_info_lists_the_variants_and_checks_that_they_are_whole(capfd, swinger):
    assert run(["info", str(swinger.folder)]) == 0
    assert "none" in capfd.readouterr().out
    swinger.add_variant("k3", swinger.graph)
    swinger.add_variant("k1", swinger.graph)
    assert run(["info", str(swinger.folder)]) == 0
    assert "k3, k1" in capfd.readouterr().out
    (swinger.folder / "k1.onnx").write_bytes(b"damaged")
    assert run(["info", str(swinger.folder)]) == 2
    assert "k1.onnx" in capfd.readouterr().err


def test_info_says_which_onnxruntime_each_graph_needs(capfd, make_policy, light_graph):
    linear = make_policy()
    linear.add_variant("int8", light_graph(), precision="int8")
    linear.add_variant("same", linear.graph)
    assert run(["info", str(linear.folder)]) == 0
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("needs onnxruntime"))
    assert line.split("│")[1].strip() == "1.18 or newer; int8 1.22"  # IR version 10


def test_info_names_what_is_missing_of_the_folder_and_checks_what_is_there(capfd, swinger):
    assert run(["info", str(swinger.folder)]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert "missing" in output.out
    assert "model.safetensors, golden.safetensors" in output.out.replace("\n", " ")
    swinger.add_variant("k3", swinger.graph)
    (swinger.folder / "k3.onnx").unlink()
    assert run(["info", str(swinger.folder)]) == 0
    assert "k3.onnx" in capfd.readouterr().out
    (swinger.folder / "policy.onnx").unlink()
    assert run(["info", str(swinger.folder)]) == 2
    assert "has no policy.onnx, so it is not a policy folder" in capfd.readouterr().err


def test_eval_shows_the_figures_as_a_table(capfd, swinger):
    assert run(["eval", str(swinger.folder), "--episodes", "1"]) == 0
    output = capfd.readouterr()
    for fragment in ("Pendulum-v1", "return_mean", "latency_p99_ms"):
        assert fragment in output.out


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--env-id", "MountainCarContinuous-v0"], "observation"),
        (["--env-id", "Pendulum-v"], "Did you mean"),
        (["--episodes", "0"], "episodes is 0"),
        (["--variant", "k3"], 'no variant "k3"'),
        (["--env-id", "os:path"], "There is no environment"),
    ],
)
def test_eval_reports_mistakes_in_one_line(capfd, swinger, arguments, fragment):
    assert run(["eval", str(swinger.folder), *arguments]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert fragment in output.err


def test_eval_of_a_policy_without_an_environment_asks_for_one(capfd, make_policy):
    assert run(["eval", str(make_policy().folder)]) == 2
    assert "--env-id" in capfd.readouterr().err


def test_module_runs_as_the_command_does(run_python, tmp_path):
    result = run_python("-m", "meam_policy", "info", str(tmp_path / "missing"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


INTERRUPTIBLE = """
import pathlib
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv
from meam_policy.cli import run

class Announced(PendulumEnv):
    def reset(self, *, seed=None, options=None):
        pathlib.Path({started!r}).touch()
        return super().reset(seed=seed, options=options)

gymnasium.register("Announced-v0", Announced, max_episode_steps=200)
raise SystemExit(run(["eval", {folder!r}, "--env-id", "Announced-v0", "--episodes", "1000000"]))
"""


def test_interrupt_exits_with_130_and_no_traceback(swinger, tmp_path):
    started = tmp_path / "started"
    code = INTERRUPTIBLE.format(started=str(started), folder=str(swinger.folder))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "meam: interrupted; what was finished is kept.\n")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--help", "--version", "info {folder}", "info {folder} --json", "eval --help"])
def test_closed_pipe_ends_quietly(swinger, arguments):
    command = f"({sys.executable} -m meam_policy {arguments.format(folder=swinger.folder)}; echo $? >&2) | true"
    # Unbuffered output would hit the closed pipe while printing; buffered output hits it when the process ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert result.stderr in ("0\n", "1\n")  # rich ends with 1


def test_error_in_a_terminal_of_any_encoding_is_printed(run_python):
    result = run_python("-m", "meam_policy", "info", "/no/such/dirécťory", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def test_json_is_valid_for_numbers_that_json_knows(capfd, swinger):
    run(["eval", str(swinger.folder), "--episodes", "1", "--json"])
    figures = json.loads(capfd.readouterr().out)
    assert all(np.isfinite(value) for value in figures.values() if isinstance(value, float))


LONG = "a" * 256


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", LONG],
        ["info", "folder/" + "b" * 300],
        ["verify", LONG],
        ["verify", LONG, "--untrusted"],
        ["eval", LONG],
        ["export", LONG, "--output-dir", "policy"],
        ["export", "run", "--output-dir", LONG],
        ["train", "--data", "data", "--output-dir", LONG],
        ["train", "--output-dir", LONG, "--resume"],
        ["train", "--data", LONG, "--output-dir", "run"],
        ["data", LONG],
        ["data", "data", "--output", f"{LONG}.png"],
        ["collect", "meam/Pockets-v0", "--root", LONG],
        ["sweep", LONG, "--output-dir", "sweep"],
        ["card", LONG, "--results", "r.json"],
        ["info", "a\0b"],
        ["info", "a\ud800"],
        ["eval", "a\0b"],
        ["export", "run", "--output-dir", "a\ud800"],
    ],
)
def test_a_path_that_no_file_system_holds_is_named_as_it_was_given(arguments, tmp_path, monkeypatch, capsys):
    if arguments[0] not in ("info", "verify", "eval"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("meam: ")
    assert message.count("\n") == 1
    assert "expected one that a file system can hold" in message
    assert "run.json" not in message
    assert len(message) < 300
    assert not list(tmp_path.iterdir())
