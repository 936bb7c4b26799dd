"""A policy for the C++ controller exploy, which reads the meaning of tensors in their names.

Names and metadata are those of its version 0.1, compared with a table in the tests: the controller itself is on no
package registry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from meam_export.deploy.parts import GAINS, Part
from meam_export.deploy.source import Source, require_plain_meaning, write_file
from meam_export.deploy.tick_graph import TickGraph, TickSettings, build_tick
from meam_export.deploy.tick_player import TickCheck, check_tick
from meam_policy.atomic_files import given_folder
from meam_policy.errors import ConfigError
from meam_policy.extras import needs

with needs("A graph for exploy", "onnx", "deploy"):
    import onnx
    import onnx_ir as ir

__all__ = ["EXPLOY_VERSION", "write_exploy"]

EXPLOY_VERSION = "0.1"

ROBOT = "robot"
"""Name of the articulation and of the group of joints."""

INPUTS = {
    "state/joint/position": f"obj.{ROBOT}.joints.pos",
    "state/joint/velocity": f"obj.{ROBOT}.joints.vel",
    "command/joint/position": "cmd.joint_pos.target",
}
"""Names of the inputs that exploy fills, by the contract's kind."""

OUTPUTS = {
    "target/joint/position": "pos",
    "target/joint/velocity": "vel",
    "target/joint/effort": "effort",
    "target/joint/torques": "effort",
}
"""Which of a joint target's three outputs an action is, by the contract's kind."""

_UNITS = ("rad", "rad/s", "m", "m/s", "N m", "N")


def write_exploy(
    source: Source, file: str | os.PathLike[str], settings: TickSettings | None = None
) -> tuple[Path, TickCheck]:
    """Write the tick graph with exploy's names and metadata.

    Args:
        source: The policy.
        file: ONNX file to write.
        settings: How the tick graph is made; None takes the defaults.

    Returns:
        The file, and what the check of its graph found.

    Raises:
        ConfigError: the contract describes what exploy has no name for, in other units, or lacks gains.
        ParityError: the graph does not act like the policy.
        OutputError: the file cannot be written.
    """
    made = settings or TickSettings()
    if made.noise_of(source.spec) == "input":
        raise ConfigError('noise is "input"; expected "table" or "zero": exploy has no source of noise.')
    target = given_folder("--exploy", file).absolute()
    tick = _as_exploy_names(build_tick(source.graph, source.spec, source.robot, made, in_parts=True), source)
    found = check_tick(tick, source.acting(), made, target.name, lambda outputs: outputs[tick.action[0].name][0])
    write_file(target, tick.graph)
    return target, found


def _as_exploy_names(tick: TickGraph, source: Source) -> TickGraph:
    """A tick graph with exploy's names and metadata.

    Raises:
        ConfigError: as `write_exploy`.
    """
    rate, robot = source.rate_hz("exploy"), source.contract("exploy reads meaning from names")
    if rate != round(rate):
        raise ConfigError(f"rate_hz is {rate:g}; expected a whole number, which is what exploy reads.")
    require_plain_meaning(robot, "exploy")
    named = {part.name: _named(part, INPUTS) for part in tick.observation}
    joints = [_joints(part) for part in tick.observation if part.kind != "command/joint/position"]
    if any(each != joints[0] for each in joints):
        raise ConfigError(f"The observation's joints are {' and '.join(map(', '.join, joints))}; expected the same.")
    commanded = [_joints(part) for part in tick.observation if part.kind == "command/joint/position"]
    action, *others = tick.action
    if others:
        raise ConfigError(
            f"The actions are of several kinds: {', '.join(str(part.kind) for part in tick.action)}; expected one, "
            "since exploy sends a joint one target."
        )
    output = f"output.joint_targets.{ROBOT}"
    own = OUTPUTS.get(action.kind or "")
    if own is None:
        raise ConfigError(f"The actions are {action.kind}; expected one of {', '.join(OUTPUTS)}, which exploy names.")
    _require_units(action)
    named[action.name] = f"{output}.{own}"
    for out, (into, _) in tick.recurrent.items():
        state = into.removesuffix("_in")
        named |= {into: f"memory.{state}.in", out: f"memory.{state}.out"}
    metadata: dict[str, object] = {
        "exploy_version": EXPLOY_VERSION,
        "update_rate": round(rate),
        "decimation": 1,
        "sim_dt": 1 / rate,
        output: {"names": _joints(action), **_gains(tick, action)},
    }
    if joints:
        metadata[f"obj.{ROBOT}.joints"] = {"joint_names": joints[0]}
    if commanded:
        metadata["cmd.joint_pos.target"] = {"joint_names": commanded[0]}
    return _renamed(tick, named, [f"{output}.{each}" for each in ("pos", "vel", "effort") if each != own], metadata)


def _renamed(tick: TickGraph, names: dict[str, str], zeros: Sequence[str], metadata: dict[str, object]) -> TickGraph:
    model = ir.from_proto(onnx.load_model_from_string(tick.graph))
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs):
        value.name = names[str(value.name)]
    size = tick.action[0].size
    for name in zeros:  # exploy sends positions, velocities and efforts, all three
        nothing = ir.tensor(np.zeros((1, size), np.float32), name=f"{name}.zero")
        stored = ir.Value(
            name=nothing.name,
            shape=ir.Shape((1, size)),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=nothing,
        )
        graph.register_initializer(stored)
        node = ir.node("Identity", [stored], num_outputs=1, name=f"node.{name}")
        graph.append(node)
        (value,) = node.outputs
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape((1, size))
        graph.outputs.append(value)
    model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    observation, action = (
        tuple(replace(part, name=names[part.name]) for part in parts) for parts in (tick.observation, tick.action)
    )
    recurrent = {names[out]: (names[into], shape) for out, (into, shape) in tick.recurrent.items()}
    return TickGraph(proto.SerializeToString(deterministic=True), observation, action, recurrent, tick.gains)


def _named(part: Part, names: dict[str, str]) -> str:
    name = names.get(part.kind or "")
    if name is None:
        raise ConfigError(f"The observation has numbers of {part.kind}; expected {', '.join(names)}, as exploy has.")
    _require_units(part)
    return name


def _joints(part: Part) -> list[str]:
    return [str(number.joint) for number in part.numbers]


def _require_units(part: Part) -> None:
    for number in part.numbers:
        if number.unit not in _UNITS:
            raise ConfigError(f"{number.name} is in {number.unit}; expected one of {', '.join(_UNITS)}, as in exploy.")


def _gains(tick: TickGraph, action: Part) -> dict[str, tuple[float, ...]]:
    for name, field in GAINS.items():
        if name not in tick.gains:
            lacking = next(number.name for number in action.numbers if getattr(number, field) is None)
            raise ConfigError(f"{lacking} has no {field} in robot.json; expected one, since exploy sends gains too.")
    return {field: tick.gains[name] for name, field in GAINS.items()}
