"""A policy package for Intel's physicalai 0.3.0: `manifest.json` and a graph that maps a state to a chunk of actions.

Experimental. LeRobot, the format's other reader, has no release that reads it, and physicalai refuses the manifests
that LeRobot's own proposal writes.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from meam_export.deploy.source import Source
from meam_export.deploy.tick_graph import TickGraph, build_plain
from meam_export.deploy.tick_player import TickCheck, TickPlayer, drawn_observations, policy_actions, require_equal
from meam_policy import __version__
from meam_policy.atomic_files import given_folder, write_folder
from meam_policy.folder.policy_folder import check_output_folder
from meam_policy.robot import RobotContract

__all__ = ["write_manifest"]

NAME = "meam"
"""The policy's name, and that of its file, which physicalai wants to be the same."""

COMPARED = 200


def write_manifest(source: Source, folder: str | os.PathLike[str]) -> tuple[Path, TickCheck]:
    """Write a policy package that acts by zero noise and executes the same number of actions of a chunk.

    Args:
        source: The policy.
        folder: Folder to write; must be empty or not exist.

    Returns:
        The folder, and what the check of its graph found.

    Raises:
        ConfigError: the contract has a `max_rate`, which a graph without a state cannot keep.
        ParityError: the graph does not act like the policy.
        OutputError: the folder is not empty, or cannot be written.
    """
    target = given_folder("--manifest", folder).absolute()
    check_output_folder(target)
    made = build_plain(source.graph, source.spec, source.robot, names=("state", "action"), whole=True)
    found = _check(made, source)
    manifest = json.dumps(_manifest(source, made), indent=2) + "\n"
    files = {f"{NAME}.onnx": made.graph, "manifest.json": manifest.encode()}
    write_folder(target, files, f"The package {target} cannot be written")
    return target, found


def _manifest(source: Source, made: TickGraph) -> dict[str, Any]:
    contract = source.robot or RobotContract()
    spec = contract.named(source.spec)
    robot: dict[str, Any] = {"name": "main"}
    for name, size, numbers in (
        ("state", spec.observation_dim, spec.observation_numbers),
        ("action", spec.action_dim, spec.action_numbers),
    ):
        order = [number.name for number in numbers]
        robot[name] = {"shape": [size], "dtype": "float32"} | ({} if None in order else {"order": order})
    return {
        "format": "policy_package",
        "version": "1.0",
        "policy": {"name": NAME},
        "model": {
            "n_obs_steps": 1,
            "runner": {"type": "single_pass"},
            "artifacts": {"onnx": f"{NAME}.onnx"},
        },
        "hardware": {"robots": [robot], "cameras": []},
        "metadata": {
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "created_by": f"meam-policy {__version__}",
        },
        "meam": {
            "acting": "zero",
            "execute_steps": spec.execute_steps,
            "control_rate_hz": contract.rate_hz(spec),
            "spec_sha256": source.spec.identity,
            "graph_sha256": hashlib.sha256(made.graph).hexdigest(),
        },
    }


def _check(made: TickGraph, source: Source) -> TickCheck:
    """Compare every executed action with the policy's from zero noise."""
    name, spec, policy = "The package's graph", source.spec, source.acting()
    player, rows = TickPlayer(made, name), drawn_observations(spec, COMPARED, seed=0)
    silence = np.zeros((spec.execute_steps, spec.noise_dim), np.float32)
    for row in rows:
        wanted = policy_actions(policy, np.tile(row, (spec.execute_steps, 1)), silence)
        require_equal(name, player.tick(row)["action"][0], wanted, "of a chunk")
    return TickCheck(COMPARED * spec.execute_steps, *player.latency_ms(rows))
