"""A LEAPP bundle: the tick graph with a description that NVIDIA's leapp and Isaac ROS Deploy read.

Written without leapp and without PyTorch, in the config version 1.3 of leapp 0.7.2. It holds both `feedback_flow`,
which leapp reads, and `feedback_connections`, which Isaac ROS Deploy 4.5 reads: with the first alone that runs on, and
the state stays zero in every tick.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml

from meam_export.deploy.leapp_check import NODE, check_leapp_bundle
from meam_export.deploy.parts import GAINS, Part
from meam_export.deploy.source import Source, require_plain_meaning
from meam_export.deploy.tick_graph import TickGraph, TickSettings, build_tick, zero_state
from meam_export.deploy.tick_player import TickCheck, check_tick
from meam_policy.atomic_files import given_folder, write_folder
from meam_policy.errors import ConfigError
from meam_policy.extras import needs
from meam_policy.folder.policy_folder import check_output_folder
from meam_policy.robot import ActionNumber, ObservationNumber, RobotContract
from meam_policy.spec import PolicySpec

with needs("A LEAPP bundle", "onnx", "deploy"):
    import onnx

__all__ = ["kinds_by_message", "write_leapp_bundle"]

LEAPP_VERSION, CONFIG_VERSION = "0.7.2", "1.3"

ISAAC_ROS2_CONTROL = (
    *("state/joint/position", "state/joint/velocity", "state/body/rotation", "state/body/angular_velocity"),
    *("target/joint/position", "kp", "kd"),
)
"""Kinds that Isaac ROS Deploy 4.5 converts in its ros2_control runtime; it feeds zeros for inputs of other kinds."""


def write_leapp_bundle(
    source: Source, folder: str | os.PathLike[str], settings: TickSettings | None = None
) -> tuple[Path, TickCheck]:
    """Write a LEAPP bundle: `NAME.yaml`, the tick graph, and the initial values of its state.

    Args:
        source: The policy.
        folder: Folder to write, whose name is the bundle's; must be empty or not exist.
        settings: How the tick graph is made; None takes the defaults.

    Returns:
        The folder, and what the check of its graph found.

    Raises:
        ConfigError: the policy has no contract that describes all its numbers, no rate, or noise is asked for as an
            input, for which LEAPP has no word.
        ParityError: the graph does not act like the policy.
        OutputError: the folder is not empty, or cannot be written.
    """
    made = settings or TickSettings()
    rate, robot = source.rate_hz("a LEAPP bundle"), source.contract("a LEAPP bundle is read by kinds and names")
    require_plain_meaning(robot, "LEAPP")
    for field in GAINS.values():
        lacking = [number.name for number in robot.action if getattr(number, field) is None]
        if 0 < len(lacking) < len(robot.action):
            raise ConfigError(f"{lacking[0]} has no {field} in robot.json, and others have; expected all, or none.")
    if made.noise_of(source.spec) == "input":
        raise ConfigError('noise is "input"; expected "table" or "zero": whoever runs a bundle would feed zeros.')
    target = given_folder("--leapp", folder).absolute()
    check_output_folder(target)
    tick = build_tick(source.graph, source.spec, robot, made, in_parts=True, gains=True)

    def action(found: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
        flat = np.empty(source.spec.action_dim, np.float32)
        for part in tick.action:
            flat[list(part.indices)] = found[part.name][0]
        return flat

    found = check_tick(tick, source.acting(), made, "The bundle's graph", action)
    name = target.name
    description = _description(tick, source.spec, robot, rate, name)
    text = yaml.safe_dump(description, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    state = {f"{NODE}/{each}": zeros for each, zeros in zero_state(tick.recurrent).items()}
    files = {
        f"{name}.onnx": tick.graph,
        f"{name}_initial_values.safetensors": safetensors.numpy.save(state),
        f"{name}.yaml": text.encode(),
    }
    failure = f"The bundle {target} cannot be written"
    write_folder(target, files, failure, check=lambda folder: check_leapp_bundle(folder / f"{name}.yaml"))
    return target, found


def kinds_by_message(robot: RobotContract) -> tuple[str, ...]:
    """Kinds of a contract that Isaac ROS Deploy's ros2_control runtime has no converter for.

    They reach it by messages, where there is such a message; without one, that runtime feeds zeros.
    """
    kinds = dict.fromkeys(number.kind for number in (*robot.observation, *robot.action))
    return tuple(kind for kind in kinds if kind not in ISAAC_ROS2_CONTROL)


def _description(tick: TickGraph, spec: PolicySpec, robot: RobotContract, rate: float, name: str) -> dict[str, Any]:
    """The contents of the YAML file."""
    inputs = [*map(_part, tick.observation), *(_tensor(into, shape) for into, shape in tick.recurrent.values())]
    # Gains by the joints that they are of.
    gains = [
        {**_tensor(gain, (1, len(robot.action))), "element_names": [[], _element_names(robot.action)], "kind": gain}
        for gain in tick.gains
    ]
    outputs = _in_order(tick, [*map(_part, tick.action), *gains])
    feedback = {f"{NODE}/{out}": [f"{NODE}/{into}"] for out, (into, _) in tick.recurrent.items()}
    given = [*(part.name for part in tick.action), *tick.gains]
    return {
        "models": {
            NODE: {
                "formatting": {
                    "input_format": [tensor["name"] for tensor in inputs],
                    "output_format": {tensor["name"]: tensor["name"] for tensor in outputs},
                },
                "inputs": inputs,
                "outputs": outputs,
                "parameters": {
                    "model_path": f"{name}.onnx",
                    "md5sum": hashlib.md5(tick.graph).hexdigest(),
                    "sha256sum": hashlib.sha256(tick.graph).hexdigest(),
                    "backend": "onnx",
                    "warp_segments": 0,
                    "device": "cpu",
                },
            }
        },
        "pipeline": {
            "inputs": {NODE: [part.name for part in tick.observation]},
            "outputs": {NODE: given},
            "data_flow": {},
            "feedback_flow": feedback,
            "feedback_connections": {key: list(targets) for key, targets in feedback.items()},
            "initial_values": f"{name}_initial_values.safetensors",
            "configs": {
                "frequency": rate,
                "chunk_size": spec.chunk_size,
                "execute_steps": spec.execute_steps,
                "spec_sha256": spec.identity,
            },
        },
        # Isaac ROS Deploy takes the time of a step from here, 0.02 s if it is missing, whatever the frequency.
        "semantic": {"scene": {"dt": 1 / rate}},
        "system information": {
            "leapp version": LEAPP_VERSION,
            "leapp config version": CONFIG_VERSION,
            "torch version": "none",
            "python version": platform.python_version(),
            "os": platform.platform(),
        },
    }


def _tensor(name: str, shape: Sequence[int]) -> dict[str, Any]:
    """What every description has: those of states have no more."""
    return {"name": name, "dtype": "float32", "shape": list(shape), "type": "tensor"}


def _part(part: Part) -> dict[str, Any]:
    """The description of a part."""
    found = {**_tensor(part.name, (1, part.size)), "kind": part.kind}
    found["element_names"] = [[], _element_names(part.numbers)]
    found["units"] = [number.unit for number in part.numbers]
    for field in ("lower", "upper", "max_rate"):
        values = [getattr(number, field, None) for number in part.numbers]
        if any(value is not None for value in values):
            found[field] = values
    return found


def _element_names(numbers: Sequence[ObservationNumber | ActionNumber]) -> list[str]:
    """The names by which a runtime finds the numbers on the robot: those of joints, where they are of joints."""
    joints = [number.joint for number in numbers]
    return [number.name for number in numbers] if None in joints else [str(joint) for joint in joints]


def _in_order(tick: TickGraph, described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Descriptions of all outputs, in the order of the graph."""
    known = {tensor["name"]: tensor for tensor in described}
    outputs = onnx.load_model_from_string(tick.graph).graph.output
    return [known.get(v.name) or _tensor(v.name, tick.recurrent[v.name][1]) for v in outputs]
