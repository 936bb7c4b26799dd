import csv
import json
import os
import signal
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from meam_export import export_policy
from meam_policy import MeamPolicy, make_environment, rollout
from meam_policy.errors import NotFoundError, SpaceError
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.evaluation import EVALUATION_METRICS, SEED, DataEvaluator
from meam_training.learning.network_session import NetworkSession
from meam_training.networks.meam_networks import MeamNetworks
from meam_training.runs.checkpoint import Checkpoint
from meam_training.trainer import make_spec, train

POCKETS = "meam/Pockets-v0"


class Corridor(gymnasium.Env):
    """Rewards a first action near 0.5; tests count its episodes."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, scores=None):
        self.episodes, self.seeds, self.scores = 0, [], scores

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episodes, self.left = self.episodes + 1, 3
        self.seeds.append(seed)
        # Whoever shares generators with the training would disturb it.
        np.random.random(7)  # noqa: NPY002
        torch.rand(7)
        return self.observe(), {}

    def step(self, action):
        self.left -= 1
        reward = 1 - abs(float(action[0]) - 0.5) if self.scores is None else self.scores[self.episodes - 1] / 3
        return self.observe(), reward, self.left == 0, False, {}

    def observe(self):
        return self.np_random.normal(size=3).astype(np.float32)


@pytest.fixture(scope="module")
def pockets():
    """A random walk in the pockets, and settings for it."""
    env, rows = make_environment(POCKETS), []
    for episode in range(4):
        observation, _ = env.reset(seed=episode)
        env.action_space.seed(episode)
        done = False
        while not done:
            action = env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            rows.append((observation, action, reward, following, terminated, truncated))
            observation = following
    env.close()
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    return OfflineDataset.from_arrays(*columns, **spaces, environment_id=POCKETS)


def rows(folder):
    with (folder / "evaluations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(checkpoint):
    return {
        **load_file(checkpoint.path / "model.safetensors"),
        **load_file(checkpoint.path / "trainer.safetensors"),
    }


def assert_bit_equal(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# In the environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [("me-am", {"best_of": 2}), ("bc", {}), ("qam-edit", {"execute_steps": 1})],
)
def test_an_evaluation_is_a_rollout_of_the_exported_policy(pockets, make_config, tmp_path, method, settings):
    config = make_config(method, steps=3, evaluate_every=3, evaluate_episodes=3, **settings)
    last = train(config, pockets, tmp_path / "run")
    policy = MeamPolicy.from_pretrained(export_policy(last, tmp_path / "policy"))
    result = rollout(policy, make_environment(POCKETS), 3, SEED)
    (row,) = rows(tmp_path / "run")
    assert float(row["return_mean"]) == pytest.approx(result.return_mean, rel=1e-4, abs=1e-4)
    assert float(row["length_mean"]) == pytest.approx(result.lengths.mean())
    assert last.score == pytest.approx(result.return_mean, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["me-am", "qam-edit"])
def test_networks_in_training_act_as_the_exported_policy(dataset, make_config, tmp_path, method):
    last = train(make_config(method, steps=3, best_of=2), dataset, tmp_path / "run")
    exported = MeamPolicy.from_pretrained(export_policy(last, tmp_path / "policy"), seed=5)
    live = MeamPolicy(last.spec, NetworkSession(last.load_networks(), last.spec), seed=5)
    for observation in np.random.default_rng(0).normal(size=(20, 3)):
        np.testing.assert_allclose(live.act(observation), exported.act(observation), atol=1e-5)
    assert live.inferences == exported.inferences == 10  # chunks of two


@pytest.mark.slow
@pytest.mark.parametrize("pretrain_steps", [0, 5])
def test_evaluations_do_not_change_what_is_learned(dataset, make_config, tmp_path, pretrain_steps):
    config = make_config(steps=8, pretrain_steps=pretrain_steps)
    without = train(config, dataset, tmp_path / "without")
    evaluated = replace(config, evaluate_every=1, evaluate_episodes=2)
    in_environment = train(evaluated, dataset, tmp_path / "environment", env=Corridor())
    on_data = train(evaluated, dataset, tmp_path / "data")
    assert_bit_equal(without, in_environment)
    assert_bit_equal(without, on_data)
    assert len(rows(tmp_path / "environment")) == len(rows(tmp_path / "data")) == 8


def test_every_evaluation_runs_the_same_episodes(dataset, make_config, tmp_path):
    env = Corridor()
    train(make_config(steps=5, evaluate_every=2, evaluate_episodes=3), dataset, tmp_path, env=env)
    assert env.seeds == [SEED, SEED + 1, SEED + 2] * 3
    assert [int(row["step"]) for row in rows(tmp_path)] == [2, 4, 5]


def test_the_last_step_is_evaluated_whatever_the_interval(dataset, make_config, tmp_path):
    config = make_config(steps=5, evaluate_every=4, evaluate_episodes=1)
    last = train(config, dataset, tmp_path, env=Corridor([1.0, 2.0]))
    best = Checkpoint.best(tmp_path)
    assert best is not None
    assert (last.step, last.score, best.step) == (5, pytest.approx(2.0), 5)
    # Nothing is evaluated twice; what a run had as its last step before it was extended stays.
    env = Corridor([3.0])
    train(config, dataset, tmp_path, env=env, resume=True)
    assert env.episodes == 0
    train(replace(config, steps=6), dataset, tmp_path, env=env, resume=True)
    assert [int(row["step"]) for row in rows(tmp_path)] == [4, 5, 6]


def test_the_spread_of_an_evaluation_is_that_of_its_episodes(dataset, make_config, tmp_path):
    config = make_config(steps=1, evaluate_every=1, evaluate_episodes=3)
    train(config, dataset, tmp_path, env=Corridor([1.0, 4.0, 7.0]))
    (row,) = rows(tmp_path)
    assert float(row["return_std"]) == pytest.approx(np.sqrt(6))
    assert float(row["length_std"]) == 0


def test_a_resumed_run_adds_the_columns_that_its_evaluations_lacked(dataset, make_config, tmp_path):
    config = make_config(steps=2, evaluate_every=1, evaluate_episodes=1)
    train(config, dataset, tmp_path, env=Corridor())
    older = [{"step": row["step"], "return_mean": row["return_mean"]} for row in rows(tmp_path)]
    lines = ["step,return_mean", *(",".join(row.values()) for row in older)]
    (tmp_path / "evaluations.csv").write_text("".join(f"{line}\n" for line in lines))
    train(replace(config, steps=3), dataset, tmp_path, env=Corridor(), resume=True)
    *kept, new = rows(tmp_path)
    assert [{"step": row["step"], "return_mean": row["return_mean"]} for row in kept] == older
    assert [row["return_std"] for row in kept] == ["", ""]
    assert float(new["return_std"]) == 0


@pytest.mark.slow
def test_while_only_the_prior_is_trained_it_is_the_prior_that_is_evaluated(dataset, make_config, tmp_path):
    settings = {"steps": 6, "evaluate_every": 3, "solver": "euler", "confine": False}
    bc = make_config("bc", **settings)
    train(bc, dataset, tmp_path / "bc", env=Corridor())
    for pretrain_steps in (2, 3, 5):
        # With the same objective as much noise is drawn.
        same = ("objective", "candidates", "precondition", "pad_chunks", "action_scaling", "observation_limit")
        drawn = {name: getattr(bc, name) for name in same}
        config = make_config("qam", pretrain_steps=pretrain_steps, **settings, **drawn)
        train(config, dataset, tmp_path / str(pretrain_steps), env=Corridor())
    prior = rows(tmp_path / "bc")[0]
    assert rows(tmp_path / "5")[0] == rows(tmp_path / "3")[0] == prior
    assert rows(tmp_path / "2")[0] != prior


@pytest.mark.slow
def test_the_best_checkpoint_has_the_highest_return_and_is_kept(dataset, make_config, tmp_path):
    settings = {"evaluate_every": 2, "evaluate_episodes": 1, "keep_checkpoints": 1, "checkpoint_every": 5}
    config, scores = make_config(steps=12, **settings), [1.0, 6.0, 3.0, 6.0, 2.0, 4.0]
    seen = []
    last = train(
        config, dataset, tmp_path, env=Corridor(scores), on_evaluation=lambda step, row: seen.append((step, row))
    )
    best = Checkpoint.load(tmp_path / "checkpoints/best")
    assert (last.step, last.score) == (12, pytest.approx(4.0))
    assert (best.step, best.score) == (4, pytest.approx(6.0))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000012"]
    assert [step for step, _ in seen] == [2, 4, 6, 8, 10, 12]
    assert [row["return_mean"] for _, row in seen] == pytest.approx(scores)
    # What is better than all checkpoints before is saved, whatever the interval; a resumed run knows what was best.
    extended = replace(config, steps=16)
    train(extended, dataset, tmp_path, env=Corridor([5.0, 7.0]), resume=True)
    assert Checkpoint.load(tmp_path / "checkpoints/best").step == 16
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000016"]


def test_a_return_that_is_not_a_number_is_never_the_best(dataset, make_config, tmp_path):
    config = make_config(steps=2, evaluate_every=1, evaluate_episodes=1)
    last = train(config, dataset, tmp_path, env=Corridor([float("nan"), -5.0]))
    best = Checkpoint.best(tmp_path)
    assert best is not None
    assert (best.step, last.step) == (2, 2)
    assert [row["return_mean"] for row in rows(tmp_path)] == ["nan", "-5"]


@pytest.mark.slow
def test_an_interrupt_gives_an_evaluation_up_and_saves(dataset, make_config, tmp_path):
    env = Corridor()
    reset = env.reset

    def interrupt(**options):
        if env.episodes == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return reset(**options)

    env.reset = interrupt
    config = make_config(steps=6, evaluate_every=3, evaluate_episodes=50)
    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, tmp_path / "cut", env=env)
    assert env.episodes == 2
    assert Checkpoint.load(tmp_path / "cut").step == 3
    assert Checkpoint.best(tmp_path / "cut") is None
    resumed = train(config.changed(evaluate_every=0), dataset, tmp_path / "cut", resume=True)
    assert_bit_equal(resumed, train(config.changed(evaluate_every=0), dataset, tmp_path / "whole"))


def test_an_environment_of_other_spaces_and_an_unknown_one_are_refused_before_anything_is_written(
    dataset, make_config, tmp_path
):
    config = make_config(evaluate_every=3)
    with pytest.raises(SpaceError, match="observation has shape"):
        train(config, dataset, tmp_path / "run", env=make_environment(POCKETS))
    with pytest.raises(NotFoundError, match='no environment "tests/Unknown-v0"'):
        train(config, replace(dataset, environment_id="tests/Unknown-v0"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Without evaluations the environment need not be here.
    known = replace(dataset, environment_id="tests/Unknown-v0")
    assert train(make_config(steps=1), known, tmp_path / "run").step == 1


# On the data


def evaluated(make_config, data, method="me-am", **settings):
    config = make_config(method, **settings)
    spec = make_spec(config, data)
    chunks = DeviceChunks(config, data, spec, torch.device("cpu"))
    return config, spec, DataEvaluator(chunks, config, torch.device("cpu"))


def never():
    return False


def test_without_an_environment_the_data_are_compared_with_and_no_checkpoint_is_the_best(
    dataset, make_config, tmp_path
):
    train(make_config(steps=4, evaluate_every=2), dataset, tmp_path / "me-am")
    train(make_config("bc", steps=4, evaluate_every=2), dataset, tmp_path / "bc")
    names = {"td_error", "action_difference", "value_data", "value_policy"}
    for row in rows(tmp_path / "me-am"):
        assert {name for name, value in row.items() if value} - {"step"} == names
    for row in rows(tmp_path / "bc"):
        assert {name for name, value in row.items() if value} - {"step"} == {"action_difference"}
    assert Checkpoint.best(tmp_path / "me-am") is None
    assert json.loads((Checkpoint.load(tmp_path / "me-am").path / "trainer.json").read_text())["score"] is None


class Known(MeamNetworks):
    """Networks whose outputs are known: always the same chunk, and a value that is the sum of a chunk."""

    def __init__(self, chunk, offsets=(0.0,)):
        torch.nn.Module.__init__(self)
        self.encoder: Any = torch.nn.Identity()
        self.policy: Any = torch.nn.Identity()
        self.known_value = None
        self.chunk, self.offsets = torch.tensor(chunk), torch.tensor(offsets)

    def act(self, features, noise, edit_noise=None):
        return self.chunk.expand(len(features), -1)

    def target_critic(self, features, actions):
        return actions.sum(dim=1)[None] + self.offsets[:, None]


def known(*args, **kwargs) -> Any:
    return Known(*args, **kwargs)


@pytest.mark.parametrize("pad", [False, True])
def test_the_numbers_are_those_of_their_definitions(make_config, pad):
    generator = np.random.default_rng(0)
    ends = np.arange(60) % 10 == 9
    data = OfflineDataset.from_arrays(
        generator.normal(size=(60, 1)),
        generator.uniform(-1, 1, size=(60, 1)),
        generator.normal(size=60),
        generator.normal(size=(60, 1)),
        ends & (np.arange(60) < 30),
        ends,
    )
    config, _, evaluator = evaluated(make_config, data, chunk_size=2, discount=0.5, pessimism=2.0, pad_chunks=pad)
    sample = data.chunk_sampler(2, 0.5, pad)
    starts = torch.randint(len(sample), (len(sample),), generator=torch.Generator().manual_seed(SEED)).numpy()
    batch = sample.batch(starts)
    valid = batch.valid.astype(bool)
    assert 0 < valid.sum() < len(valid)
    found = evaluator(known([0.2, -0.6], offsets=(-1.0, 1.0)), never).metrics
    chunks = batch.actions.reshape(len(starts), 2)
    errors = np.square(chunks - [0.2, -0.6])[batch.within == 1]
    assert len(errors) == (2 * len(starts) - np.isin(starts, np.flatnonzero(ends)).sum() if pad else 2 * valid.sum())
    chunks = chunks[valid]
    expected = {
        "value_policy": -0.4,
        "value_data": chunks.sum(axis=1).mean(),
        "action_difference": np.sqrt(errors.mean()),
    }
    # Two critics at -1 and 1 about the value: the pessimistic one is two standard deviations below it.
    target = batch.rewards[valid] + 0.25 * batch.masks[valid] * (-0.4 - 2.0 * 1.0)
    expected["td_error"] = np.sqrt(np.square(target - chunks.sum(axis=1)).mean())
    assert found == pytest.approx(expected, rel=1e-5)
    assert config.chunk_size == 2


def test_an_evaluation_on_the_data_repeats_itself(dataset, make_config):
    one, other = (evaluated(make_config, dataset)[2] for _ in range(2))
    networks = known([0.1, 0.2, 0.3, 0.4])
    assert one(networks, never) == one(networks, never) == other(networks, never)


def test_a_known_value_has_no_td_error(dataset, make_config, tmp_path):
    def value(observations, actions):
        return -actions.square().sum(dim=1)

    train(make_config(steps=2, evaluate_every=1), dataset, tmp_path, value=value)
    for row in rows(tmp_path):
        assert row["td_error"] == ""
        assert float(row["value_policy"]) < 0


def test_every_number_has_a_column():
    env_metrics = {"return_mean", "return_std", "length_mean", "length_std", "success"}
    data_metrics = {"td_error", "action_difference", "value_data", "value_policy"}
    assert set(EVALUATION_METRICS) == env_metrics | data_metrics


@pytest.mark.slow
def test_an_evaluation_that_an_interrupt_cut_off_is_made_up_for(dataset, make_config, tmp_path):
    config = make_config(steps=4, pretrain_steps=0, evaluate_every=2)
    train(config, dataset, tmp_path / "whole")
    train(make_config(steps=2, pretrain_steps=0, evaluate_every=0), dataset, tmp_path / "parts")
    train(config, dataset, tmp_path / "parts", resume=True)
    whole, parts = ((tmp_path / name / "evaluations.csv").read_text() for name in ("whole", "parts"))
    assert whole == parts


def test_a_last_evaluation_that_an_interrupt_cut_off_is_made_up_for(dataset, make_config, tmp_path):
    config = make_config(steps=3, evaluate_every=2)
    train(config, dataset, tmp_path / "whole")
    train(replace(config, evaluate_every=0), dataset, tmp_path / "parts")
    train(config, dataset, tmp_path / "parts", resume=True)
    whole, parts = ((tmp_path / name / "evaluations.csv").read_text().splitlines() for name in ("whole", "parts"))
    assert parts == [whole[0], whole[-1]]
