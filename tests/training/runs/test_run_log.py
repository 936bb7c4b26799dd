import csv
import importlib
import json
import logging
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch

from meam_policy.errors import MissingExtraError, OutputError
from meam_training.learning.evaluation import EVALUATION_METRICS
from meam_training.runs.run_folder import UPDATE_COLUMNS, Run, RunRecord
from meam_training.runs.run_log import RunLog, SilentLog
from meam_training.trainer import train


def rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def metrics(norm, **others):
    return {name: torch.tensor(value) for name, value in {"gradient_norm": norm, **others}.items()}


@pytest.fixture
def open_log(make_config, tmp_path):
    columns = UPDATE_COLUMNS, EVALUATION_METRICS
    return lambda step=0, **settings: RunLog(tmp_path, make_config(**settings), step, "run", *columns)


# CSV


def test_a_row_distinguishes_any_two_float32_numbers(open_log, tmp_path):
    values = [1 / 3, 1.0000001, 3e-41, 2.5e38, -16777217.0]
    with open_log() as log:
        for step, value in enumerate(values, 1):
            log.add(metrics(value))
            log.write(step)
    read = torch.tensor([float(row["gradient_norm"]) for row in rows(tmp_path / "metrics.csv")])
    assert torch.equal(read, torch.tensor(values))


def test_what_is_returned_is_what_is_written(open_log, tmp_path):
    with open_log() as log:
        log.add(metrics(0.1, prior_loss=0.7))
        row = log.write(3)
        evaluation = log.write_evaluation(3, {"return_mean": 1 / 3})
    (written,) = rows(tmp_path / "metrics.csv")
    assert {name: float(value) for name, value in written.items() if value} == {"step": 3, **row}
    (written,) = rows(tmp_path / "evaluations.csv")
    assert {name: float(value) for name, value in written.items() if value} == {"step": 3, **evaluation}


def test_a_resumed_log_drops_the_rows_of_later_steps(open_log, tmp_path):
    with open_log() as log:
        for step in range(1, 7):
            log.add(metrics(float(step)))
            log.write(step)
            log.write_evaluation(step, {"return_mean": float(step)})
    open_log(4)
    for name in ("metrics.csv", "evaluations.csv"):
        assert [int(row["step"]) for row in rows(tmp_path / name)] == [1, 2, 3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluations.csv", "metrics.csv"]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_row_that_was_cut_short_is_dropped(open_log, tmp_path, cut):
    with open_log() as log:
        for step in (10, 20):
            log.add(metrics(float(step)))
            log.write(step)
    text = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(text[:-cut])
    open_log(20)
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv")] == [10]


def test_a_log_of_fewer_columns_goes_on_with_all(open_log, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,gradient_norm,prior_loss\n1,2.5,0.5\n")
    with open_log(1) as log:
        log.add(metrics(3.5))
        log.write(2)
    one, two = rows(tmp_path / "metrics.csv")
    assert (one["gradient_norm"], one["prior_loss"], one["critic_loss"]) == ("2.5", "0.5", "")
    assert (two["gradient_norm"], two["prior_loss"]) == ("3.5", "")


def test_time_in_a_pause_does_not_count_in_the_updates_per_second(make_config, tmp_path):
    now = 100.0
    with RunLog(tmp_path, make_config(), 0, "run", ("gradient_norm",), (), clock=lambda: now) as log:
        for updates, worked, paused in ((1, 0.25, 0.5), (6, 1.5, 64.0)):
            for _ in range(updates):
                log.add(metrics(1.0))
            now += worked
            with log.paused():
                now += paused
            assert log.write(updates)["updates_per_second"] == 4


def test_a_full_disk_is_named_and_spares_the_rows_before(open_log, tmp_path, make_config, dataset):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log() as log:
        log.add(metrics(1.0))
        log.write(1)
        size = (tmp_path / "metrics.csv").stat().st_size
        log.add(metrics(1.0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3, before[1]))
        try:
            with pytest.raises(OutputError, match=r"log in .* cannot be written: File too large\. The checkpoints are"):
                log.write(2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    open_log(2)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1"]


def test_what_is_logged_of_a_run_has_a_column(dataset, make_config, tmp_path):
    seen = []
    config = make_config("qam-edit", steps=2, evaluate_every=1, distill_coef=1.0)
    train(config, dataset, tmp_path, on_progress=lambda *args: seen.append(args))
    for (step, logged), row in zip(seen, rows(tmp_path / "metrics.csv"), strict=True):
        assert {name: float(value) for name, value in row.items() if value} == {"step": step, **logged}
        assert "gradient_norm" in logged


def test_the_columns_of_a_log_are_those_it_is_given(make_config, tmp_path):
    with RunLog(tmp_path, make_config(), 0, "run", ("gradient_norm", "warmth"), ("applause",)) as log:
        log.add(metrics(1.0, warmth=0.5, hidden=2.0))
        log.write(1)
        log.write_evaluation(1, {"applause": 3.0})
    ((metric,), (evaluation,)) = (rows(tmp_path / name) for name in ("metrics.csv", "evaluations.csv"))
    assert list(metric) == ["step", "gradient_norm", "warmth", "updates_per_second"]
    assert metric["warmth"] == "0.5"
    assert evaluation == {"step": "1", "applause": "3"}


def test_a_process_that_only_follows_makes_up_for_no_evaluation(dataset, make_config, tmp_path):
    config = make_config(steps=2, evaluate_every=1)
    last = train(config, dataset, tmp_path)
    run = Run(tmp_path, config, last.spec, last.data, SilentLog(), last, None, writes=False)
    assert run.is_due(run.step)
    assert not run.lacks_evaluation()


# TensorBoard


def tensorboard_scalars(folder):
    """Every scalar of a TensorBoard folder by name, as (step, value), with what a crash left hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()
    assert tags["tensors"] == []
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in tags["scalars"]}


def tensorboard_page(folder):
    """What TensorBoard's own pages show, which turn scalars into tensors as they read them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        name: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in accumulator.Tensors(name)]
        for name in accumulator.Tags()["tensors"]
    }


def csv_scalars(folder):
    """The numbers of the CSV files, in float32."""
    found = {}
    for group, file in (("train", "metrics.csv"), ("evaluation", "evaluations.csv")):
        for row in rows(folder / file):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    found.setdefault(f"{group}/{name}", []).append((step, float(np.float32(value))))
    return found


def test_tensorboard_shows_exactly_the_numbers_of_the_csv_files(dataset, make_config, tmp_path):
    train(make_config(steps=6, evaluate_every=2, loggers=("tensorboard",)), dataset, tmp_path)
    shown = tensorboard_scalars(tmp_path)
    assert {"train/critic_loss", "train/updates_per_second", "evaluation/td_error"} <= shown.keys()
    assert shown == tensorboard_page(tmp_path) == csv_scalars(tmp_path)


@pytest.mark.slow
def test_tensorboard_hides_what_came_after_the_step_from_which_a_run_is_resumed(dataset, make_config, tmp_path):
    def die(step, row):
        if step == 6:
            raise ZeroDivisionError

    config = make_config(steps=8, checkpoint_every=4, evaluate_every=2, loggers=("tensorboard",))
    with pytest.raises(ZeroDivisionError):
        train(config, dataset, tmp_path, on_progress=die)
    train(config, dataset, tmp_path, resume=True)
    shown = tensorboard_scalars(tmp_path)
    assert [step for step, _ in shown["train/prior_loss"]] == list(range(1, 9))
    assert shown == tensorboard_page(tmp_path) == csv_scalars(tmp_path)


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_named_with_the_command(dataset, make_config, tmp_path, monkeypatch, logger):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, logger, None)
    with pytest.raises(
        MissingExtraError, match=rf"needs {logger}, which is not installed: pip install 'meam-policy\[log\]'"
    ):
        train(make_config(loggers=(logger,)), dataset, tmp_path)
    assert train(make_config(steps=2), dataset, tmp_path).step == 2


# Weights & Biases


WANDB = """
import sys
import time
import wandb
from meam_training import TrainConfig
from meam_training.runs.run_log import RunLog
from pathlib import Path
import torch
config = TrainConfig(loggers=("wandb",))
columns = ("prior_loss", "gradient_norm")
with RunLog(Path(sys.argv[1]), config, int(sys.argv[2]), "abc123", columns, ("return_mean",)) as log:
    for step in (1, 2):
        log.add({"gradient_norm": torch.tensor(step / 3), "prior_loss": torch.tensor(0.1)})
        log.write(int(sys.argv[2]) + step)
    log.write_evaluation(int(sys.argv[2]) + 2, {"return_mean": 7.0})
"""


def wandb_records(file):
    """The records of an offline run: LevelDB's log format after a header of seven bytes."""
    data, position, record = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # padding at the end of a block
            position += left
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def wandb_history(file):
    """What an offline run recorded: its id, its settings, and its rows."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    ids, names, history = set(), set(), []
    for data in wandb_records(file):
        record = messages.Record.FromString(data)
        if record.HasField("run"):
            ids.add(record.run.run_id)
            names |= {item.key for item in record.run.config.update}
        if record.HasField("history"):
            items = [(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item]
            history.append({key: json.loads(value) for key, value in items})
    return ids, names, history


@pytest.mark.slow
def test_weights_and_biases_works_offline_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 2):
        ran = subprocess.run(
            [sys.executable, "-c", WANDB, str(tmp_path), str(first)], check=True, capture_output=True, text=True
        )
        assert (ran.stdout, ran.stderr) == ("", "")
        time.sleep(1.1)  # Weights & Biases names its folders by the second
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    logged = rows(tmp_path / "metrics.csv")
    assert len(logged) == 4
    for number, file in enumerate(files):
        ids, names, history = wandb_history(file)
        assert ids == {"abc123"}
        assert {"learning_rate", "method"} <= names
        for row, expected in zip(history, logged[2 * number : 2 * number + 2], strict=True):
            assert row["_step"] == int(expected["step"])
            for name in ("gradient_norm", "prior_loss", "updates_per_second"):
                assert row[f"train/{name}"] == float(expected[name])
        assert history[-1]["evaluation/return_mean"] == 7.0


def test_a_run_keeps_its_id(dataset, make_config, tmp_path):
    train(make_config(steps=2), dataset, tmp_path)
    first = RunRecord.load(tmp_path)
    train(make_config(steps=4), dataset, tmp_path, resume=True)
    assert first is not None
    assert RunRecord.load(tmp_path) == first


# Quiet


def test_training_leaves_the_root_logger_alone_and_prints_nothing(dataset, make_config, tmp_path, capfd):
    root = logging.getLogger()
    before = list(root.handlers), root.level, list(root.filters)
    train(make_config(steps=2, evaluate_every=1, loggers=("tensorboard",)), dataset, tmp_path)
    assert (list(root.handlers), root.level, list(root.filters)) == before
    assert capfd.readouterr() == ("", "")
