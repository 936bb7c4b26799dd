"""How far a box declared too wide, a joint that stood still and map coordinates spoil a policy.

python benchmarks/data/scales.py [--action-scaling box --observation-limit none --raw-std --float32]
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from gymnasium import spaces

from meam_policy import DatasetError
from meam_training import OfflineDataset, TrainConfig
from meam_training.learning.chunk_source import make_chunk_source
from meam_training.learning.learner import Learner
from meam_training.networks.policy_module import PolicyModule
from meam_training.trainer import data_statistics, make_spec

ROWS, STEPS = 4000, 1000
FIELD = np.array([447_123.4, 4_500_017.8])
"""Easting and northing of a place, metres."""


def fitted(dataset: OfflineDataset, config: TrainConfig, raw_std: bool) -> PolicyModule:
    """Train a policy on the data; with the raw standard deviations, if asked."""
    spec, device = make_spec(config, dataset), torch.device("cpu")
    if raw_std:
        spec = replace(spec, observation_std=tuple(dataset.observation_moments[1].tolist()))
    chunks = make_chunk_source(config, dataset, spec, device)
    learner = Learner(spec, config, device, statistics=data_statistics(config, dataset, spec))
    for step in range(1, config.steps + 1):
        learner.update(chunks, step)
    learner.prepare_to_act(config.steps)
    return PolicyModule(learner.networks, spec)


def made(observations: np.ndarray, actions: np.ndarray, bound: float = 1.0) -> OfflineDataset:
    """Episodes of 50 steps without rewards."""
    none = np.zeros(ROWS)
    ends = np.arange(ROWS) % 50 == 49
    space = spaces.Box(-bound, bound, actions.shape[1:], np.float32)
    return OfflineDataset.from_arrays(
        observations, actions, none, observations, none.astype(bool), ends, action_space=space
    )


def main() -> None:
    """Print one line for each figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--action-scaling", default="data")
    parser.add_argument("--observation-limit", default="10")
    parser.add_argument("--raw-std", action="store_true")
    parser.add_argument("--float32", action="store_true", help="map coordinates that were rounded before")
    given = parser.parse_args()
    limit = None if given.observation_limit == "none" else float(given.observation_limit)
    config = TrainConfig.preset(
        "bc",
        steps=STEPS,
        learning_rate=1e-3,
        hidden_dims=(64, 64),
        batch_size=64,
        device="cpu",
        action_scaling=given.action_scaling,
        observation_limit=limit,
    )
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    joints = generator.uniform(-1, 1, (ROWS, 2))
    actions = (0.8 * np.sin(2 * joints) + 0.05 * generator.normal(size=(ROWS, 2))).clip(-1, 1)
    points = generator.uniform(-0.7, 0.7, (500, 2))
    test = torch.tensor(points, dtype=torch.float32)
    wanted = 0.8 * torch.sin(2 * test)
    noise = torch.randn(500, 2 * config.chunk_size, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def error(policy: PolicyModule, rows: torch.Tensor = test) -> str:
        found = (policy(rows, noise)[:, 0] - wanted).square().mean().sqrt()
        return f"root mean square error of a sampled action {found:.3f}"

    for bound in (1.0, 100.0, 1e6, 3e38):
        try:
            policy = fitted(made(joints, actions, bound), config, given.raw_std)
        except DatasetError as refusal:
            print(f"declared box of {bound:g}: refused: {refusal}")
        else:
            print(f"declared box of {bound:g}: {error(policy)}")
    kind = np.float32 if given.float32 else np.float64
    for name, origin in (("near the origin", 0 * FIELD), ("in map coordinates", FIELD)):
        data = made((0.5 * joints + origin).astype(kind), actions)
        seen = (0.5 * points + origin).astype(kind) - np.array(data.observation_offset or 0.0)
        policy = fitted(data, config, given.raw_std)
        print(f"positions within 0.5 m, {name}: {error(policy, torch.tensor(seen, dtype=torch.float32))}")
    wrist = 1.57 + 2e-5 * generator.normal(size=(ROWS, 1))
    policy = fitted(made(np.concatenate([joints, wrist], axis=1), actions), config, given.raw_std)

    @torch.no_grad()
    def at(angle: float) -> torch.Tensor:
        return policy(torch.cat([test, torch.full((500, 1), angle)], dim=1), torch.zeros_like(noise))

    before, after = at(1.57), at(1.572)
    stuck = (after.abs() > 0.99).float().mean()
    print(f"still joint 2 mrad off: actions change by {(after - before).abs().mean():.3f}, {stuck:.0%} at a limit")


if __name__ == "__main__":
    main()
