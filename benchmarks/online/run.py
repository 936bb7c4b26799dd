"""What learning on in the environment adds to offline learning, in meam/Pockets-v0; prints a row of a table a seed."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import gymnasium
import torch

from meam_policy.policy import MeamPolicy
from meam_policy.rollouts.episodes import rollout
from meam_policy.rollouts.result import RolloutResult
from meam_training.collection.collect import collect
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.learner import Learner
from meam_training.learning.network_session import NetworkSession
from meam_training.learning.online import OnlineLearning
from meam_training.trainer import make_spec

ENV_ID = "meam/Pockets-v0"
TRANSITIONS = 4000
EPISODES = 50
EVALUATE_EVERY = 1000


def settings(seed: int, online_steps: int) -> TrainConfig:
    return TrainConfig.preset(
        "me-am",
        seed=seed,
        device="cpu",
        steps=5000,
        pretrain_steps=4000,
        batch_size=64,
        learning_rate=1e-3,
        chunk_size=5,
        discount=0.97,
        hidden_dims=(128, 128),
        critic_hidden_dims=(128, 128),
        num_critics=2,
        online_steps=online_steps,
        online_warmup=200,
        offline_share=0.5,
    )


def returns(seed: int, online_steps: int) -> list[RolloutResult]:
    """Returns after the offline updates, and after every `EVALUATE_EVERY` online steps."""
    config = settings(seed, online_steps)
    with tempfile.TemporaryDirectory() as root:
        dataset = OfflineDataset.from_minari(collect(ENV_ID, TRANSITIONS, seed=seed, root=Path(root)))
        print(f"seed {seed}: data {dataset.episode_returns.mean():.2f}", flush=True)
        spec, device = make_spec(config, dataset), torch.device("cpu")
        learner, offline = Learner(spec, config, device), DeviceChunks(config, dataset, spec, device)
    results = []
    with gymnasium.make(ENV_ID) as env, gymnasium.make(ENV_ID) as evaluated:
        online = OnlineLearning(env, learner, offline, spec)
        policy = MeamPolicy(spec, NetworkSession(learner.networks, spec))
        for step in range(1, config.steps + 1):
            learner.update(offline, step)
        results.append(rollout(policy, evaluated, EPISODES, 1_000_000))
        for step in range(1, online_steps + 1):
            online.step(config.steps + step)
            if step % EVALUATE_EVERY == 0:
                results.append(rollout(policy, evaluated, EPISODES, 1_000_000))
    return results


def show(result: RolloutResult) -> str:
    low, high = result.return_interval
    return f"{result.return_mean:.2f} [{low:.2f}, {high:.2f}], {result.success_rate:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--online-steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        results = returns(seed, arguments.online_steps)
        print(f"| {seed} | " + " | ".join(map(show, results)) + " |", flush=True)


if __name__ == "__main__":
    main()
