import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from meam_policy.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    DeviceError,
    DivergedError,
    LockedError,
    OutputError,
)
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.data.reward_offset import explaining_constant
from meam_training.learning.calibration import CALIBRATION_METRICS
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.learner import clip_gradients
from meam_training.networks.meam_networks import build_networks
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.csv_file import read_rows
from meam_training.runs.run_folder import Run, load_settings
from meam_training.trainer import data_statistics, make_spec, train

ALWAYS = {"checkpoints", "config.json", "metrics.csv", "observations.safetensors", "run.json"}


@pytest.fixture(scope="module")
def make_config(make_config):
    """The usual settings, but every checkpoint is kept, and nothing is pretrained unless a test asks for it."""
    shared = {"keep_checkpoints": 1000, "pretrain_steps": 0}
    return lambda method="me-am", **overrides: make_config(method, shared, **overrides)


def saved(checkpoint):
    """Every tensor of a checkpoint: weights, optimiser, generator."""
    model = load_file(checkpoint.path / "model.safetensors")
    trainer = load_file(checkpoint.path / "trainer.safetensors")
    return model | {f"trainer.{name}": tensor for name, tensor in trainer.items()}


def assert_bit_equal(one, other):
    one, other = saved(one), saved(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def initial_weights(config, dataset):
    spec = make_spec(config, dataset)
    return build_networks(spec, config, data_statistics(config, dataset, spec)).state_dict()


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_speed(folder):
    return [{k: v for k, v in row.items() if k != "updates_per_second"} for row in rows(folder)]


def without_calibration(folder):
    """The rows of updates; the critics are compared with the data at the end, wherever that was before an extension."""
    return [{k: v for k, v in row.items() if k not in CALIBRATION_METRICS} for row in without_speed(folder)]


def left_in(folder):
    return {path.name for path in folder.rglob("*") if path.name not in (".lock",)} - {
        path.name for path in folder.glob("checkpoints/step_*/*")
    }


@pytest.mark.parametrize("constant", [0.0, 5.0])
def test_a_constant_is_taken_off_where_the_horizon_is_fixed_and_values_are_told_with_it(
    make_config, tmp_path, constant
):
    rows, generator = 60, np.random.default_rng(0)
    ends = np.arange(rows) % 6 == 5
    rewards = generator.normal(size=rows) + constant
    columns = (generator.normal(size=(rows, 2)), generator.uniform(-1, 1, (rows, 1)))
    data = OfflineDataset.from_arrays(*columns, rewards, generator.normal(size=(rows, 2)), ends, np.zeros(rows))
    config = make_config(steps=4, pretrain_steps=2, log_every=1)
    begun = train(config, data, tmp_path)
    assert begun.config.reward_offset == pytest.approx(explaining_constant(data, config.discount))
    assert config.reward_offset is None
    row = read_rows(tmp_path / "metrics.csv")[-1]
    returns = data.discounted_returns(config.discount).returns
    # Critics that have hardly learned stand at the mean of the data's returns.
    assert row["value_mean"] == pytest.approx(returns.mean(), abs=1.5 * returns.std())
    assert row["calibration_value"] == pytest.approx(row["calibration_return"], abs=1.5)
    resumed = train(config.changed(steps=5), data, tmp_path, resume=True)
    assert resumed.config.reward_offset == begun.config.reward_offset


def test_the_published_presets_take_no_constant_off(make_config):
    assert not TrainConfig.preset("qam").normalise_values
    assert TrainConfig.from_json("{}").reward_offset == 0  # of earlier versions


def test_a_run_leaves_checkpoints_and_metrics_and_nothing_else(dataset, make_config, tmp_path):
    folder = tmp_path / "new" / "run"
    last = train(make_config(steps=5, checkpoint_every=2), dataset, folder)
    assert last.step == 5
    assert last.path == folder / "checkpoints" / "step_00000005"
    assert left_in(folder) == ALWAYS | {"step_00000002", "step_00000004", "step_00000005"}
    assert json.loads((folder / "config.json").read_text())["checkpoint_every"] == 2


def test_the_seed_decides_the_run(dataset, make_config, tmp_path):
    one, same, other = (
        train(make_config(steps=4, seed=seed), dataset, tmp_path / str(i)) for i, seed in enumerate((1, 1, 2))
    )
    assert_bit_equal(one, same)
    assert not torch.equal(saved(one)["prior.layers.0.weight"], saved(other)["prior.layers.0.weight"])


OBJECTIVES = ["two_scale", "reweighted", "target_score", "adjoint", "bridge"]
PUBLISHED = {"solver": "euler", "confine": False, "joint_clip": True}
PUBLISHED |= {"precondition": False, "normalise_values": False, "pretrain_critics": False, "pad_chunks": False}
PUBLISHED |= {"action_scaling": "box", "observation_limit": None}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_entropy_and_mixture_a_run_of_me_am_is_one_of_qam_bit_for_bit(
    dataset, make_config, tmp_path, objective
):
    common = {"pretrain_steps": 3, "steps": 8, "objective": objective, "learning_rate": 3e-4}
    common |= {"polyak": 0.005}
    scheme = {**PUBLISHED, "sde": "reference"} if objective == "adjoint" else PUBLISHED
    qam = train(make_config("qam", **common), dataset, tmp_path / "qam")
    me_am = train(
        make_config(
            "me-am", entropy_coef=0.0, mixture_weight=0.0, value_penalty=0.0, kl_budget=None, **common, **scheme
        ),
        dataset,
        tmp_path / "me-am",
    )
    assert_bit_equal(qam, me_am)
    assert without_speed(tmp_path / "qam") == without_speed(tmp_path / "me-am")


def test_bc_is_the_prior_that_other_methods_pretrain(dataset, make_config, tmp_path):
    # The objective decides how much noise is drawn: with that of bc, by which nothing is trained, the draws are equal.
    bc = train(make_config("bc", steps=4), dataset, tmp_path / "bc")
    same = ("objective", "candidates", "precondition", "pad_chunks")
    settings = {name: getattr(bc.config, name) for name in same}
    config = make_config("qam", steps=5, pretrain_steps=4, checkpoint_every=4, **settings)
    qam = train(config, dataset, tmp_path / "qam")
    assert {name.split(".")[0] for name in load_file(bc.path / "model.safetensors")} == {"encoder", "prior"}
    assert rows(tmp_path / "bc")[-1]["critic_loss"] == ""
    pretrained = load_file(qam.path.with_name("step_00000004") / "model.safetensors")
    copies = ["policy.", "target_prior.", "target_policy."]
    for name in [name for name in pretrained if name.startswith("prior.")]:
        for copy in copies:
            assert torch.equal(pretrained[name], pretrained[name.replace("prior.", copy, 1)])
        assert torch.equal(pretrained[name], saved(bc)[name])


def test_targets_average_the_weights_that_an_update_began_with(dataset, make_config, tmp_path):
    config = make_config(steps=2, checkpoint_every=1, polyak=0.25)
    second = saved(train(config, dataset, tmp_path))
    first = saved(Checkpoint.load(tmp_path / "checkpoints/step_00000001"))
    initial = initial_weights(config, dataset)
    targets = [name for name in second if name.startswith("target_")]
    assert {name.split(".")[0] for name in targets} == {"target_prior", "target_critic", "target_policy"}
    buffers = {name for name in targets if name.endswith((".offset", ".scale")) or ".preconditioner." in name}
    assert len(buffers) == 6
    for name in buffers:  # known before the first update, and never averaged
        assert torch.equal(second[name], initial[name])
    for name in set(targets) - buffers:
        online = name.removeprefix("target_")
        assert torch.equal(first[name], initial[online])
        torch.testing.assert_close(second[name], 0.75 * initial[online] + 0.25 * first[online], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(first[name], second[name]) for name in targets)


def test_the_first_updates_are_adam_steps_of_the_learning_rate(dataset, make_config, tmp_path):
    config = make_config(steps=1, learning_rate=1e-3)
    after = saved(train(config, dataset, tmp_path))
    initial = initial_weights(config, dataset)
    # Adam's first step is the sign of the gradient times the rate, but for gradients near its epsilon.
    moved = (after["policy.layers.2.bias"] - initial["policy.layers.2.bias"]).abs()
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-2)


@pytest.mark.slow
def test_progress_and_metrics_agree(dataset, make_config, tmp_path):
    seen = []
    train(make_config(steps=7, log_every=3), dataset, tmp_path, on_progress=lambda *args: seen.append(args))
    assert [step for step, _ in seen] == [3, 6, 7]
    logged = rows(tmp_path)
    assert [int(row["step"]) for row in logged] == [3, 6, 7]
    for (_, metrics), row in zip(seen, logged, strict=True):
        assert {name for name, value in row.items() if value} - {"step"} == set(metrics)
        for name, value in metrics.items():
            assert float(row[name]) == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_rows_of_metrics_are_means_over_their_updates(dataset, make_config, tmp_path):
    train(make_config(steps=6, log_every=1), dataset, tmp_path / "each")
    train(make_config(steps=6, log_every=3), dataset, tmp_path / "third")
    each = [float(row["prior_loss"]) for row in rows(tmp_path / "each")]
    third = [float(row["prior_loss"]) for row in rows(tmp_path / "third")]
    assert third == pytest.approx([np.mean(each[:3]), np.mean(each[3:])], rel=1e-5)


# Resuming


@pytest.fixture(scope="module", params=["bc", "me-am"])
def whole(request, dataset, make_config, tmp_path_factory):
    """An uninterrupted run with every checkpoint: its settings, its folder and its end."""
    pretraining = {} if request.param == "bc" else {"pretrain_steps": 4}
    config = make_config(request.param, steps=12, checkpoint_every=1, **pretraining)
    folder = tmp_path_factory.mktemp("whole")
    return config, folder, train(config, dataset, folder)


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 4, 5, 8, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(whole, dataset, tmp_path, at):
    config, folder, end = whole
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)  # with rows of metrics beyond the checkpoint, as after a kill
    for later in range(at + 1, 13):
        shutil.rmtree(cut / "checkpoints" / f"step_{later:08d}")
    resumed = train(config, dataset, cut, resume=True)
    assert resumed.step == end.step == 12
    assert_bit_equal(end, resumed)
    assert without_speed(cut) == without_speed(folder)
    assert [int(row["step"]) for row in rows(cut)] == list(range(1, 13))
    assert left_in(cut) == left_in(folder)


KINDS = {
    "target-score": ("me-am", {"objective": "target_score"}),
    "ancestral": ("me-am", {"objective": "adjoint", "sde": "ancestral", "joint_clip": True}),
    "reference": ("qam", {"distill_coef": 1.0}),
    "edit": ("qam-edit", {"best_of": 2}),
    "mixture": ("me-am", {"adaptive_mixture": True, "mixture_weight": 0.3, "best_of": 3}),
    "reweighted, mirror": ("me-am", {"mirror_stages": 2}),
    "target-score, mirror": ("me-am", {"objective": "target_score", "mirror_stages": 2}),
    "adjoint, mirror": ("me-am", {"objective": "adjoint", "mirror_stages": 2}),
    "budget": ("me-am", {"kl_budget": 0.5, "layer_norm": True}),
    "budget, mirror": ("me-am", {"kl_budget": 0.5, "objective": "adjoint", "mirror_stages": 2}),
    "published budget": ("trqam", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_any_kind_equals_an_uninterrupted_one(dataset, make_config, tmp_path, kind):
    method, settings = KINDS[kind]
    config = make_config(method, steps=9, pretrain_steps=3, checkpoint_every=6, **settings)
    end = train(config, dataset, tmp_path / "whole")
    # The second stage of mirror descent begins with update 7, right after the checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000009")
    assert_bit_equal(end, train(config, dataset, tmp_path / "cut", resume=True))
    assert without_speed(tmp_path / "cut") == without_speed(tmp_path / "whole")


@pytest.mark.slow
def test_a_finished_run_can_be_extended(dataset, make_config, tmp_path):
    whole = train(make_config(steps=10, pretrain_steps=3), dataset, tmp_path / "whole")
    train(make_config(steps=6, pretrain_steps=3), dataset, tmp_path / "cut")
    assert_bit_equal(whole, train(make_config(steps=10, pretrain_steps=3), dataset, tmp_path / "cut", resume=True))
    assert without_calibration(tmp_path / "whole") == without_calibration(tmp_path / "cut")


def test_resuming_where_nothing_was_begins_a_run(dataset, make_config, tmp_path):
    assert train(make_config(steps=2), dataset, tmp_path, resume=True).step == 2


def test_an_existing_run_is_not_overwritten(dataset, make_config, tmp_path):
    last = train(make_config(steps=3), dataset, tmp_path)
    before = saved(last)
    with pytest.raises(OutputError, match="already holds a run of 3 updates. Resume it"):
        train(make_config(steps=3), dataset, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in saved(last).items())
    assert len(rows(tmp_path)) == 3


def test_a_run_begun_when_settings_without_effect_were_accepted_goes_on(dataset, make_config, tmp_path):
    config = make_config(steps=3)
    last = train(config, dataset, tmp_path)
    (last.path / "hashes.json").unlink()
    for file in (tmp_path / "config.json", last.path / "train_config.json"):
        written = json.loads(file.read_text())
        file.write_text(json.dumps({**written, "sde_steps": 5, "offline_share": 0.5, "edit_target_entropy": 3.0}))
    read = load_settings(tmp_path)
    assert read == Checkpoint.load(tmp_path).config == config.resolved()
    assert train(config.changed(steps=5), dataset, tmp_path, resume=True).step == 5


def test_a_run_of_several_stages_keeps_its_number_of_steps(dataset, make_config, tmp_path):
    train(make_config(steps=4, mirror_stages=2), dataset, tmp_path)
    with pytest.raises(CheckpointError, match=r"has other settings: steps: 4 there, 6 now\."):
        train(make_config(steps=6, mirror_stages=2), dataset, tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "value"), [("seed", 7), ("learning_rate", 1e-2), ("hidden_dims", (4,)), ("entropy_coef", 0.2)]
)
def test_resuming_with_other_settings_is_refused(dataset, make_config, tmp_path, field, value):
    config = make_config(steps=3)
    train(config, dataset, tmp_path)
    there = getattr(config.resolved(), field)
    with pytest.raises(CheckpointError, match="has other settings: ") as caught:
        train(make_config(steps=5, **{field: value}), dataset, tmp_path, resume=True)
    assert f"{field}: {there!r} there, {value!r} now" in str(caught.value)
    assert "steps:" not in str(caught.value)


def test_a_resumed_run_keeps_its_pretraining_whatever_its_length(dataset, make_config, tmp_path):
    config = make_config(steps=10, pretrain_steps=None)
    last = train(config, dataset, tmp_path)
    assert last.config.pretrain_steps == 6
    assert rows(tmp_path)[5]["policy_loss"] == ""
    assert rows(tmp_path)[6]["policy_loss"] != ""
    for steps in (12, 20):
        resumed = train(replace(config, steps=steps), dataset, tmp_path, resume=True)
        assert (resumed.step, resumed.config.pretrain_steps) == (steps, 6)
    assert train(last.config.changed(steps=21), dataset, tmp_path, resume=True).step == 21
    with pytest.raises(CheckpointError, match=r"pretrain_steps: 6 there, 4 now\."):
        train(replace(config, steps=30, pretrain_steps=4), dataset, tmp_path, resume=True)


def test_resuming_with_fewer_updates_than_done_is_refused(dataset, make_config, tmp_path):
    train(make_config(steps=3), dataset, tmp_path)
    with pytest.raises(CheckpointError, match="already done 3 steps"):
        train(make_config(steps=2), dataset, tmp_path, resume=True)


def test_resuming_on_other_data_is_refused(dataset, make_config, tmp_path):
    train(make_config(steps=3), dataset, tmp_path)
    for other in (
        replace(dataset, observations=dataset.observations + 1),
        replace(dataset, rewards=dataset.rewards + 1),
        replace(dataset, terminations=~dataset.terminations),
        replace(dataset, dataset_id="tests/other-v0"),
        replace(dataset, environment_id="meam/Pockets-v0"),
    ):
        with pytest.raises(CheckpointError, match="trained on other data"):
            train(make_config(steps=5), other, tmp_path, resume=True)


# Interruption


@pytest.fixture(scope="module")
def uninterrupted(dataset, make_config, tmp_path_factory):
    """A run of twelve updates, four of them pretraining."""
    return train(make_config(pretrain_steps=4), dataset, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 2), (signal.SIGTERM, 5), (signal.SIGINT, 12)])
def test_an_interrupt_saves_the_update_it_met_and_the_run_goes_on_from_there(
    uninterrupted, dataset, tmp_path, number, at
):
    config = uninterrupted.config
    cut = tmp_path / "cut"
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(step, metrics):
        if step == at:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, cut, on_progress=interrupt)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert Checkpoint.load(cut).step == at
    assert left_in(cut) == ALWAYS | {f"step_{at:08d}"}
    assert_bit_equal(uninterrupted, train(config, dataset, cut, resume=True))
    assert without_speed(cut) == without_speed(uninterrupted.path.parents[1])


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(dataset, make_config, tmp_path):
    def interrupt(step, metrics):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_config(), dataset, tmp_path, on_progress=interrupt)
    assert Checkpoint.latest(tmp_path) is None
    assert train(make_config(), dataset, tmp_path).step == 12


@pytest.mark.slow
def test_an_error_of_the_callers_own_passes_and_frees_the_folder(dataset, make_config, tmp_path):
    def fail(step, metrics):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(make_config(), dataset, tmp_path, on_progress=fail)
    assert train(make_config(), dataset, tmp_path, resume=True).step == 12


# Divergence


PLAIN = {"normalise_values": False, "kl_budget": None}
"""Values in units of reward, and a constant temperature: then large rewards diverge."""
FROM_SCRATCH = {"pretrain_critics": False}
"""Critics that see rewards only after pretraining."""


@pytest.mark.parametrize("reward", [1e25, -1e38])
def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(
    dataset, make_config, tmp_path, reward
):
    config = make_config(steps=8, pretrain_steps=4, checkpoint_every=1, discount=0.5, **FROM_SCRATCH, **PLAIN)
    data = replace(dataset, rewards=np.full(len(dataset), reward, np.float32))
    with pytest.raises(DivergedError, match=r"gradient of update 5 is not finite \(.*critic_loss (inf|nan)"):
        train(config, data, tmp_path)
    last = Checkpoint.load(tmp_path)
    assert last.step == 4
    assert all(tensor.isfinite().all() for tensor in saved(last).values())
    assert last.load_networks() is not None
    assert left_in(tmp_path) == ALWAYS | {f"step_0000000{n}" for n in (1, 2, 3, 4)}
    with pytest.raises(DivergedError, match="gradient of update 5"):  # resumed there, with the same data
        train(config, data, tmp_path, resume=True)


def test_without_gradient_clipping_divergence_is_noticed_too(dataset, make_config, tmp_path):
    data = replace(dataset, rewards=np.full(len(dataset), 1e25, np.float32))
    with pytest.raises(DivergedError, match="gradient of update 1 is not finite"):
        train(make_config(gradient_clip=0.0, **PLAIN), data, tmp_path)
    assert Checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("size", [1e-6, 1e15])
def test_rewards_of_any_size_are_no_reason_to_diverge(dataset, make_config, tmp_path, size):
    last = train(make_config(steps=6), replace(dataset, rewards=np.float32(size) * dataset.rewards), tmp_path)
    assert all(0.01 < float(row["critic_loss"]) < 100 for row in rows(tmp_path))
    assert float(rows(tmp_path)[-1]["inverse_temperature"]) > 0
    assert all(tensor.isfinite().all() for tensor in saved(last).values())


# Locking


@pytest.mark.slow
def test_a_second_training_into_the_same_folder_is_refused_and_the_first_unharmed(dataset, make_config, tmp_path):
    config = make_config(steps=4)
    refused = []

    def intrude(step, metrics):
        with pytest.raises(LockedError, match=f"Process {os.getpid()} is training into"):
            train(config, dataset, tmp_path / "run", resume=True)
        refused.append(step)

    first = train(config, dataset, tmp_path / "run", on_progress=intrude)
    assert refused == [1, 2, 3, 4]
    assert_bit_equal(first, train(config, dataset, tmp_path / "undisturbed"))


ENDLESS = """
import sys
import numpy as np
from meam_training import OfflineDataset, TrainConfig, train
rows = np.arange(40)
data = OfflineDataset.from_arrays(
    np.sin(rows), np.cos(rows), np.sin(rows), np.cos(rows), np.zeros(40, bool), rows % 20 == 19
)
config = TrainConfig.preset(
    "me-am", steps=int(sys.argv[2]), checkpoint_every=1, log_every=1, batch_size=4, hidden_dims=(4,),
    critic_hidden_dims=(4,), num_critics=1, nfe=2, device="cpu", pretrain_steps=2, threads=1, candidates=4,
    polyak=0.05,  # whatever the number of steps
)
train(config, data, sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_a_training_in_another_process_locks_the_folder_and_survives_being_killed(
    dataset, make_config, tmp_path, monkeypatch
):
    cut = tmp_path / "cut"
    child = subprocess.Popen([sys.executable, "-c", ENDLESS, str(cut), "1000000"])
    try:
        deadline = time.monotonic() + 60
        while (now := Checkpoint.latest(cut)) is None or now.step < 5:
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(LockedError, match=f"Process {child.pid} is training into"):
            train(make_config(), dataset, cut, resume=True)
    finally:
        child.kill()
        child.wait()
    last = Checkpoint.load(cut)
    assert all(tensor.isfinite().all() for tensor in saved(last).values())
    for folder in (cut, tmp_path / "whole"):
        monkeypatch.setattr(sys, "argv", ["", str(folder), str(last.step + 3)])
        exec(ENDLESS, {})
    assert_bit_equal(Checkpoint.load(cut), Checkpoint.load(tmp_path / "whole"))
    assert [int(row["step"]) for row in rows(cut)] == list(range(1, last.step + 4))


# A full disk


@pytest.fixture(scope="module")
def all_kept(dataset, make_config, tmp_path_factory):
    """A run that leaves a checkpoint after every update."""
    return train(make_config(steps=8, checkpoint_every=1), dataset, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "trainer.json", "metrics.csv"])
def test_a_disk_that_fills_up_ends_the_run_and_costs_no_checkpoint(dataset, all_kept, tmp_path, file):
    resource = pytest.importorskip("resource")
    config, checkpoints = all_kept.config, all_kept.path.parent
    first = checkpoints / "step_00000001"
    cut, before = tmp_path / "cut", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, row):
        if step == 4:  # from now on no file may become larger than this one is
            full = cut / file if file == "metrics.csv" else first / file
            resource.setrlimit(resource.RLIMIT_FSIZE, (full.stat().st_size - 1, before[1]))

    try:
        with pytest.raises(OutputError, match="File too large"):
            train(config, dataset, cut, on_progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = Checkpoint.load(cut)
    assert last.step >= 3
    assert {path.name for path in (cut / "checkpoints").iterdir()} == {f"step_{n:08d}" for n in range(1, last.step + 1)}
    assert_bit_equal(all_kept, train(config, dataset, cut, resume=True))
    assert without_speed(cut) == without_speed(checkpoints.parent)


# What cannot be trained


def test_an_output_folder_that_is_a_file_is_refused(dataset, make_config, tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="cannot be created"):
            train(make_config(), dataset, path)
    assert (tmp_path / "file").read_text() == "kept"


def test_episodes_shorter_than_a_chunk_are_refused_before_anything_is_written(dataset, make_config, tmp_path):
    with pytest.raises(DatasetError, match="chunk_size = 21"):
        train(make_config(chunk_size=21), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(dataset, make_config, tmp_path):
    with pytest.raises(DeviceError, match="but torch sees"):
        train(make_config(device=f"cuda:{torch.cuda.device_count()}"), dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_learns_the_data(make_config, tmp_path):
    generator = np.random.default_rng(0)
    observations = generator.choice([-1.0, 1.0], size=(400, 1))
    ends = np.ones(400, bool)
    data = OfflineDataset.from_arrays(observations, 0.7 * observations, np.zeros(400), observations, ends, ~ends)
    config = make_config("bc", steps=400, chunk_size=1, hidden_dims=(32, 32), batch_size=64, learning_rate=3e-3)
    networks = train(config, data, tmp_path).load_networks()
    with torch.no_grad():
        features = networks.encoder(torch.tensor([[-1.0], [1.0]]).repeat(50, 1))
        x_0 = torch.randn((100, 1), generator=torch.Generator().manual_seed(0))
        actions = networks.flow(networks.deployed, features, x_0)
    assert (actions - torch.tensor([[-0.7], [0.7]]).repeat(50, 1)).abs().mean() < 0.15


# What the folder holds, and what is written into it


def test_a_folder_with_something_else_in_it_is_left_alone(dataset, make_config, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"already holds config.json, which is not part of a training run"):
        train(make_config(), dataset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_metrics_file_of_somebody_else_is_left_alone(dataset, make_config, tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(OutputError, match=r"already holds metrics.csv"):
        train(make_config(), dataset, tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "a,b\n1,2\n"


def test_a_run_stopped_before_its_first_checkpoint_can_be_started_again(dataset, make_config, tmp_path):
    def stop(step, metrics):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(make_config(steps=4, log_every=1), dataset, tmp_path, on_progress=stop)
    assert train(make_config(steps=4, log_every=1), dataset, tmp_path).step == 4


def test_every_metric_is_a_mean_over_the_updates_in_which_it_occurred(dataset, make_config, tmp_path):
    settings = {"steps": 6, "pretrain_steps": 5, **FROM_SCRATCH}
    train(make_config(**settings, log_every=1), dataset, tmp_path / "each")
    train(make_config(**settings, log_every=6), dataset, tmp_path / "all")
    each, (row,) = (
        list(csv.DictReader((tmp_path / n / "metrics.csv").read_text().splitlines())) for n in ("each", "all")
    )
    assert float(row["critic_loss"]) == pytest.approx(float(each[-1]["critic_loss"]), rel=1e-4)
    priors = [float(r["prior_loss"]) for r in each]
    assert float(row["prior_loss"]) == pytest.approx(np.mean(priors), rel=1e-4)


def test_a_checkpoint_of_pretraining_acts_like_the_prior(dataset, make_config, tmp_path):
    train(make_config(steps=6, pretrain_steps=4, checkpoint_every=2), dataset, tmp_path)
    networks = Checkpoint.load(tmp_path / "checkpoints" / "step_00000002").load_networks()
    for name, value in networks.prior.state_dict().items():
        assert torch.equal(networks.deployed.state_dict()[name], value)


def test_the_optimiser_starts_afresh_after_pretraining(dataset, make_config, tmp_path):
    checkpoint = train(make_config(steps=5, pretrain_steps=4), dataset, tmp_path)
    tensors = load_file(checkpoint.path / "trainer.safetensors")
    assert {float(value) for name, value in tensors.items() if name.endswith(".step")} == {1.0}


def test_chunks_on_the_device_are_those_of_the_data_set(dataset, make_config):
    config = make_config(chunk_size=3)
    chunks = DeviceChunks(config, dataset, make_spec(config, dataset), torch.device("cpu"))
    batch = chunks.sample(64, torch.Generator().manual_seed(1))
    sampler = dataset.chunk_sampler(3, config.discount, pad=True)
    starts = torch.randint(len(sampler), (64,), generator=torch.Generator().manual_seed(1)).numpy()
    expected = sampler.batch(starts)
    assert np.allclose(batch.actions.numpy(), expected.actions.reshape(64, -1), atol=1e-6)  # the box is [-1, 1]
    for name in ("observations", "rewards", "next_observations", "masks", "valid"):
        assert np.array_equal(getattr(batch, name).numpy(), getattr(expected, name))


# Observations at which an exported policy will be checked


def kept(folder):
    return load_file(folder / "observations.safetensors")["observations"].numpy()


@pytest.mark.parametrize(("episodes", "expected"), [(6, 120), (100, 1000)])
def test_a_run_keeps_some_raw_observations_of_its_data(make_config, tmp_path, episodes, expected):
    rows = 20 * episodes  # a chunk may start at all of them
    generator = np.random.default_rng(0)
    observations = generator.normal(5, 3, (rows, 3)).astype(np.float32)
    data = OfflineDataset.from_arrays(
        observations=observations,
        actions=generator.uniform(-1, 1, (rows, 2)),
        rewards=observations[:, 0],
        next_observations=observations,
        terminations=np.zeros(rows),
        truncations=np.arange(rows) % 20 == 19,
    )
    config = make_config(steps=1)
    train(config, data, tmp_path / "run")
    found = kept(tmp_path / "run")
    assert (found.dtype, found.shape) == (np.float32, (expected, 3))
    assert {row.tobytes() for row in found} <= {row.tobytes() for row in observations}
    assert len({row.tobytes() for row in found}) > expected / 2
    train(replace(config, seed=7), data, tmp_path / "again")
    assert np.array_equal(found, kept(tmp_path / "again"))  # it is of the data, not of the run


def test_resuming_does_not_change_the_observations_kept(dataset, make_config, tmp_path):
    train(make_config(steps=1), dataset, tmp_path)
    file = tmp_path / "observations.safetensors"
    save_file({"observations": torch.full((3, 3), 0.5)}, file)
    train(make_config(steps=2), dataset, tmp_path, resume=True)
    assert np.array_equal(kept(tmp_path), np.full((3, 3), 0.5))
    file.unlink()  # as a run of before they were kept
    train(make_config(steps=3), dataset, tmp_path, resume=True)
    assert kept(tmp_path).shape == (120, 3)


def start_and_stop(config, dataset, folder):
    """A run that is stopped before its first checkpoint."""

    def stop(step, metrics):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, dataset, folder, on_progress=stop)


def test_the_observations_of_a_start_without_a_checkpoint_are_not_taken_for_the_runs(dataset, make_config, tmp_path):
    start_and_stop(make_config(steps=4), dataset, tmp_path)
    other = replace(dataset, observations=dataset.observations + 100)
    train(make_config(steps=4), other, tmp_path)
    assert kept(tmp_path).min() > 50


def test_keeping_observations_changes_no_random_number(dataset, make_config, tmp_path, monkeypatch):
    one = train(make_config(steps=3), dataset, tmp_path / "one")
    monkeypatch.setattr(Run, "keep_observations", lambda self, observations: None)
    monkeypatch.setattr("meam_training.trainer._some_observations", lambda chunks, device: None)
    assert_bit_equal(one, train(make_config(steps=3), dataset, tmp_path / "other"))


def test_observations_that_cannot_be_kept_are_named(dataset, make_config, tmp_path):
    start_and_stop(make_config(steps=4), dataset, tmp_path)
    (tmp_path / "observations.safetensors").unlink()
    (tmp_path / "observations.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"observations\.safetensors cannot be written"):
        train(make_config(steps=1), dataset, tmp_path)


# Mirror descent


def checkpoint_at(folder, step):
    return Checkpoint.load(folder / "checkpoints" / f"step_{step:08d}").load_networks()


def same_weights(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_prior_of_a_later_stage_is_the_policy_of_the_one_before(dataset, make_config, tmp_path, objective):
    config = make_config(steps=10, pretrain_steps=1, checkpoint_every=1, mirror_stages=3, objective=objective)
    train(config, dataset, tmp_path)
    networks = {step: checkpoint_at(tmp_path, step) for step in range(1, 11)}
    # Three stages of three updates each: 2-4, 5-7 and 8-10.
    for stage in ((2, 3, 4), (5, 6, 7), (8, 9, 10)):
        for step in stage:
            now, before = networks[step], networks[step - 1]
            if stage[0] == 2:
                assert not same_weights(now.prior, before.prior)
                continue
            deployed = networks[stage[0] - 1].deployed
            for prior in (now.prior, now.target_prior):
                assert same_weights(prior, deployed)
            assert not same_weights(now.policy, before.policy)
    logged = rows(tmp_path)
    assert [bool(row["prior_loss"]) for row in logged] == [True] * 4 + [False] * 6
    assert all(row["policy_loss"] for row in logged[1:])


def test_with_several_stages_the_number_of_updates_is_fixed(dataset, make_config, tmp_path):
    train(make_config(steps=4, mirror_stages=2), dataset, tmp_path)
    with pytest.raises(CheckpointError, match="has other settings: steps: 4 there, 8 now"):
        train(make_config(steps=8, mirror_stages=2), dataset, tmp_path, resume=True)
    again = train(make_config(steps=4, mirror_stages=2, log_every=3), dataset, tmp_path, resume=True)
    assert again.step == 4


# A known value


class KnownQuadratic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.peak = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, observations, actions):
        return -(actions - self.peak).square().sum(dim=-1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_a_known_value_no_critic_is_learned(dataset, make_config, tmp_path, objective):
    config = make_config(steps=4, objective=objective, mixture_weight=0.3)
    value = KnownQuadratic()
    last = train(config, dataset, tmp_path, value=value)
    initial = initial_weights(config, dataset)
    after = saved(last)
    critics = [name for name in initial if "critic" in name]
    assert critics
    assert all(torch.equal(initial[name], after[name]) for name in critics)
    for network in ("prior", "policy"):
        name = f"{network}.layers.0.weight"
        assert not torch.equal(initial[name], after[name])
    assert rows(tmp_path)[-1]["critic_loss"] == ""
    assert rows(tmp_path)[-1]["mixture_gain"] != ""
    # A module is a value like any other: neither saved nor trained.
    assert set(load_file(last.path / "model.safetensors")) == set(initial)
    assert value.peak == torch.tensor(0.3)
    assert last.load_networks().known_value is None


def test_a_run_with_a_known_value_is_resumed_with_it(dataset, make_config, tmp_path):
    config = make_config(steps=6, pretrain_steps=2, checkpoint_every=4)
    value = KnownQuadratic()
    whole = train(config, dataset, tmp_path / "whole", value=value)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")
    assert_bit_equal(whole, train(config, dataset, tmp_path / "cut", resume=True, value=value))


def test_the_known_value_decides_what_is_learned(dataset, make_config, tmp_path):
    config = make_config(steps=3)
    one, other = (
        train(config, dataset, tmp_path / str(sign), value=lambda s, a, sign=sign: sign * a.sum(dim=-1))
        for sign in (1, -1)
    )
    assert not torch.equal(saved(one)["policy.layers.2.weight"], saved(other)["policy.layers.2.weight"])


def test_a_known_value_is_tried_before_anything_is_written(dataset, make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"value returned \(\) for two rows; expected a tensor"):
        train(make_config(), dataset, tmp_path / "run", value=lambda s, a: a.sum())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [None, KnownQuadratic()])
def test_a_run_is_not_resumed_with_another_kind_of_value(dataset, make_config, tmp_path, first):
    train(make_config(steps=2), dataset, tmp_path, value=first)
    with pytest.raises(CheckpointError, match="or with another kind of value"):
        train(make_config(steps=4), dataset, tmp_path, resume=True, value=None if first else KnownQuadratic())


def test_several_chunks_to_choose_from_do_not_go_with_a_known_value(dataset, make_config, tmp_path):
    with pytest.raises(ConfigError, match="best_of is 2; expected 1 with a known value"):
        train(make_config(best_of=2), dataset, tmp_path / "run", value=KnownQuadratic())
    assert not (tmp_path / "run").exists()


def towards(observations, x, t):
    """Velocity of the flow to a Gaussian of standard deviation 1/2 about 0.2."""
    return 0.2 + (t / 4 - (1 - t)) / ((1 - t) ** 2 + t**2 / 4) * (x - 0.2 * t)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_known_prior_decides_what_the_policy_learns_and_the_prior_is_learned_all_the_same(
    dataset, make_config, tmp_path, objective
):
    config = make_config(steps=4, objective=objective)
    learned, known = (saved(train(config, dataset, tmp_path / str(p), prior=p)) for p in (None, towards))
    assert torch.equal(learned["prior.layers.0.weight"], known["prior.layers.0.weight"])
    assert not torch.equal(learned["policy.layers.2.weight"], known["policy.layers.2.weight"])


def test_a_run_with_a_known_prior_is_resumed_with_it_only(dataset, make_config, tmp_path):
    config = make_config(steps=6, pretrain_steps=2, checkpoint_every=4)
    whole = train(config, dataset, tmp_path / "whole", prior=towards)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000006")
    with pytest.raises(CheckpointError, match="or with another kind of value"):
        train(config, dataset, tmp_path / "cut", resume=True)
    assert_bit_equal(whole, train(config, dataset, tmp_path / "cut", resume=True, prior=towards))


# Heads


def test_the_heads_are_trained(dataset, make_config, tmp_path):
    config = make_config("qam-edit", steps=4, distill_coef=1.0)
    after = saved(train(config, dataset, tmp_path))
    initial = initial_weights(config, dataset)
    heads = [name for name in initial if name.startswith(("edit_policy.", "one_step."))]
    assert "edit_policy.log_alpha" in heads
    assert [name for name in heads if torch.equal(initial[name], after[name])] == []
    for name in ("edit_value", "edit_entropy", "edit_alpha", "distill_loss", "one_step_value"):
        assert math.isfinite(float(rows(tmp_path)[-1][name]))


# Clipping


def with_gradients(make_config, dataset):
    """Networks with random gradients of very different sizes, and their norms by network."""
    config = make_config("qam-edit", distill_coef=1.0)
    networks = build_networks(make_spec(config, dataset), config)
    torch.manual_seed(0)
    sizes = {"critic": 1e3, "prior": 1e-3, "policy": 10.0, "edit_policy": 0.1, "one_step": 2.0}
    for name, size in sizes.items():
        for parameter in getattr(networks, name).parameters():
            parameter.grad = size * torch.randn_like(parameter)
    return networks, {name: gradient_norm(getattr(networks, name)) for name in sizes}


def gradient_norm(network):
    return math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters() if p.grad is not None))


@pytest.mark.parametrize(("joint", "limit"), [(True, 1.0), (False, 1.0), (True, 30.0), (False, 30.0), (True, 0.0)])
def test_gradients_are_clipped_jointly_or_network_by_network(dataset, make_config, joint, limit):
    networks, before = with_gradients(make_config, dataset)
    total = math.sqrt(sum(norm**2 for norm in before.values()))
    assert clip_gradients(networks, limit or math.inf, joint).item() == pytest.approx(total, rel=1e-5)
    for name, norm in before.items():
        factor = min(1, limit / (total if joint else norm)) if limit else 1
        assert gradient_norm(getattr(networks, name)) == pytest.approx(norm * factor, rel=1e-4)


def test_a_steep_critic_shortens_the_other_gradients_only_if_clipped_jointly(dataset, make_config):
    shares = {}
    for joint in (True, False):
        networks, before = with_gradients(make_config, dataset)
        clip_gradients(networks, 1.0, joint)
        shares[joint] = gradient_norm(networks.prior) / before["prior"]
    assert shares[True] < 1e-3
    assert shares[False] == pytest.approx(1)
