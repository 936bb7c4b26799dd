"""Runs that start from a trained policy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from meam_policy import PolicySpec
from meam_policy.cli import run as meam
from meam_policy.errors import CheckpointError, ConfigError, SpaceError
from meam_training.data.dataset import OfflineDataset
from meam_training.runs.checkpoint import Checkpoint
from meam_training.runs.starting_point import StartingPoint
from meam_training.trainer import train


def other_data(dim=3, bound=1.0, shift=4.0):
    """Other data of the same robot, elsewhere and of another scale."""
    generator = np.random.default_rng(1)
    observations = shift + 5 * generator.normal(size=(60, dim))
    return OfflineDataset.from_arrays(
        observations=observations,
        actions=bound * generator.uniform(-1, 0.5, (60, 2)),
        rewards=10 * generator.normal(size=60),
        next_observations=observations,
        terminations=np.zeros(60),
        truncations=np.arange(60) % 20 == 19,
        action_space=spaces.Box(-bound, bound, (2,), np.float32),
        dataset_id="tests/other-v0",
    )


@pytest.fixture(scope="module")
def first(dataset, make_config, tmp_path_factory):
    """A trained policy; its target networks differ from what they follow."""
    return train(make_config("me-am", steps=6, pretrain_steps=2), dataset, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def cloned(dataset, make_config, tmp_path_factory):
    return train(make_config("bc", steps=6), dataset, tmp_path_factory.mktemp("cloned"))


@pytest.fixture
def initial(monkeypatch):
    """Weights of every network at the first update of the last run."""
    from meam_training.learning.learner import Learner

    held, update = {}, Learner.update

    def seen(self, chunks, step):
        held.setdefault("weights", {name: tensor.clone() for name, tensor in self.networks.state_dict().items()})
        return update(self, chunks, step)

    monkeypatch.setattr(Learner, "update", seen)
    return held


def same(weights, others, parts):
    names = [name for name in others if name.startswith(parts)]
    assert names
    return all(torch.equal(weights[name], others[name]) for name in names)


PARTS = ("encoder.", "prior.", "policy.", "target_prior.", "target_policy.", "critic.", "target_critic.")


def test_a_run_starts_from_all_weights_of_a_checkpoint_and_keeps_its_normalisation(
    first, make_config, tmp_path, initial
):
    last = train(make_config("me-am", steps=2), other_data(), tmp_path / "run", start_from=first.path)
    assert same(initial["weights"], first.load_networks().state_dict(), PARTS)
    for name in ("observation_mean", "observation_std", "action_offset", "action_scale"):
        assert getattr(last.spec, name) == getattr(first.spec, name)
    assert last.spec.training_data == "tests/other-v0"
    assert dict(last.spec.started_from) == {
        "policy": str(first.path),
        "method": "me-am",
        "weights": last.spec.started_from["weights"],
        "statistics": "kept",
        "training_data": "tests/tiny-v0",
    }
    assert PolicySpec.from_json(last.spec.to_json()) == last.spec


def test_renewed_statistics_are_those_of_the_new_data_everywhere(first, make_config, tmp_path, initial):
    config, data = make_config("me-am", steps=2), other_data()
    run = tmp_path / "run"
    last = train(config, data, run, start_from=first.path, statistics="renewed")
    np.testing.assert_allclose(last.spec.observation_mean, data.observation_moments[0])
    assert last.spec.started_from["statistics"] == "renewed"
    held, others = initial["weights"], first.load_networks().state_dict()
    moved = [name for name in others if name.startswith(PARTS) and not torch.equal(held[name], others[name])]
    alone = train(replace(config, pretrain_steps=0), data, tmp_path / "alone").load_networks().state_dict()
    ends = ("preconditioner.mean", "preconditioner.std", "critic.offset", "critic.scale")
    assert sorted(moved) == sorted(name for name in others if name.endswith(ends))
    assert all(torch.equal(held[name], alone[name]) for name in moved)


def test_without_a_pause_the_policy_goes_on_where_it_was(first, make_config, tmp_path):
    tiny = make_config("me-am", steps=1, learning_rate=1e-12, polyak=1e-12)
    last = train(tiny, other_data(), tmp_path / "run", start_from=first.path)
    assert last.config.pretrain_steps == 0
    observations, noise = torch.randn(5, 3), torch.randn(5, 4)
    acts = [n.act(n.encoder(observations), noise) for n in (first.load_networks(), last.load_networks())]
    torch.testing.assert_close(acts[1], acts[0], rtol=0, atol=1e-6)


def test_a_clone_becomes_the_prior_and_the_first_policy_of_a_method_with_critics(
    cloned, make_config, tmp_path, initial
):
    last = train(make_config("me-am", steps=4), other_data(), tmp_path / "run", start_from=cloned.path)
    source, held = cloned.load_networks().state_dict(), initial["weights"]
    for part in ("prior", "policy", "target_prior", "target_policy"):
        assert all(
            torch.equal(held[name.replace("prior.", f"{part}.", 1)], tensor)
            for name, tensor in source.items()
            if name.startswith("prior.")
        )
    assert last.config.pretrain_steps == 2  # critics begin anew
    assert last.spec.started_from["anew"] == "critics"


def test_cloning_goes_on_with_the_network_that_acted(first, make_config, tmp_path, initial):
    train(make_config("bc", steps=1), other_data(), tmp_path / "run", start_from=first.path)
    source = first.load_networks().state_dict()
    assert not same(source, {n.replace("target_policy.", "prior."): t for n, t in source.items()}, ("prior.",))
    acted = {name.replace("target_policy.", "prior.", 1): t for name, t in source.items() if "target_policy." in name}
    assert same(initial["weights"], acted, ("prior.",))


def test_an_interrupted_start_ends_in_the_same_bits(first, make_config, tmp_path):
    config, data = make_config("me-am", steps=4, checkpoint_every=1), other_data()
    whole = train(config, data, tmp_path / "whole", start_from=first.path)
    train(replace(config, steps=2), data, tmp_path / "parts", start_from=first.path)
    parts = train(config, data, tmp_path / "parts", resume=True)
    assert parts.spec.started_from == whole.spec.started_from
    assert parts.spec.observation_mean == whole.spec.observation_mean
    ours, theirs = parts.load_networks().state_dict(), whole.load_networks().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = train(config, data, tmp_path / "parts", resume=True, start_from=first.path)
    assert again.step == 4


def test_a_started_run_is_resumed_only_on_its_data_and_from_its_start(first, cloned, dataset, make_config, tmp_path):
    config, data = make_config("me-am", steps=2), other_data()
    train(config, data, tmp_path / "run", start_from=first.path)
    with pytest.raises(CheckpointError, match="other data"):
        train(replace(config, steps=3), dataset, tmp_path / "run", resume=True)
    for asked in ({"start_from": cloned.path}, {"start_from": first.path, "statistics": "renewed"}):
        with pytest.raises(CheckpointError, match="started from .*; asked for are"):
            train(replace(config, steps=3), data, tmp_path / "run", resume=True, **asked)
    train(config, data, tmp_path / "anew")
    with pytest.raises(CheckpointError, match="started from no policy"):
        train(replace(config, steps=3), data, tmp_path / "anew", resume=True, start_from=first.path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_dims", (8,)),
        ("chunk_size", 3),
        ("precondition", False),
        ("normalise_values", False),
        ("num_critics", 3),
        ("fourier_features", 4),
    ],
)
def test_settings_that_the_weights_do_not_fit_are_refused_by_name(first, make_config, tmp_path, setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is .* were trained with"):
        train(make_config("me-am", **{setting: value}), other_data(), tmp_path / "run", start_from=first.path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"dim": 4}, r"observation of the data is \[4\], but that of .* is \[3\]"),
        ({"bound": 2.0}, r"lower bound of actions of the data is \[-2.0, -2.0\]"),
    ],
)
def test_other_spaces_are_refused(first, make_config, tmp_path, data, message):
    with pytest.raises(SpaceError, match=message):
        train(make_config(), other_data(**data), tmp_path / "run", start_from=first.path)
    assert not (tmp_path / "run").exists()


def test_a_range_that_nobody_declared_gives_way_to_the_box_of_the_policy_that_contains_it(first, make_config, tmp_path):
    config, data = make_config(steps=2), replace(other_data(bound=0.5), measured_bounds=True)
    last = train(config, data, tmp_path / "run", start_from=first.path)
    assert last.spec.action == first.spec.action
    assert train(replace(config, steps=3), data, tmp_path / "run", resume=True).spec.action == first.spec.action
    wide = replace(other_data(bound=2.0), measured_bounds=True)
    with pytest.raises(SpaceError, match=r"lower bound .* \[-2.0, -2.0\].*action_space="):
        train(config, wide, tmp_path / "wide", start_from=first.path)


def test_unknown_statistics_are_refused(first, make_config, tmp_path):
    with pytest.raises(ConfigError, match="statistics is 'new'"):
        train(make_config(), other_data(), tmp_path / "run", start_from=first.path, statistics="new")  # pyright: ignore


def test_the_settings_of_going_on_are_those_of_the_policy_but_for_length_and_execution(first):
    start = StartingPoint.load(first.path, "kept")
    config = start.settings()
    assert (config.hidden_dims, config.nfe, config.batch_size) == ((8, 8), 4, 16)
    assert (config.steps, config.pretrain_steps, config.log_every, config.device) == (100_000, 0, 100, "auto")
    other = start.settings("qam")
    assert (other.method, other.hidden_dims, other.num_critics, other.batch_size) == ("qam", (8, 8), 2, 256)
    assert other.normalise_values == first.config.normalise_values


def test_what_follows_from_a_run_s_length_and_rewards_is_not_taken_over(dataset, make_config, tmp_path):
    made = make_config("me-am", steps=6, pretrain_steps=2, reward_offset=3.0)
    begun = train(made, dataset, tmp_path / "first")
    assert begun.config.polyak is not None
    assert begun.config.reward_offset == 3.0
    going_on = StartingPoint.load(begun.path, "kept").settings()
    assert (going_on.polyak, going_on.reward_offset) == (None, None)


def write_npz(file):
    data = other_data()
    np.savez(
        file,
        observations=data.observations,
        actions=data.actions,
        rewards=data.rewards,
        terminals=data.episode_ends.astype(np.float32),
        masks=1 - data.terminations.astype(np.float32),
    )


def test_the_command_line_starts_from_a_run_with_its_settings_and_resumes_without_it(
    first, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "new.npz")
    origin = first.path.parents[1]
    begin = ["train", "--from", str(origin), "--data", "new.npz", "--output-dir", "run", "--device", "cpu"]
    assert meam([*begin, "--steps", "2", "--log-every", "1"]) == 0
    assert f"{origin} (me-am), statistics kept" in " ".join(capsys.readouterr().err.split())
    last = Checkpoint.load("run")
    assert (last.config.hidden_dims, last.config.pretrain_steps, last.config.steps) == ((8, 8), 0, 2)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["origin"]["from"], record["origin"]["statistics"]) == (str(origin), "kept")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record).replace(str(origin), "/gone"))
    assert meam(["train", "--resume", "--output-dir", "run", "--steps", "3"]) == 0
    assert Checkpoint.load("run").spec.started_from == last.spec.started_from
    capsys.readouterr()
    assert meam(["info", "run"]) == 0
    assert "statistics kept" in " ".join(capsys.readouterr().out.replace("│", " ").split())  # however it is wrapped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--statistics", "renewed"], "no effect without --from"),
        (["--from", "nowhere"], "does not exist"),
        (["--from", ""], "is empty"),
    ],
)
def test_a_wrong_start_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_npz(tmp_path / "new.npz")
    assert meam(["train", "bc", "--data", "new.npz", "--output-dir", "run", *arguments]) != 0
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
