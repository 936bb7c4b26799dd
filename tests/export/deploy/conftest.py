"""A small arm with a contract, exported from untrained networks: three observed numbers of two joints and a goal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meam_export.deploy.source import Source, read_source
from meam_export.graph.policy_graph import build_graph
from meam_policy import BoxSpec, PolicySpec
from meam_policy.folder.policy_folder import sha256
from meam_policy.robot import RobotContract
from meam_policy.robot.contract_file import contract_text
from meam_policy.spec import ActingRule, Integration, Precision
from meam_training import TrainConfig
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.policy_module import PolicyModule

SIZES: dict[str, Any] = {"hidden_dims": (12, 10), "critic_hidden_dims": (7, 6), "num_critics": 2, "fourier_features": 4}

KINDS = ("state/joint/position", "state/joint/velocity", "state/joint/position", "state/joint/velocity")
"""Of the observation's numbers, in an order that parts by kind must undo."""


def free(size: int, key: str | None = None) -> BoxSpec:
    return BoxSpec((size,), "float32", (-np.inf,) * size, (np.inf,) * size, key)


def arm_spec(**changes: Any) -> PolicySpec:
    how = Integration(changes.pop("nfe", 3), "euler", best_of=changes.pop("best_of", 1))
    fields: dict[str, Any] = {
        "observation": (free(4),),
        "action": BoxSpec((2,), "float32", (-1.0, -2.0), (1.0, 0.5)),
        "chunk_size": 4,
        "execute_steps": 3,
        "observation_mean": (1.0, -20.0, 300.0, 0.0),
        "observation_std": (0.5, 3.0, 0.01, 1.0),
        "action_offset": (0.0, -0.75),
        "action_scale": (1.0, 1.25),
        "integration": how,
        "method": "me-am",
        "control_rate_hz": 20.0,
    }
    return PolicySpec(**{**fields, **changes})


@pytest.fixture
def make_contract() -> Callable[..., RobotContract]:
    """Make the arm's contract."""
    return arm_contract


def arm_contract(rate: float | None = None, gains: bool = True, **timing: Any) -> RobotContract:
    observation = [
        {"name": f"{joint} {kind.rpartition('/')[2]}", "kind": kind, "joint": joint, "unit": unit}
        for kind, joint, unit in zip(KINDS, ("a", "a", "b", "b"), ("rad", "rad/s", "rad", "rad/s"), strict=True)
    ]
    action = [
        {"name": joint, "joint": joint, "kind": "target/joint/position", "unit": "rad", "upper": 0.3}
        | ({} if rate is None else {"max_rate": rate})
        | ({"stiffness": 80.0, "damping": 2.0} if gains else {})
        for joint in ("a", "b")
    ]
    return RobotContract.from_object({"observation": observation, "action": action, "timing": timing})


Make = Callable[..., Source]


@pytest.fixture
def make_source(tmp_path: Path) -> Make:
    """Export untrained networks as a policy folder, and read it."""

    def make(
        robot: RobotContract | None = None,
        precision: Precision = "fp32",
        noise_scale: float = 1.0,
        takes_prefix: bool = False,
        name: str = "arm",
        **changes: Any,
    ) -> Source:
        spec = replace(arm_spec(**changes), acting=ActingRule(noise_scale))
        torch.manual_seed(0)
        module = PolicyModule(build_networks(spec, TrainConfig.preset("me-am", **SIZES)), spec, False, takes_prefix)
        with torch.no_grad():  # the last layers begin at zero, and all actions would be the noise
            for parameter in module.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        files = {"policy.onnx": build_graph(module, spec, precision)}
        if robot is not None:
            files["robot.json"] = contract_text(robot).encode()
        folder = tmp_path / name
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        whole = replace(spec, files={file: sha256(data) for file, data in files.items()})
        (folder / "config.json").write_text(whole.to_json())
        return read_source(folder, variant=None)

    return make
