"""The tick graph: one control tick of a policy as one ONNX file, for runtimes that know nothing of chunks.

It wraps the graph of a policy folder. The batch is one, no axis is open, and nothing is random. What a chunk leaves for
later ticks is a state that the caller hands back: `queue_in` [1, chunk_size, action_dim] and `state_in` [1, 2], the
actions left of the chunk and the row of the noise table that the next chunk takes. All zeros begin an episode.

Two forms compute the same. `where` runs the network in every tick and takes its chunk where the last one is used up:
constant time, no control flow. `if` runs it only then, in the branch of the graph's one If.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from meam_export.deploy.parts import GAINS, Part, action_parts, observation_parts
from meam_policy.errors import ConfigError
from meam_policy.extras import needs
from meam_policy.robot import RobotContract
from meam_policy.robot.limits import ActionLimits
from meam_policy.spec import PolicySpec
from meam_policy.typed import typed_fields

with needs("The tick graph", "onnx", "deploy"):
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    from meam_export.graph.writer import IR_VERSION, OPSET, GraphWriter

__all__ = [
    "LARGEST_TABLE",
    "Form",
    "Noise",
    "TickGraph",
    "TickSettings",
    "build_plain",
    "build_tick",
    "noise_table",
    "with_metadata",
    "zero_state",
]

Form = Literal["where", "if"]
"""Whether the network runs in every tick, or only where a chunk begins."""

Noise = Literal["table", "zero", "input"]
"""Where a chunk's noise comes from: rows of a table in the graph, used in turn; nothing but zeros; or an input."""

LARGEST_TABLE = 2**20
"""Bytes of the noise table at most."""

_ROWS = 64


@dataclass(frozen=True)
class TickSettings:
    """How a tick graph is made.

    Attributes:
        form: "where" or "if".
        noise: "table", "zero" or "input"; None is the policy's own rule: zero if it acts by zero noise, else a table,
            scaled by the rule.
        rows: Rows of the noise table; after the last the first is used again. 1 or more.
        seed: Seed of the table, 0 or more.
    """

    form: Form = "where"
    noise: Noise | None = None
    rows: int = _ROWS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: one is out of range.
        """
        typed_fields(self)
        for name, known in (("form", get_args(Form)), ("noise", (None, *get_args(Noise)))):
            if getattr(self, name) not in known:
                expected = ", ".join(each for each in known if each)
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {expected}.")
        if self.rows < 1 or self.seed < 0:
            raise ConfigError(f"rows is {self.rows} and seed is {self.seed}; expected rows >= 1 and seed >= 0.")

    def noise_of(self, spec: PolicySpec) -> Noise:
        """Where the noise of a policy's chunks comes from."""
        return self.noise or ("zero" if spec.acting.noise_scale == 0 else "table")


@dataclass(frozen=True)
class TickGraph:
    """A tick graph and what a runtime must know of it.

    Attributes:
        graph: Contents of the ONNX file.
        observation: Parts of the observation, which are the first inputs, each [1, size].
        action: Parts of the action, each [1, size], if the graph returns parts; else `action` [1, action_dim] alone.
        recurrent: For every state, its input's name and shape by its output's name. Zeros begin an episode.
        gains: The contract's stiffness as `kp` and damping as `kd`, a number for each of the action; each where every
            action has one. Outputs [1, action_dim] if they were asked for.
        noise_dim: Numbers of the input `noise` [1, noise_dim]; 0 if it has none.
    """

    graph: bytes
    observation: tuple[Part, ...]
    action: tuple[Part, ...]
    recurrent: Mapping[str, tuple[str, tuple[int, ...]]]
    gains: Mapping[str, tuple[float, ...]]
    noise_dim: int = 0


def noise_table(spec: PolicySpec, settings: TickSettings) -> NDArray[np.float32]:
    """The noise table [rows, noise_dim]: standard normal, scaled by the policy's rule.

    Raises:
        ConfigError: it would be larger than `LARGEST_TABLE`.
    """
    size = 4 * settings.rows * spec.noise_dim
    if size > LARGEST_TABLE:
        raise ConfigError(
            f"rows is {settings.rows}, a noise table of {size} bytes; expected at most {LARGEST_TABLE}, "
            f"{LARGEST_TABLE // (4 * spec.noise_dim)} rows of this policy."
        )
    table = np.random.default_rng((settings.seed, 2)).standard_normal((settings.rows, spec.noise_dim), np.float32)
    return table * np.float32(spec.acting.noise_scale)


def build_tick(
    graph: bytes,
    spec: PolicySpec,
    robot: RobotContract | None = None,
    settings: TickSettings | None = None,
    *,
    in_parts: bool = False,
    gains: bool = False,
) -> TickGraph:
    """Write the tick graph of a policy.

    Its actions are those of `MeamPolicy.select_action` with the rows of `noise_table`, bit for bit: within the box, and
    within the limits and the `max_rate` of the robot's contract, whose last action is a further state, `last_in`
    [1, action_dim + 1]. Whatever queue is handed back, actions are within the box. What needs a clock or a decision
    stays with the runtime: NaN, which passes through, age, unfamiliarity, hold.

    Args:
        graph: Contents of the policy's ONNX file, or of one of its variants'.
        spec: The policy's spec, with that variant's integration.
        robot: The robot's contract; None if there is none.
        settings: How it is made; None takes the defaults.
        in_parts: Return one output for each kind of action of the contract, rather than `action`.
        gains: Return the contract's stiffness and damping too, as `kp` and `kd` [1, action_dim], where it has them.

    Raises:
        ConfigError: the noise table is too large, the policy takes a prefix, or its actions are whole numbers or
            float16, which no runtime of tick graphs takes.
    """
    settings, contract = settings or TickSettings(), robot or RobotContract()
    wrapper = _Wrapper(graph, spec, contract)
    begins, row = wrapper.begins(settings, spec)
    chunk = wrapper.chunk(begins, settings.form)
    action = wrapper.limited(wrapper.taken(chunk, begins), begins)
    wrapper.give_back(chunk, begins, row)
    parts = wrapper.give(action, contract, in_parts)
    if gains:
        wrapper.give_gains()
    about = {"meam_tick": settings.form, "meam_noise": settings.noise_of(spec)}
    if settings.noise_of(spec) == "table":
        about |= {"meam_noise_rows": str(settings.rows), "meam_noise_seed": str(settings.seed)}
    return wrapper.finished(about, parts)


def build_plain(
    graph: bytes,
    spec: PolicySpec,
    robot: RobotContract | None = None,
    *,
    names: tuple[str, str] = ("observation", "actions"),
    whole: bool = False,
) -> TickGraph:
    """Write a policy without a state: one observation [1, n] in, and out the first action of its chunk from zero noise.

    It is another policy than the chunked one, for consumers that know nothing else.

    Args:
        graph: Contents of the policy's ONNX file, or of one of its variants'.
        spec: The policy's spec, with that variant's integration.
        robot: The robot's contract, of which only limits fit into it.
        names: Names of the input and the output.
        whole: Return all actions that are executed of the chunk, [1, execute_steps, action_dim], for a consumer that
            queues them; else the first, [1, action_dim].

    Raises:
        ConfigError: as `build_tick`; or the contract has a `max_rate`, which needs a memory.
    """
    contract = robot or RobotContract()
    if np.isfinite(ActionLimits.of(contract, spec).max_change).any():
        raise ConfigError(
            "robot.json has a max_rate, and a graph without a state has no memory of the last action to keep it; "
            "expected none. Take the tick graph, or export the policy with a robot.toml without max_rate where the "
            "robot's own controller limits it."
        )
    wrapper = _Wrapper(graph, spec, contract, one_part=names[0])
    chunk = wrapper.alone()
    if whole:
        wrapper.output(names[1], wrapper.limited(wrapper.executed(chunk), None), spec.execute_steps, spec.action_dim)
    else:
        wrapper.output(names[1], wrapper.limited(wrapper.first(chunk), None), spec.action_dim)
    form = "chunk" if whole else "plain"
    return wrapper.finished({"meam_tick": form, "meam_noise": "zero"}, ())


def with_metadata(graph: bytes, about: Mapping[str, str]) -> bytes:
    """An ONNX file with further metadata, such as what it returned."""
    model = onnx.load_model_from_string(graph)
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString(deterministic=True)


class _Wrapper:
    """A tick graph under construction around a policy's graph."""

    def __init__(self, graph: bytes, spec: PolicySpec, robot: RobotContract, *, one_part: str = "") -> None:
        _require_fitting(spec)
        self._spec, self._limits = spec, ActionLimits.of(robot, spec).rounded(np.float32)
        self._joints, self._gains = ",".join(robot.joints or ()), _gains(robot)
        self._model = ir.from_proto(onnx.load_model_from_string(graph))
        inner = self._model.graph
        names = [value.name for value in inner.inputs]
        if names != ["observation", "noise"]:
            raise ConfigError(
                f"The graph has the inputs {', '.join(map(str, names))}; expected observation and noise alone. A "
                "variant for real-time chunking has no tick graph: take another one."
            )
        self._digest = hashlib.sha256(graph).hexdigest()
        self._write = GraphWriter()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._recurrent: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._noise_dim = 0
        self._weights: list[ir.Value] = []
        self._observation, self._noise = inner.inputs
        self._chunk = next(value for value in inner.outputs if value.name == "actions")
        inner.outputs[:] = [self._chunk]
        RemoveUnusedNodesPass()(self._model)
        # With a slash, which no part's name has: an observation's key may be called as a weight is.
        for weight in list(inner.initializers.values()):
            weight.name = f"policy/{weight.name}"
        for node in inner:
            for value in node.outputs:
                value.name, value.shape = f"policy/{value.name}", None  # the shape has an open batch
        self.parts = (Part(one_part, tuple(range(spec.observation_dim))),) if one_part else ()
        self.parts = self.parts or observation_parts(spec, robot)
        ir.convenience.replace_all_uses_with(self._observation, self._flat_observation())

    def begins(self, settings: TickSettings, spec: PolicySpec) -> tuple[ir.Value, ir.Value | None]:
        """Whether a chunk begins, bool [1, 1], and the row of the table that it takes, float32 [1, 1]."""
        write = self._write
        self._queue = self._state("queue", (1, spec.chunk_size, spec.action_dim))
        self._left, self._row = write.ops("Split", [self._state("state", (1, 2))], 2, axis=1, num_outputs=2)
        begins = write.op("Not", write.op("Less", write.constant(0.5), self._left))  # NaN begins a chunk too
        source, row = settings.noise_of(spec), None
        if source == "input":
            self._noise_dim = spec.noise_dim
            noise = self._input("noise", spec.noise_dim)
        elif source == "table":
            # A runtime may hand back anything: no row but one of the table.
            known = write.op("Less", self._row, write.constant(settings.rows - 0.5))
            row = write.op("Where", known, self._row, write.constant(np.zeros((1, 1))))
            row = write.op("Clip", row, write.constant(0.0), write.constant(settings.rows - 1.0))
            index = write.op("Cast", write.op("Squeeze", row, write.integers(1)), to=int(ir.DataType.INT64))
            noise = write.op("Gather", write.constant(noise_table(spec, settings)), index, axis=0)
            after = write.op("Add", row, write.constant(1.0))
            last = write.op("Less", write.constant(settings.rows - 1.5), row)
            row = write.op("Where", last, write.constant(np.zeros((1, 1))), after)
        else:
            noise = write.constant(np.zeros((1, spec.noise_dim)))
        self._feed_noise(noise)
        return begins, row

    def alone(self) -> ir.Value:
        """The chunk of this very observation, from zero noise."""
        self._feed_noise(self._write.constant(np.zeros((1, self._spec.noise_dim))))
        return self._inlined()

    def chunk(self, begins: ir.Value, form: Form) -> ir.Value:
        """The chunk that is executed now [1, chunk_size, action_dim]."""
        write = self._write
        if form == "where":
            return write.op("Where", write.op("Unsqueeze", begins, write.integers(2)), self._inlined(), self._queue)
        condition = write.op("Reshape", begins, write.integers())
        passing = ir.node("Identity", [self._queue], num_outputs=1)
        kept = passing.outputs[0]
        shape = (1, self._spec.chunk_size, self._spec.action_dim)
        for name, value in (("chunk/begun", self._chunk), ("chunk/kept", kept)):
            value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape(shape)
        nodes, weights = self._taken_out()
        begun = ir.Graph([], [self._chunk], nodes=nodes, initializers=weights, name="chunk_begins")
        rest = ir.Graph([], [kept], nodes=[passing], name="chunk_goes_on")
        branches = (ir.AttrGraph("then_branch", begun), ir.AttrGraph("else_branch", rest))
        node = ir.Node("", "If", [condition], branches, num_outputs=1)
        self._write.nodes.append(node)
        return node.outputs[0]

    def taken(self, chunk: ir.Value, begins: ir.Value) -> ir.Value:
        """The chunk's next action [1, action_dim]."""
        write, executed = self._write, float(self._spec.execute_steps)
        left = write.op("Where", begins, write.constant(executed), self._left)
        position = write.op("Sub", write.constant(executed), left)
        position = write.op("Clip", position, write.constant(0.0), write.constant(executed - 1))
        index = write.op("Cast", write.op("Squeeze", position, write.integers(1)), to=int(ir.DataType.INT64))
        self._left_after = write.op("Sub", left, write.constant(1.0))
        return write.op("Squeeze", write.op("Gather", chunk, index, axis=1), write.integers(1))

    def first(self, chunk: ir.Value) -> ir.Value:
        """The chunk's first action [1, action_dim]."""
        write = self._write
        return write.op("Squeeze", write.op("Gather", chunk, write.integers(0), axis=1), write.integers(1))

    def executed(self, chunk: ir.Value) -> ir.Value:
        """The chunk's actions that are executed [1, execute_steps, action_dim]."""
        write, count = self._write, self._spec.execute_steps
        if count == self._spec.chunk_size:
            return chunk
        return write.op("Slice", chunk, write.integers(0), write.integers(count), write.integers(1))

    def limited(self, action: ir.Value, begins: ir.Value | None) -> ir.Value:
        """The action within the box and the contract's limits and rates, these in float64 as `SafetyShell.limit`."""
        limits, write = self._limits, self._write
        # Also of the box: the queue is what the runtime hands back, and float64 bounds round outwards in the policy.
        action = write.op("Min", write.op("Max", action, write.constant(limits.low)), write.constant(limits.high))
        if begins is None or not np.isfinite(limits.max_change).any():
            return action
        if self._spec.action_space.dtype != np.float32:
            raise ConfigError(
                f"robot.json has a max_rate, and the actions are {self._spec.action_space.dtype}; expected float32: a "
                "tick graph's last action is float32, and would differ from the policy's. Act with MeamPolicy."
            )
        count = self._spec.action_dim
        state = self._state("last", (1, count + 1))
        last, acted = write.ops("Split", [state, write.integers(count, 1)], 2, axis=1)
        wide, last = (write.op("Cast", each, to=int(ir.DataType.DOUBLE)) for each in (action, last))
        # The gate lets no infinity through where it is added.
        change = write.store(np.where(np.isfinite(limits.max_change), limits.max_change, 1e300))
        slow = write.op("Max", wide, write.op("Sub", last, change))
        slow = write.op("Min", slow, write.op("Add", last, change))
        # Again: the last action is what the runtime hands back.
        slow = write.op("Min", write.op("Max", slow, write.store(limits.low)), write.store(limits.high))
        first = write.op("Less", acted, write.constant(0.5))
        found = write.op("Cast", write.op("Where", first, wide, slow), to=int(ir.DataType.FLOAT))
        self._give_state("last", write.op("Concat", found, write.constant(np.ones((1, 1))), axis=1))
        return found

    def give_back(self, chunk: ir.Value, begins: ir.Value, row: ir.Value | None) -> None:
        """Return the queue and the state for the next tick."""
        write = self._write
        row = self._row if row is None else write.op("Where", begins, row, self._row)
        self._give_state("queue", write.op("Identity", chunk))
        self._give_state("state", write.op("Concat", self._left_after, row, axis=1))

    def give(self, action: ir.Value, robot: RobotContract, in_parts: bool) -> tuple[Part, ...]:
        """Return the action: whole, or in the contract's parts."""
        spec, write = self._spec, self._write
        parts = action_parts(spec, robot) if in_parts else (Part("action", tuple(range(spec.action_dim))),)
        for part in parts:
            own = write.op("Identity", action)
            if part.indices != tuple(range(spec.action_dim)):
                own = write.op("Gather", action, write.integers(*part.indices), axis=1)
            self.output(part.name, own, part.size)
        return parts

    def give_gains(self) -> None:
        """Return the contract's gains, where every action has them."""
        for name, gains in self._gains.items():
            self.output(name, self._write.op("Identity", self._write.constant(np.array([gains]))), len(gains))

    def output(self, name: str, value: ir.Value, *size: int) -> None:
        """Make a value [1, *size] an output of the graph."""
        value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape((1, *size))
        self._outputs.append(value)

    def finished(self, about: Mapping[str, str], action: tuple[Part, ...]) -> TickGraph:
        """The graph as a file, checked by `onnx.checker`."""
        for index, node in enumerate(self._write.nodes):
            node.name = node.name or f"tick_{node.op_type}_{index}"
            for number, value in enumerate(node.outputs):
                value.name = value.name or f"tick/{index}_{number}"
        for index, constant in enumerate(self._write.initializers):
            constant.name = f"tick/constant_{index}"
            assert constant.const_value is not None
            constant.const_value.name = constant.name
        outer = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._write.nodes,
            initializers=[*self._write.initializers, *self._weights],
            opset_imports=dict(self._model.graph.opset_imports) | {"": OPSET},
            name="meam_policy_tick",
        )
        # Elsewhere `action_scale` means to multiply the output by it; joints are those of the contract.
        dropped = ("action_scale", "action_offset", "joint_names")
        metadata = {name: value for name, value in self._model.metadata_props.items() if name not in dropped}
        metadata |= {"joint_names": self._joints} if self._joints else {}
        metadata |= {**about, "meam_graph_sha256": self._digest}
        model = ir.Model(outer, ir_version=IR_VERSION, producer_name="meam-policy", metadata_props=metadata)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        data = proto.SerializeToString(deterministic=True)
        return TickGraph(data, self.parts, action, self._recurrent, self._gains, self._noise_dim)

    def _inlined(self) -> ir.Value:
        """The policy's nodes, among those of the tick graph; their chunk."""
        nodes, self._weights = self._taken_out()
        self._write.nodes += nodes
        self._chunk.name = "chunk/begun"
        return self._chunk

    def _taken_out(self) -> tuple[list[ir.Node], list[ir.Value]]:
        """The policy's nodes and weights, which no longer belong to its own graph."""
        inner = self._model.graph
        nodes, weights = list(inner), list(inner.initializers.values())
        inner.outputs.clear()
        inner.remove(nodes)
        inner.initializers.clear()
        return nodes, weights

    def _flat_observation(self) -> ir.Value:
        """The flat observation [1, observation_dim] from its parts, less the policy's offset."""
        write, spec = self._write, self._spec
        inputs = [self._input(part.name, part.size) for part in self.parts]
        flat = inputs[0] if len(inputs) == 1 else write.op("Concat", *inputs, axis=1)
        order = np.argsort([index for part in self.parts for index in part.indices])
        if not np.array_equal(order, np.arange(spec.observation_dim)):
            flat = write.op("Gather", flat, write.integers(*order), axis=1)
        if any(spec.observation_offset):
            wide = write.op("Cast", flat, to=int(ir.DataType.DOUBLE))
            wide = write.op("Sub", wide, write.store(np.array(spec.observation_offset)))
            flat = write.op("Cast", wide, to=int(ir.DataType.FLOAT))
        return flat

    def _feed_noise(self, noise: ir.Value) -> None:
        best_of = self._spec.integration.best_of
        if best_of > 1:
            noise = self._write.op("Reshape", noise, self._write.integers(1, best_of, self._spec.chunk_dim))
        ir.convenience.replace_all_uses_with(self._noise, noise)

    def _input(self, name: str, *size: int) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape((1, *size)), type=ir.TensorType(ir.DataType.FLOAT))
        self._inputs.append(value)
        return value

    def _state(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        self._recurrent[f"{name}_out"] = f"{name}_in", shape
        return self._input(f"{name}_in", *shape[1:])

    def _give_state(self, name: str, value: ir.Value) -> None:
        self.output(f"{name}_out", value, *self._recurrent[f"{name}_out"][1][1:])


def _gains(robot: RobotContract) -> dict[str, tuple[float, ...]]:
    found = {name: tuple(getattr(number, field) for number in robot.action) for name, field in GAINS.items()}
    return {name: gains for name, gains in found.items() if gains and None not in gains}


def _require_fitting(spec: PolicySpec) -> None:
    dtype = spec.action_space.dtype
    if dtype not in (np.float32, np.float64):
        raise ConfigError(
            f"The actions are {dtype}; expected float32 or float64, the numbers that a tick graph returns. Act with "
            "MeamPolicy, which rounds them."
        )


def zero_state(recurrent: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, NDArray[Any]]:
    """The state that begins an episode, by the names of the inputs."""
    return {name: np.zeros(shape, np.float32) for name, shape in recurrent.values()}
