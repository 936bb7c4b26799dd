import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from meam_policy.cli import run as meam
from meam_policy.errors import ConfigError, NotFoundError
from meam_training.commands import train_run
from meam_training.commands.sweep import _show_table
from meam_training.config import TrainConfig
from meam_training.runs.sweep import Outcome, SweepRun, read_sweep, run_sweep

TINY = """
[settings]
steps = 6
batch_size = 8
device = "cpu"
hidden_dims = [8, 8]
critic_hidden_dims = [8]
num_critics = 2
nfe = 4
candidates = 4
likelihood_steps = 2
log_every = 2
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "first.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_minari):
    box = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    values = np.random.default_rng(0).uniform(-1, 1, (41, 2)).astype(np.float32)
    last = np.arange(40) == 39
    episode = {
        "observations": values,
        "actions": values[:40],
        "rewards": values[:40, 0],
        "terminations": np.zeros(40, bool),
        "truncations": last,
    }
    return make_minari(tmp_path_factory.mktemp("minari"), "tests/sweep-v0", [episode], box, box)


def test_a_sweep_is_every_combination_in_a_fixed_order(write, tmp_path):
    path = write("""
        [settings]
        steps = 10
        [grid]
        seed = [0, 1]
        inverse_temperature = [1, 3.5]
        [tasks.b]
        data = "x/b-v0"
        [tasks.a]
        data = "a.npz"
        env_id = "cube-single-play-singletask-task1-v0"
        chunk_size = 5
    """)
    runs = read_sweep(path, "runs/first")
    assert [run.name for run in runs] == [
        f"task={task},seed={seed},inverse_temperature={tau}" for task in "ba" for seed in (0, 1) for tau in (1, 3.5)
    ]
    assert [(run.config.seed, run.config.inverse_temperature, run.config.chunk_size) for run in runs] == [
        (seed, tau, chunk) for chunk in (1, 5) for seed in (0, 1) for tau in (1, 3.5)
    ]
    assert runs[-1].command == (
        "meam train me-am --data a.npz --env-id cube-single-play-singletask-task1-v0 --output-dir "
        "runs/first/task=a,seed=1,inverse_temperature=3.5 --resume --steps 10 --chunk-size 5 --seed 1 "
        "--inverse-temperature 3.5"
    )


@pytest.mark.slow
def test_meam_train_understands_every_command_as_the_sweep_does(write, monkeypatch):
    path = write("""
        [settings]
        confine = false
        compile = true
        joint_clip = false
        hidden_dims = [64, 64]
        loggers = []
        learning_rate = 1e-5
        edit_target_entropy = -1.5
        execute_steps = 2
        chunk_size = 4
        [grid]
        preset = ["me-am", "qam-edit"]
        critic_hidden_dims = [[32], [64, 32]]
        [tasks.odd]
        data = "it's a $HOME file"
    """)
    seen = []

    def note(config, dataset, output_dir, *, resume, **others):
        seen.append((config, dataset, output_dir, resume))
        raise KeyboardInterrupt

    monkeypatch.setattr(train_run, "train", note)
    monkeypatch.setattr(train_run, "open_dataset", lambda arguments: arguments.data[0])
    runs = read_sweep(path, "runs/a b")
    for run in runs:
        assert meam(shlex.split(run.command)[1:]) == 130
    assert seen == [(run.config, "it's a $HOME file", run.output_dir, True) for run in runs]
    assert [run.output_dir.name for run in runs][-1] == "task=odd,preset=qam-edit,critic_hidden_dims=64x32"


def test_a_run_leaves_out_the_shared_settings_without_an_effect_on_it(write):
    path = write("""
        [settings]
        num_critics = 2
        candidates = 16
        sde_steps = 5
        [grid]
        preset = ["bc", "qam", "me-am"]
        [tasks.a]
        data = "a"
    """)
    bc, qam, me_am = read_sweep(path, "runs")
    assert [run.command.split("--resume")[1].split() for run in (bc, qam, me_am)] == [
        [],
        ["--num-critics", "2", "--sde-steps", "5"],
        ["--num-critics", "2", "--candidates", "16"],
    ]
    assert bc.config == TrainConfig.preset("bc")
    assert qam.config == TrainConfig.preset("qam", num_critics=2, sde_steps=5)
    assert me_am.config == TrainConfig.preset("me-am", num_critics=2, candidates=16)


@pytest.mark.parametrize(
    "text",
    [
        "[settings]\nsde_steps = 5\n[grid]\npreset = ['me-am', 'bc']\n[tasks.a]\ndata = 'a'",
        "[grid]\npreset = ['me-am', 'qam']\nsde_steps = [5]\n[tasks.a]\ndata = 'a'",
        "[grid]\npreset = ['me-am', 'qam']\n[tasks.a]\ndata = 'a'\nsde_steps = 5",
    ],
)
def test_a_setting_without_an_effect_on_any_run_or_on_one_that_has_it_to_itself_is_refused(write, text):
    with pytest.raises(ConfigError, match='sde_steps is 5, but has no effect with objective="two_scale"'):
        read_sweep(write(text), "runs")


def test_print_writes_one_line_of_json_if_asked(write, capsys):
    path = write("[grid]\nseed = [0, 1]\n[tasks.a]\ndata = 'x/a'\n")
    assert meam(["sweep", str(path), "--output-dir", "runs", "--print", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {
        "runs": [
            {"name": run.name, "output_dir": str(run.output_dir), "command": run.command}
            for run in read_sweep(path, "runs")
        ]
    }


def test_print_writes_one_shell_command_a_line_and_runs_nothing(write, tmp_path, capsys):
    path = write("[grid]\nseed = [0, 1]\n[tasks.a]\ndata = 'x $(touch y)/a'\n")
    assert meam(["sweep", str(path), "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    script = "\n".join(line.replace("meam ", "printf '%s|' ", 1) + "; echo" for line in lines)
    words = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split("|")[:4] for line in words] == [["train", "me-am", "--data", "x $(touch y)/a"]] * 2
    assert not list(tmp_path.glob("**/checkpoints"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\ninverse_temprature = [1]\n[tasks.a]\ndata = 'a'", "Did you mean inverse_temperature?"),
        ("[grid]\nentropy_coef = [0.1, 2]\n[tasks.a]\ndata = 'a'", "entropy_coef is 2"),
        ("[grid]\nseed = [0, 0]\n[tasks.a]\ndata = 'a'", "two runs are task=a,seed=0"),
        ("[grid]\nseed = 0\n[tasks.a]\ndata = 'a'", "seed in \\[grid\\] is 0; expected a list"),
        ("[grid]\nseed = []\n[tasks.a]\ndata = 'a'", "expected a list"),
        ("[grid]\nseed = [0]\n[settings]\nseed = 1\n[tasks.a]\ndata = 'a'", "seed is both in \\[grid\\]"),
        ("[grid]\nseed = [0]\n[tasks.a]\ndata = 'a'\nseed = 1", "seed is both in .*tasks.a"),
        ("[grids]\nseed = [0]\n[tasks.a]\ndata = 'a'", "Did you mean \\[grid\\]?"),
        ("[grid]\nseed = [0]", "has no task"),
        ("settings = 3", "settings is 3; expected a table"),
        ("[tasks.a]\nseed = 1", "the task a has no data"),
        ("[tasks]\na = 1", "the task a has no data"),
        ("[tasks.a]\ndata = 'a'\nenv_id = 3", "env_id of the task a is 3"),
        ("[tasks.'a/b']\ndata = 'a'", 'a task is called "a/b"'),
        ("[settings]\ndata = 'a'\n[tasks.a]\ndata = 'a'", "data is not a setting"),
        ("[settings]\npreset = 'meam'\n[tasks.a]\ndata = 'a'", "preset is 'meam'; expected one of bc, qam"),
        ("[settings]\nlearning_rate = true\n[tasks.a]\ndata = 'a'", "learning_rate is True"),
        ("[tasks.a\ndata = 'a'", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_before_anything_runs(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_sweep(write(text), "runs")


def test_a_missing_sweep_file_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"no sweep file .*nothing\.toml"):
        read_sweep(tmp_path / "nothing.toml", "runs")


def test_a_named_pipe_is_no_sweep_file_and_is_not_waited_for(tmp_path, no_waiting):
    os.mkfifo(tmp_path / "sweep.toml")
    with pytest.raises(NotFoundError, match=r"sweep\.toml cannot be read: it is a named pipe, not a regular file"):
        read_sweep(tmp_path / "sweep.toml", "runs")


def test_a_sweep_file_or_folder_that_no_file_system_holds_is_refused(write):
    with pytest.raises(ConfigError, match="path is 'aaa.*expected one that a file system can hold"):
        read_sweep("a" * 256, "runs")
    with pytest.raises(ConfigError, match="output_dir is 'aaa.*expected one that a file system can hold"):
        read_sweep(write("[tasks.a]\ndata = 'a'"), "a" * 256)


def test_a_sweep_needs_a_worker(tmp_path):
    with pytest.raises(ConfigError, match="workers is 0"):
        run_sweep([], workers=0)


@pytest.mark.slow
def test_a_failing_run_stops_no_other_and_finished_ones_are_skipped(write, data, tmp_path, capsys):
    path = write(f"{TINY}[tasks.broken]\ndata = 'no/such-v0'\n[tasks.good]\ndata = '{data}'\nevaluate_every = 3\n")
    output = tmp_path / "runs"
    arguments = ["sweep", str(path), "--output-dir", str(output)]
    with pytest.raises(SystemExit) as caught:
        meam([*arguments, "--json"])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert "Failed: task=broken; the end of" in err
    assert "no/such-v0, neither" in err
    assert out.count("\n") == 1
    broken, good = json.loads(out)["runs"]
    folders = [str(output / name) for name in ("task=broken", "task=good")]
    assert broken == {"name": "task=broken", "output_dir": folders[0], "state": "failed", "metrics": {}}
    assert (good["name"], good["output_dir"], good["state"]) == ("task=good", folders[1], "finished")
    assert good["metrics"]["step"] == 6
    assert {"prior_loss", "policy_loss", "action_difference"} <= good["metrics"].keys()
    assert all(isinstance(value, float) for value in good["metrics"].values())
    assert (output / "task=good" / "metrics.csv").is_file()
    (output / "task=good.log").unlink()
    with pytest.raises(SystemExit) as caught:
        meam(arguments)
    assert caught.value.code == 1
    assert not (output / "task=good.log").exists()
    out, err = capsys.readouterr()
    assert out.count("finished") == 1
    assert out.count("failed") == 1
    assert "Failed: task=broken; the end of" in err


@pytest.mark.slow
def test_a_started_run_goes_on_with_the_same_command_but_not_with_other_settings(write, data, tmp_path):
    text = f"{TINY}confine = false\nmixture_weight = 0.5\nadaptive_mixture = true\n[tasks.good]\ndata = '{data}'\n"
    assert [outcome.state for outcome in run_sweep(read_sweep(write(text), tmp_path / "runs"))] == ["finished"]
    text = text.replace("steps = 6", "steps = 8", 1)
    [outcome] = run_sweep(read_sweep(write(text), tmp_path / "runs"))
    assert outcome.state == "finished"
    assert outcome.run.finished
    with pytest.raises(ConfigError, match=r"was begun with confine = False, but in the sweep it has its default True"):
        run_sweep(read_sweep(write(text.replace("confine = false\n", "")), tmp_path / "runs"))
    [run] = read_sweep(write(text.replace("[8, 8]", "[8, 9]")), tmp_path / "runs")
    assert not run.finished
    assert [outcome.state for outcome in run_sweep([run])] == ["failed"]
    assert "has other settings: --hidden-dims" in run.log.read_text(encoding="utf-8").replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interrupt_lets_the_runs_save_and_starts_no_other(write, data, tmp_path, number, workers):
    text = f"{TINY}[grid]\nseed = {list(range(workers + 1))}\n[tasks.good]\ndata = '{data}'\n".replace(
        "steps = 6", "steps = 1_000_000", 1
    )
    command = [sys.executable, "-m", "meam_policy", "sweep", str(write(text)), "--output-dir", str(tmp_path / "runs")]
    sweep = subprocess.Popen(
        [*command, "--workers", str(workers)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    files = [tmp_path / "runs" / f"task=good,seed={seed}" / "metrics.csv" for seed in range(workers)]
    deadline = time.monotonic() + 120
    while not all(file.is_file() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(sweep.pid, number)  # as a terminal does
    out, err = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, err
    assert out.count("interrupted") == workers
    assert "not started" in out
    assert not (tmp_path / "runs" / f"task=good,seed={workers}.log").exists()
    for file in files:
        assert list(file.parent.glob("checkpoints/step_*"))


def test_runs_share_the_cores(monkeypatch, tmp_path):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("meam_training.runs.sweep._cores", lambda: 8)
    seen = []

    def start(command, env, **others):
        seen.append(env["OMP_NUM_THREADS"])
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr("meam_training.runs.sweep.subprocess.Popen", start)
    runs = [SweepRun(f"{i}", tmp_path / f"{i}", TrainConfig(), ()) for i in range(2)]
    assert [outcome.state for outcome in run_sweep(runs, workers=3)] == ["finished", "finished"]
    assert seen == ["2", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    run_sweep(runs, workers=3)
    assert seen[2:] == ["5", "5"]


def rows_of(run, **evaluation):
    """Leave the files of a run, as far as the table reads them."""
    run.output_dir.mkdir(parents=True)
    metrics = {"step": 100000, "prior_loss": 0.123456789, "policy_loss": 1.23456789, "value_mean": -123.456789}
    for file, row in (("metrics.csv", metrics), ("evaluations.csv", {"step": 100000, **evaluation})):
        text = ",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n"
        (run.output_dir / file).write_text(text)


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_of_a_sweep_fits_the_terminal_and_loses_nothing_without_saying_so(
    write, tmp_path, monkeypatch, capsys, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    grid = "[grid]\nseed = [0, 1]\ninverse_temperature = [1, 3]\nhidden_dims = [[512, 512, 512, 512]]\n"
    runs = read_sweep(write(f"{grid}[tasks.antmaze-large-task1]\ndata = 'a'\n"), tmp_path / "runs")
    for run in runs:
        rows_of(run, return_mean=-1234.56789, return_std=123.456, success=0.987, length_mean=200, length_std=3)
    _show_table([Outcome(run, "finished") for run in runs])
    out, err = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= width
    whole = " ".join(out.split())
    assert "All runs: task=antmaze-large-task1, hidden_dims=512x512x512x512" in whole
    for run in runs:  # every part of every name, whole
        for part in run.name.split(","):
            assert part in whole
    assert out.count("-1235 ± 1.2e+02") == len(runs)
    shown = {name for name in ("value", "prior", "policy") if name in out}
    assert {"value", "prior", "policy"} - shown == {name for name in ("value", "prior", "policy") if name in err}
    assert (width == 200) == ("No room for" not in err)


def test_a_run_without_numbers_has_its_state_in_the_table(write, tmp_path, capsys):
    runs = read_sweep(write("[grid]\nseed = [0, 1]\n[tasks.a]\ndata = 'a'\n"), tmp_path / "runs")
    _show_table([Outcome(runs[0], "failed"), Outcome(runs[1], "not started")])
    out = capsys.readouterr().out
    assert "failed" in out
    assert "not started" in out


def test_a_task_may_say_how_its_environment_is_made(write):
    path = write("""
        [tasks.a]
        data = "a"
        env_kwargs = {g = 2}
        max_episode_steps = 50
        import = ["one", "two"]
    """)
    (run,) = read_sweep(path, "runs/first")
    expected = ("train", "me-am", "--data", "a", "--env-kwargs", '{"g": 2}', "--max-episode-steps", "50")
    assert run.arguments[:11] == (*expected, "--import", "one", "two")
