"""One small policy for all examples of the README and of docs/."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meam_export import export_policy
from meam_policy.robot import RobotContract
from meam_training import OfflineDataset, TrainConfig, collect, train

POLICIES = ("demo-output/policies/me-am", "policies/arm", "policies/ladder")
"""Where the examples look for a policy."""


@pytest.fixture(scope="session")
def documented_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples can run: a barely trained Pockets policy wherever they look for one."""
    folder = tmp_path_factory.mktemp("documented")
    dataset = OfflineDataset.from_minari(collect("meam/Pockets-v0", 100, root=folder / "data"))
    sizes = {"hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "chunk_size": 4}
    config = TrainConfig.preset("me-am", steps=2, pretrain_steps=1, nfe=4, threads=1, **sizes)
    checkpoint = train(config, dataset, folder / "run")
    policy = export_policy(
        checkpoint, folder / POLICIES[0], variants=("k3-grid", "rtc", "best-of-2"), robot=RobotContract()
    )
    for place in POLICIES[1:]:
        shutil.copytree(policy, folder / place)
    return folder
