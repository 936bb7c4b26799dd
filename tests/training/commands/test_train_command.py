import dataclasses
import json
import os
import re
import shlex
import sys
import sysconfig
import warnings
from io import StringIO
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from meam_export.commands.export import ExportArguments
from meam_policy import console
from meam_policy.cli import run as meam
from meam_policy.commands import parse
from meam_policy.errors import ConfigError
from meam_training.commands import train as train_command
from meam_training.commands import train_run
from meam_training.commands.train_run import _Progress
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.compiler import missing_for_compiling
from meam_training.learning.update_cost import RunStart, UpdateCost
from meam_training.runs import watch
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.run_report import opening, summary
from meam_training.trainer import EVALUATION_SECONDS, train

TINY = (
    "--hidden-dims 8 --critic-hidden-dims 8 --num-critics 2 --batch-size 16 --nfe 2 "
    "--chunk-size 2 --device cpu --log-every 1 --learning-rate 0.002"
)


@pytest.fixture
def data(tmp_path):
    """A file in OGBench's form, with rewards of its own."""
    generator, rows = np.random.default_rng(0), 60
    ends = (np.arange(rows) % 20 == 19).astype(np.float32)
    np.savez(
        tmp_path / "walk.npz",
        observations=generator.normal(size=(rows, 3)).astype(np.float32),
        next_observations=generator.normal(size=(rows, 3)).astype(np.float32),
        actions=generator.uniform(-1, 1, size=(rows, 2)).astype(np.float32),
        rewards=generator.normal(size=rows).astype(np.float32),
        terminals=ends,
        masks=1 - ends,
    )
    return tmp_path / "walk.npz"


@pytest.fixture
def begun(data, tmp_path, monkeypatch):
    """A run of three updates, begun from the folder of its data."""
    monkeypatch.chdir(tmp_path)
    assert meam(["train", "qam", "--data", data.name, "--output-dir", "run", "--steps", "3", *TINY.split()]) == 0
    return tmp_path / "run"


def test_a_run_is_resumed_without_repeating_its_data_and_settings(begun, monkeypatch, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert meam(["train", "--resume", "--output-dir", str(begun), "--steps", "5", "--json"]) == 0
    last = Checkpoint.load(begun)
    assert json.loads(capsys.readouterr().out) == {"checkpoint": str(last.path), "step": 5}
    assert (last.step, last.config.method, last.config.learning_rate) == (5, "qam", 0.002)
    assert json.loads((begun / "config.json").read_text())["steps"] == 5


@pytest.mark.parametrize(("flags", "bound"), [("--clip-actions", 1), ("--action-low -2 --action-high 2 2", 2)])
def test_bounds_of_the_actions_are_given_once_and_kept_by_a_resumed_run(data, tmp_path, capsys, flags, bound):
    arrays = dict(np.load(data))
    np.savez(data, **{**arrays, "actions": 1.5 * arrays["actions"]})
    arguments = ["train", "bc", "--data", str(data), "--output-dir", str(tmp_path / "run"), "--steps", "2"]
    arguments += TINY.replace("--critic-hidden-dims 8 --num-critics 2 ", "").split()
    assert meam(arguments) == 2
    assert "--clip-actions" in capsys.readouterr().err.replace("\n", "")
    assert meam([*arguments, *flags.split()]) == 0
    assert meam(["train", "--resume", "--output-dir", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert Checkpoint.load(tmp_path / "run").spec.action.high == (bound, bound)


@pytest.mark.parametrize("form", [["--output-dir={}"], ["--output_dir", "{}"]])
def test_the_folder_is_found_however_it_is_written(begun, form):
    arguments = [part.format(begun) for part in form]
    assert meam(["train", "qam", *arguments, "--resume", "--steps", "4"]) == 0
    assert Checkpoint.load(begun).step == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "32"], "other settings: --batch-size: 16 there, 32 now."),
        (["--seed", "1"], "other settings: --seed: 0 there, 1 now."),
    ],
)
def test_a_resumed_run_refuses_other_settings(begun, capsys, arguments, message):
    assert meam(["train", "--resume", "--output-dir", str(begun), "--steps", "5", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert Checkpoint.load(begun).step == 3


def test_a_resumed_run_refuses_another_preset(begun, capsys):
    assert meam(["train", "me-am", "--resume", "--output-dir", str(begun), "--steps", "5", *TINY.split()]) == 2
    assert "preset: 'qam' there, 'me-am' now" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_is_resumed_too(begun):
    os.rename(begun / "checkpoints", begun.parent / "gone")
    assert meam(["train", "--resume", "--output-dir", str(begun)]) == 0
    assert Checkpoint.load(begun).config == Checkpoint.load(begun.parent / "gone" / "step_00000003").config


def test_broken_settings_are_named_with_the_way_out(begun, capsys):
    (begun / "config.json").write_text("{")
    assert meam(["train", "--resume", "--output-dir", str(begun), "--steps", "5"]) == 2
    assert "config.json is broken" in capsys.readouterr().err
    (begun / "config.json").unlink()
    assert meam(["train", "--resume", "--output-dir", str(begun), "--steps", "5"]) == 0


def test_a_run_file_of_something_else_is_refused(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"meam_run": 99}')
    assert (
        meam(["train", "--data", str(data), "--output-dir", str(tmp_path / "run"), "--steps", "3", *TINY.split()]) == 2
    )
    assert "run.json is not that of a training run" in capsys.readouterr().err


@pytest.mark.parametrize("form", [["--data", "{}"], ["--data={}"]])
def test_a_folder_without_a_run_begins_one_with_the_data_however_they_are_written(data, tmp_path, form):
    new = ["train", "--resume", "--output-dir", str(tmp_path / "new"), "--steps", "2", *TINY.split()]
    assert meam([*new, *(part.format(data) for part in form)]) == 0
    assert Checkpoint.load(tmp_path / "new").step == 2


def test_a_run_begun_in_python_says_how_to_resume(data, tmp_path, capsys):
    folder = tmp_path / "run"
    config = TrainConfig(steps=2, batch_size=16, hidden_dims=(8,), critic_hidden_dims=(8,), device="cpu", nfe=2)
    train(config, OfflineDataset.from_ogbench(str(data)), folder)
    resume = ["train", "--resume", "--output-dir", str(folder), "--steps", "3"]
    assert meam(resume) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "was begun in Python" in message
    assert "train(..., resume=True), or give its --data" in message
    assert meam([*resume, f"--data={data}"]) == 0
    assert Checkpoint.load(folder).step == 3


def test_a_flag_without_effect_is_refused_at_its_default_too(data, tmp_path, capsys):
    new = ["train", "--data", str(data), "--output-dir", str(tmp_path / "run")]
    for typed in ("--kl-budget 1 --inverse-temperature 1", "--inverse-temperature=1.0 --kl-budget=1"):
        assert meam([*new, *typed.split()]) == 2
        assert "--inverse-temperature is 1.0, but has no effect with --kl-budget 1.0" in capsys.readouterr().err
    assert meam([*new, "--no-adaptive-mixture"]) == 2
    assert "--adaptive-mixture is False, but has no effect with --mixture-weight 0.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_flag_without_effect_is_refused(data, tmp_path, capsys):
    assert meam(["train", "--data", str(data), "--output-dir", str(tmp_path / "run"), "--sde-steps", "5"]) == 2
    assert (
        "--sde-steps is 5, but has no effect with --objective two_scale; leave it out, or set --objective to adjoint."
    ) in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def parsed(*flags):
    return train_command._parse(["me-am", "--data", "d", "--output-dir", "nowhere", *flags], "meam train").config


@pytest.mark.parametrize("form", [["--inverse-temperature", "{}"], ["--inverse-temperature={}"]])
@pytest.mark.parametrize("value", ["3", "1.0"])
def test_a_temperature_that_is_given_stays_even_where_it_is_the_default(form, value):
    config = parsed(*(part.format(value) for part in form))
    assert (config.kl_budget, config.inverse_temperature) == (None, float(value))
    assert parsed().kl_budget == parsed("--kl-budget", "1.0").kl_budget == 1


@pytest.mark.parametrize("budget", ["1.0", "0.5"])
def test_a_temperature_beside_a_budget_is_refused(budget):
    with pytest.raises(ConfigError, match=rf"inverse_temperature is 3\.0, but has no effect with kl_budget={budget}"):
        parsed("--inverse-temperature", "3", "--kl-budget", budget)


def test_the_longer_run_that_resumes_keeps_its_pretraining(data, tmp_path):
    small = ["--hidden-dims", "4", "--critic-hidden-dims", "4", "--num-critics", "1", "--batch-size", "8"]
    folder = ["--output-dir", str(tmp_path / "run")]
    assert meam(["train", "me-am", "--data", str(data), *folder, *small, "--steps", "4", "--device", "cpu"]) == 0
    assert Checkpoint.load(tmp_path / "run").config.pretrain_steps == 2
    assert meam(["train", "--resume", *folder, "--steps", "10"]) == 0
    last = Checkpoint.load(tmp_path / "run")
    assert (last.step, last.config.steps, last.config.pretrain_steps) == (10, 10, 2)


def test_a_resumed_run_drops_what_loses_its_effect_by_what_is_given(begun):
    resume = ["train", "--resume", "--output-dir", str(begun)]
    assert meam([*resume, "--steps", "4", "--evaluate-every", "2", "--evaluate-episodes", "3"]) == 0
    assert Checkpoint.load(begun).config.evaluate_episodes == 3
    assert meam([*resume, "--steps", "5", "--evaluate-every", "0"]) == 0
    last = Checkpoint.load(begun).config
    assert (last.evaluate_every, last.evaluate_episodes) == (0, 20)


def test_commands_to_resume_can_be_pasted_whatever_the_folder_is_called(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new = ["train", "qam", "--data", str(data), "--output-dir", "it's a run", "--steps", "3", *TINY.split()]
    assert meam(new) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Export with: ")]
    assert shlex.split(line.removeprefix("Export with: "))[:3] == ["meam", "export", "it's a run"]


def test_an_interrupted_run_says_how_to_resume_once_it_has_begun(begun, data, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **others):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_run, "train", interrupt)
    monkeypatch.chdir(tmp_path)
    os.rename(begun, tmp_path / "it's a run")
    capsys.readouterr()
    assert meam(["train", "--resume", "--output-dir", "it's a run"]) == 130
    kept = Checkpoint.latest(Path("it's a run"))
    assert kept is not None
    said, _, line = capsys.readouterr().err.splitlines()[0].partition("Resume with: ")
    assert said == f"Stopped after update {kept.step}, which is kept. "
    assert train_command._parse(shlex.split(line)[2:], "meam train").output_dir == Path("it's a run")
    assert shlex.split(line) == ["meam", "train", "--resume", "--output-dir", "it's a run"]
    assert meam(["train", "--data", str(data), "--output-dir", "new"]) == 130
    assert "Resume with" not in capsys.readouterr().err


def test_the_help_lists_every_setting_as_a_flat_flag_with_its_choices(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        meam(["train", "--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        if field.name == "method":  # chosen by the preset
            continue
        assert f"--{field.name.replace('_', '-')}" in out
    assert "--objective {two_scale,reweighted,adjoint,bridge,target_score}" in out
    assert "--sde-steps {None}|INT" in out
    assert "Range(" not in out


# Progress


def test_the_note_has_the_numbers_that_matter():
    progress = _Progress(TrainConfig())
    row = {"prior_loss": 0.5, "critic_loss": 1.25, "gradient_norm": 2.0, "value_mean": -3.0, "updates_per_second": 60.0}
    assert progress.note(row) == "60 updates/s, critic loss 1.25, prior loss 0.5, value -3, gradient 2"
    progress.evaluated(40, {"return_mean": 12.5, "success": 1.0, EVALUATION_SECONDS: 2.0})
    assert progress.note(row).endswith(", gradient 2, return 12.5 at 40")
    progress.evaluated(50, {"action_difference": 0.25, EVALUATION_SECONDS: 2.0})
    assert progress.note(row).endswith(", gradient 2, action difference 0.25 at 50")


def test_the_time_left_is_that_of_both_kinds_of_updates_and_of_evaluations():
    progress = _Progress(TrainConfig(steps=1000, pretrain_steps=600, evaluate_every=500))
    assert progress.left(100, {"updates_per_second": 100.0}) is None  # how slow the later updates are is not known
    progress.cost = UpdateCost(pretraining=0.01, joint=0.1)
    assert progress.left(200, {"updates_per_second": 100.0}) == pytest.approx(400 / 100 + 400 * 0.1)
    progress.evaluated(500, {"return_mean": 1.0, EVALUATION_SECONDS: 7.0})
    assert progress.left(600, {"updates_per_second": 100.0}) == pytest.approx(400 * 0.1 + 7)
    assert progress.left(800, {"updates_per_second": 5.0}) == pytest.approx(200 / ((10 + 5) / 2) + 7)
    assert progress.left(1000, {"updates_per_second": 5.0}) == 0


def test_the_time_left_of_a_compiled_run_is_known_once_both_kinds_of_updates_have_been():
    progress = _Progress(TrainConfig(steps=1000, pretrain_steps=600, compile=True))
    assert progress.left(600, {"updates_per_second": 100.0}) is None
    assert progress.left(700, {"updates_per_second": 50.0}) == pytest.approx(300 / 50)


def test_a_run_says_what_it_is_before_it_starts_and_what_came_of_it(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    new = ["train", "me-am", "--data", str(data), "--output-dir", str(tmp_path / "run"), "--steps", "3"]
    assert meam([*new, "--candidates", "4", *TINY.split()]) == 0
    lines = capsys.readouterr().err.splitlines()
    facts = [line for line in lines if not line.startswith(("Training", "Trained", "Export with"))]
    assert max(map(len, facts)) <= 80
    said = " ".join(" ".join(facts).split())
    assert "method me-am with --steps 3" in said
    assert "--learning-rate 0.002" in said
    assert " transitions in 3 episodes, observations of 3 numbers, actions of 2" in said
    assert "device cpu" in said
    for part in ("critic", "prior", "policy", "data", "optimiser"):
        assert re.search(rf"{part} \d+%", said)
    started = next(number for number, line in enumerate(lines) if line.startswith("Training"))
    assert lines.index(next(line for line in lines if line.startswith("method"))) < started
    assert lines.index(next(line for line in lines if line.startswith("updates"))) > started
    assert "3 of 3" in said


def unended(data, truncations, rewards):
    """The data, without a termination."""
    arrays = dict(np.load(data))
    observations, actions, after = (arrays[name] for name in ("observations", "actions", "next_observations"))
    return OfflineDataset.from_arrays(observations, actions, rewards, after, np.zeros(60), truncations)


def test_equal_rewards_are_said_before_the_run_and_not_to_imitation(data, make_config, tmp_path):
    dataset = unended(data, np.arange(60) == 19, np.full(60, -0.0))
    start = RunStart(torch.device("cpu"), threads=2, processes=1, resident=True, step=0, cost=None)
    [said] = opening(make_config(), dataset, start)["check"]
    assert said.startswith("Every reward in the data is 0: no action is better than another")
    assert "imitate: preset bc needs none" in said
    assert "check" not in opening(make_config("bc"), dataset, start)
    with pytest.warns(RuntimeWarning, match='nothing to improve on.*method="bc" needs none'):
        train(make_config(steps=2), dataset, tmp_path / "me-am")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_config("bc", steps=2), dataset, tmp_path / "bc")


def test_data_without_an_end_are_one_episode_and_say_what_that_means(data, make_config):
    start = RunStart(torch.device("cpu"), threads=2, processes=1, resident=True, step=0, cost=None)
    facts = opening(make_config(), unended(data, np.zeros(60), np.arange(60)), start)
    assert "60 transitions in 1 episode, " in facts["data"]
    [said] = facts["check"]
    assert "No episode ends in the data" in said
    assert "as --discount weighs them" in said


def test_critics_that_cannot_be_compared_with_returns_say_why_and_what_they_agree_with():
    judged = {"td_bias": -0.2, "td_reward": 1.0, "calibration_tail": 0.82, "value_gain": 0.1, "policy_value": 36.0}
    facts = summary(TrainConfig(steps=10), [{"step": 10, "critic_loss": 0.1, **judged}], [])
    assert facts["returns"] == (
        "not compared, as 82% of a return is not recorded: episodes are short for the discount; targets differ from "
        "values by -20% of a chunk's reward"
    )


def test_a_compiled_run_says_that_it_compiles_and_what_uncompiled_updates_cost(dataset):
    cost = UpdateCost(pretraining=0.01, joint=0.1)
    start = RunStart(torch.device("cpu"), threads=2, processes=1, resident=True, step=0, cost=cost)
    facts = opening(TrainConfig(compile=True, steps=100, pretrain_steps=10), dataset, start)
    said = "takes up to a minute or two before the first update, and again where pretraining ends"
    assert facts["compiling"].startswith(said)
    assert "--no-compile" in facts["compiling"]
    assert facts["time"].startswith("about 9 s; this is that of uncompiled updates")
    assert facts["device"] == "cpu, 2 threads"
    lacks = opening(TrainConfig(steps=100, pretrain_steps=10), dataset, start, "g++ is missing")
    assert lacks["compiling"] == "not here, so that updates take up to three times as long: g++ is missing"


@pytest.mark.parametrize(
    ("given", "compiled"),
    [
        (["--steps", "10000"], True),
        (["--steps", "9999"], False),
        (["--steps", "8000", "--online-steps", "2000"], True),
        (["--steps", "10000", "--no-compile"], False),
        (["--steps", "100", "--compile"], True),
    ],
)
def test_a_long_run_is_compiled_unless_told_otherwise(data, tmp_path, monkeypatch, given, compiled):
    seen = []

    def train(config, *args, **options):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_run, "train", train)
    monkeypatch.setattr(train_run, "missing_for_compiling", lambda device: None)
    command = ["train", "me-am", "--data", str(data), "--output-dir", str(tmp_path / "run"), *given]
    assert meam(command) == 130
    assert seen[0].compile == compiled
    monkeypatch.setattr(train_run, "missing_for_compiling", lambda device: "g++ is missing")
    assert meam(command) == 130
    assert seen[1].compile == ("--compile" in given)  # what is asked for is tried, and then says why it cannot be
    assert meam(["train", "bc", *command[2:]]) == 130
    assert seen[2].compile == ("--compile" in given)


def test_what_is_missing_for_compiling_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cpu = torch.device("cpu")
    assert missing_for_compiling(cpu) == "g++ and clang++ are missing; on Debian: apt install g++"
    monkeypatch.setenv("CXX", "c++20")
    assert missing_for_compiling(cpu) == "c++20 is missing; on Debian: apt install g++"
    (tmp_path / "c++20").touch(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert missing_for_compiling(cpu) == "Python.h is missing; on Debian: apt install python3-dev"
    (tmp_path / "Python.h").touch()
    assert missing_for_compiling(cpu) is None


def test_a_run_says_how_far_its_actions_reach_and_what_was_clipped(make_config):
    generator = np.random.default_rng(0)
    actions = generator.uniform(-0.2, 0.2, (60, 2))
    actions[7, 1] = 3
    dataset = OfflineDataset.from_arrays(
        generator.normal(size=(60, 3)),
        actions,
        generator.normal(size=60),
        generator.normal(size=(60, 3)),
        np.zeros(60),
        np.arange(60) % 20 == 19,
        clip_actions=True,
    )
    start = RunStart(torch.device("cpu"), threads=2, processes=1, resident=True, step=0, cost=None, reach=0.24)
    facts = opening(make_config(compile=True), dataset, start)
    assert facts["clipped"].startswith("actions of 1 row (1.7%) by up to 2 (number 1) to the box when read")
    assert facts["reach"].startswith("actions reach 0.24 of the box, the data's range and a tenth on either side")
    assert "exploring online" not in facts["reach"]
    online = opening(make_config(compile=True, online_steps=5), dataset, start)
    assert "no farther, exploring online too (all of it: --action-scaling box)" in online["reach"]
    whole = RunStart(torch.device("cpu"), threads=2, processes=1, resident=True, step=0, cost=None)
    assert "reach" not in opening(make_config(compile=True), dataset, whole)


def test_what_a_run_says_changes_nothing_of_it(data, tmp_path, capsys):
    """Neither the updates timed before it, nor the comparison of its critics with the data."""
    new = ["train", "me-am", "--data", str(data), "--steps", "4", "--candidates", "4", *TINY.split()]
    assert meam([*new, "--output-dir", str(tmp_path / "told")]) == 0
    assert meam([*new, "--output-dir", str(tmp_path / "untold"), "--json", "--checkpoint-every", "1"]) == 0
    files = [Checkpoint.load(tmp_path / name).path / "model.safetensors" for name in ("told", "untold")]
    told, untold = map(load_file, files)
    assert [name for name in told if not torch.equal(told[name], untold[name])] == []


def test_a_warning_is_said_when_it_is_found_and_repeated_at_the_end_and_by_info(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(watch, "LEAST_UPDATES_AT_END", 1)
    new = ["train", "me-am", "--data", str(data), "--output-dir", str(tmp_path / "run"), "--steps", "4"]
    # Critics in units of the returns would begin so far from them that what tau does is not judged yet.
    idle = ["--inverse-temperature", "1e-6", "--entropy-coef", "0", "--no-normalise-values"]
    assert meam([*new, "--candidates", "4", *idle, *TINY.split()]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "Warning at 4: tau does nothing: " in said
    assert "warning at 4, tau does nothing: " in said
    assert "Raise --inverse-temperature, now 1e-06, or set --kl-budget." in said
    assert meam(["info", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "tau does nothing" in " ".join(out.split())
    assert "meam export" in out
    assert meam(["info", str(tmp_path / "run"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["step"], shown["settings"]["steps"], shown["metrics"]["step"]) == (4, 4, 4)
    assert ["tau does nothing" in each["warning"] for each in shown["warnings"]] == [True]


def test_warnings_are_pythons_own_where_no_one_else_takes_them(dataset, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "LEAST_UPDATES_AT_END", 1)
    config = make_config(steps=4, inverse_temperature=1e-6, entropy_coef=0.0)
    remedy = "Raise inverse_temperature, now 1e-06, or set kl_budget"
    with pytest.warns(RuntimeWarning, match=f"tau does nothing: .* {remedy}"):
        train(config, dataset, tmp_path, value=lambda observations, actions: actions.sum(dim=-1))


def test_info_of_an_unfinished_run_says_how_to_go_on(begun, capsys):
    settings = json.loads((begun / "config.json").read_text())
    (begun / "config.json").write_text(json.dumps({**settings, "steps": 9}))
    capsys.readouterr()
    assert meam(["info", "run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "3 of 9" in out
    assert "meam train --resume --output-dir run" in out


def test_where_there_is_no_terminal_progress_is_ten_lines_of_what_is_done_now(capsys):
    with console.progress_bar("Training", 1000, done=700) as advance:
        for step in range(701, 1001):
            advance(step, f"note {step}")
    assert capsys.readouterr().err.splitlines() == [
        f"Training: {step} of 1000, note {step}" for step in (800, 900, 1000)
    ]


def test_in_a_terminal_the_note_has_a_line_of_its_own(monkeypatch):
    out = StringIO()
    monkeypatch.setattr(console, "Console", lambda **_: Console(file=out, force_terminal=True, width=80))
    with console.progress_bar("Training", 10) as advance:
        advance(10, "60 updates/s")
    lines = out.getvalue().splitlines()
    assert any("10/10" in line and "updates/s" not in line for line in lines)
    assert any("60 updates/s" in line and "10/10" not in line for line in lines)


def test_resuming_where_there_is_no_run_says_so(tmp_path, capsys):
    assert meam(["train", "--resume", "--output-dir", str(tmp_path / "typo")]) == 2
    assert "typo holds no run to resume" in capsys.readouterr().err


def test_the_method_is_chosen_by_the_preset_alone(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        meam(["train", "--help"])
    assert "--method" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        meam(["train", "--method", "qam", "--data", str(data), "--output-dir", str(tmp_path / "run"), *TINY.split()])
    assert caught.value.code == 2
    assert "--method" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_setting_that_the_preset_fixes_is_refused_with_the_way_out(data, tmp_path, capsys):
    arguments = ["--data", str(data), "--output-dir", str(tmp_path / "run"), "--entropy-coef", "0.1"]
    assert meam(["train", "qam", *arguments]) == 2
    assert "the preset qam fixes it at 0.0. Leave it out, or take me-am." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "", "--output-dir", "run"], "the text after --data is empty"),
        (["--data", "", "--output-dir", "run", "--resume"], "the text after --data is empty"),
        (["--data", "walk.npz", "--output-dir", ""], "the text after --output-dir is empty"),
        (["--data", "walk.npz", "--output-dir=", "--resume"], "the text after --output-dir is empty"),
        (["", "--data", "walk.npz", "--output-dir", "run"], "argument 1 is empty"),
        (["--data", "None", "--output-dir", "run"], "--data is None; expected a Minari id"),
    ],
)
def test_data_and_folders_without_a_name_are_refused_by_their_flag(
    data, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert meam(["train", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


@pytest.mark.parametrize(
    "arguments", [["collect", "--root", ""], ["collect", "--dataset-id", ""], ["sweep", ""]], ids=" ".join
)
def test_other_commands_refuse_empty_text_too(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert meam(arguments) == 2
    assert "is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_empty_output_folder_is_refused_in_python_too(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="output_dir is ''; expected the path of a folder"):
        train(TrainConfig(), OfflineDataset.from_ogbench(str(data)), "")
    assert not (tmp_path / "run.json").exists()


def test_the_printed_exports_of_the_last_and_of_the_best_checkpoint_are_whole_commands(begun, capsys):
    state = begun / "checkpoints" / "step_00000003" / "trainer.json"
    (state.parent / "hashes.json").unlink()
    state.write_text(json.dumps({**json.loads(state.read_text()), "score": 7.0}))
    os.rename(begun, begun.parent / "it's a run")
    capsys.readouterr()
    assert meam(["train", "--resume", "--output-dir", "it's a run", "--steps", "5"]) == 0
    printed = [line.partition("meam export ")[2] for line in capsys.readouterr().err.splitlines()]
    exports = [parse(ExportArguments, shlex.split(line), "meam export") for line in printed if line]
    assert [str(export.checkpoint) for export in exports] == ["it's a run", "it's a run/checkpoints/best"]
    assert len({export.output_dir for export in exports}) == 2
    assert [Checkpoint.load(export.checkpoint).step for export in exports] == [5, 3]


def test_packages_are_imported_first_and_again_when_the_run_is_resumed(data, tmp_path, monkeypatch):
    (tmp_path / "robots_of_a_run.py").write_text(
        "import pathlib\nwith pathlib.Path(__file__).with_name('seen').open('a') as file:\n    file.write('x')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    output = str(tmp_path / "run")
    meam(
        [
            "train",
            "qam",
            "--data",
            str(data),
            "--output-dir",
            output,
            "--steps",
            "2",
            *TINY.split(),
            "--import",
            "robots_of_a_run",
        ]
    )
    monkeypatch.delitem(sys.modules, "robots_of_a_run")
    meam(["train", "--resume", "--output-dir", output, "--steps", "3"])
    assert (tmp_path / "seen").read_text() == "xx"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--env-id", "Pendulm-v1"], 'There is no environment "Pendulm-v1"'),
        (["--env-id", "CartPole-v1"], "has shape (4,)"),
        (["--env-id", "Pendulum-v1", "--env-kwargs", '{"gee": 2}'], "cannot be made with these arguments: gee=2"),
    ],
)
def test_an_environment_that_is_typed_is_made_before_anything_is_written(make_minari, tmp_path, capsys, typed, message):
    generator = np.random.default_rng(0)
    boxes = [gymnasium.spaces.Box(-size, size, (dim,), np.float32) for dim, size in ((3, 8.0), (1, 2.0))]
    episode = {
        "id": 0,
        "observations": generator.uniform(-1, 1, (11, 3)).astype(np.float32),
        "actions": generator.uniform(-1, 1, (10, 1)).astype(np.float32),
        "rewards": np.zeros(10),
        "terminations": np.zeros(10, bool),
        "truncations": np.arange(10) == 9,
        "infos": {},
    }
    folder = make_minari(tmp_path / "data", "tests/swing-v0", [episode], *boxes).parent
    run = tmp_path / "run"
    assert meam(["train", "bc", "--data", str(folder), "--output-dir", str(run), *TINY.split()[:2], *typed]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not run.exists()
