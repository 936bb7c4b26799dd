import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from meam_policy import BoxSpec, __version__
from meam_policy.cli import run
from meam_policy.diagnosis.machine import cpu_model
from meam_policy.folder.policy_folder import sha256

PENDULUM = BoxSpec((3,), "float32", (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0))
TORQUE = BoxSpec((1,), "float32", (-2.0,), (2.0,))


@pytest.fixture
def swinger(make_policy):
    """Every action is one observation and a noise: no sum that a batch could round differently."""
    weight = np.array([[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, -0.25, 0]])
    boxes = {"observation": [PENDULUM], "action": TORQUE}
    return make_policy(**boxes, weight=weight, noise_weight=np.eye(4), environment_id="Pendulum-v1")


def figures(capfd, *arguments):
    assert run(["eval", *map(str, arguments), "--json"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    assert output.out.count("\n") == 1
    return json.loads(output.out)


def without_latency(summary):
    """What does not depend on how many environments run at a time."""
    return {name: value for name, value in summary.items() if not name.startswith(("latency", "num_envs"))}


def test_the_figures_say_how_and_of_what_they_were_measured(capfd, swinger):
    how = {"num_envs": 1, "device": "cpu", "revision": None, "subfolder": None, "packages": ["gymnasium"]}
    how |= {"machine": cpu_model(), "version": __version__, "provider": "CPUExecutionProvider"}
    how["config_sha256"] = sha256((swinger.folder / "config.json").read_bytes())
    assert swinger.load().config_sha256 == how["config_sha256"]
    assert swinger.unchecked().config_sha256 is None
    one = figures(capfd, swinger.folder, "--episodes", 1, "--import", "gymnasium")
    several = figures(capfd, swinger.folder, "--episodes", 1, "--acting", "sample", "zero", "--import", "gymnasium")
    assert [{name: found[name] for name in how} for found in (one, several)] == [how, how]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--num-envs", 3], ["--num-envs", 2, "--async-envs"]])
def test_figures_do_not_depend_on_how_many_environments_run_at_a_time(capfd, swinger, options):
    arguments = [swinger.folder, "--episodes", 5, "--seed", 9]
    single, several = figures(capfd, *arguments), figures(capfd, *arguments, *options)
    assert without_latency(single) == without_latency(several)


def test_rollouts_are_recorded_for_training(capfd, swinger, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("minari")
    from meam_training import OfflineDataset

    arguments = [swinger.folder, "--episodes", 3, "--seed", 2]
    plain = figures(capfd, *arguments)
    recorded = figures(capfd, *arguments, "--num-envs", 2, "--record", "pendulum/rollouts-v0", "--root", tmp_path)
    folder = recorded.pop("dataset")
    assert folder == str(tmp_path / "pendulum" / "rollouts-v0")
    assert without_latency(recorded) == without_latency(plain)
    data = OfflineDataset.from_minari(folder)
    assert (len(data), data.environment_id, data.control_rate_hz) == (600, "Pendulum-v1", 20)
    assert not data.terminations.any()
    assert np.flatnonzero(data.episode_ends).tolist() == [199, 399, 599]
    assert data.rewards.sum() / 3 == pytest.approx(plain["return_mean"], rel=1e-5)


def test_recording_needs_no_pytorch_and_names_the_extra_of_minari(run_python, swinger):
    code = (
        "import sys\n"
        "class WithoutMinari:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('minari', 'torch'):\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, WithoutMinari())\n"
        "from meam_policy.cli import run\n"
        f"sys.exit(run(['eval', {str(swinger.folder)!r}, '--record', 'walk/data-v0']))"
    )
    result = run_python("-c", code)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "meam: Recording needs minari, which is not installed: pip install 'meam-policy[train]'.\n"
    )


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--num-envs", "0"], "num_envs is 0"),
        (["--root", "data"], "without --record"),
        (["--video", "videos", "--num-envs", "2"], "one environment at a time"),
        (["--video", "videos", "--async-envs"], "one environment at a time"),
        (["--async-envs"], "set --num-envs above 1"),
        (["--record", "rollouts"], "not a Minari id"),
    ],
)
def test_options_that_do_not_fit_are_a_mistake_of_one_line(capfd, swinger, tmp_path, monkeypatch, options, fragment):
    if "--record" in options:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert run(["eval", str(swinger.folder), *options]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert fragment in output.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("moviepy") is None or find_spec("mujoco") is None, reason="needs moviepy and MuJoCo")
def test_videos_are_written_beside_the_figures(capfd, run_python, make_policy, tmp_path):
    bounds = (1.0, 1.0, 3.0, 3.0)
    box = BoxSpec((4,), "float32", tuple(-b for b in bounds), bounds)
    policy = make_policy(observation=[box], environment_id="meam/Pockets-v0")
    arguments = [str(policy.folder), "--episodes", "2"]
    plain = figures(capfd, *arguments)
    result = run_python("-m", "meam_policy", "eval", *arguments, "--json", "--video", str(tmp_path / "videos"))
    if "cannot be drawn on this machine" in result.stderr:
        pytest.skip(result.stderr)
    assert (result.returncode, result.stderr) == (0, "")
    filmed = json.loads(result.stdout)
    assert filmed.pop("video") == str(tmp_path / "videos")
    assert without_latency(filmed) == without_latency(plain)
    assert sorted(os.listdir(tmp_path / "videos")) == ["rollout-episode-0.mp4", "rollout-episode-1.mp4"]


MORTAL = """
import os, signal
import gymnasium
from gymnasium.envs.classic_control.pendulum import PendulumEnv

class Mortal(PendulumEnv):
    def reset(self, *, seed=None, options=None):
        if seed == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reset(seed=seed, options=options)

gymnasium.register("Mortal-v0", Mortal, max_episode_steps=5)
"""


@pytest.mark.parametrize("rules", [[], ["--acting", "zero", "sample"]])
@pytest.mark.parametrize("json_line", [False, True])
def test_a_worker_that_dies_leaves_the_finished_episodes_marked_as_partial(
    capfd, swinger, tmp_path, monkeypatch, rules, json_line
):
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["eval", str(swinger.folder), "--env-id", "mortal:Mortal-v0", "--episodes", "10", "--num-envs", "2"]
    assert run([*arguments, "--async-envs", *rules, *(["--json"] if json_line else [])]) == 2
    output = capfd.readouterr()
    assert "meam: Worker 0 of the 2 of the vector environment was killed by SIGKILL." in output.err
    if json_line:
        partial = json.loads(output.out)
        assert (partial["partial"], partial["env_id"]) == (True, "Mortal-v0")
        assert [(row["acting"], row["episodes"]) for row in partial["rules"]] == [("zero" if rules else "sample", 6)]
        assert partial["rules"][0]["partial"] is True
    else:
        assert output.out == ""
        assert "in Mortal-v0, partial: 6 of 10 episodes finished" in output.err
        assert "return_mean" in output.err


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--num-envs", "2"], ["--num-envs", "2", "--async-envs"]])
def test_interrupt_of_several_environments_ends_without_a_traceback(swinger, options):
    command = [sys.executable, "-m", "meam_policy", "eval", str(swinger.folder), "--episodes", "300", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal, which the subprocesses get too
        try:
            _, rest = process.communicate(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert "of 300" in first
    assert process.returncode == 130
    assert [line for line in rest.splitlines() if "of 300" not in line] == [
        "meam: interrupted; what was finished is kept."
    ]
