"""Tick graphs act like `MeamPolicy.select_action`, bit for bit, in every form; the gate knows their one If."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from meam_export.deploy.source import Source
from meam_export.deploy.tick_graph import LARGEST_TABLE, TickSettings, build_plain, build_tick, noise_table
from meam_export.deploy.tick_player import TickPlayer, check_tick, drawn_observations, write_tick
from meam_policy import BoxSpec, ConfigError, FormatError, MeamPolicy, ParityError
from meam_policy.acting.observation import unflatten_observation
from meam_policy.graph.graph_check import check_graph
from meam_policy.robot import RobotContract

TICKS, EPISODES = 400, 3
FORMS = ("where", "if")
NOISES = ("table", "zero", "input")
Make = Callable[..., Source]
Contract = Callable[..., RobotContract]


def played(source: Source, made: TickSettings, ticks: int = TICKS) -> tuple[int, MeamPolicy]:
    """Actions of three episodes that differ from those of `select_action` with the same noise, and the policy."""
    tick, policy = build_tick(source.graph, source.spec, source.robot, made), source.acting()
    player, spec = TickPlayer(tick), source.spec
    generator, differing = np.random.default_rng(5), 0
    source_of_noise = made.noise_of(spec)
    table = noise_table(spec, made)
    for episode in range(EPISODES):
        player.reset()
        policy.reset()
        noise = np.zeros(spec.noise_dim, np.float32)
        for step, row in enumerate(drawn_observations(spec, ticks, 11 + episode)):
            if step % spec.execute_steps == 0:
                chunk = step // spec.execute_steps
                drawn = {"table": table[chunk % made.rows], "zero": noise * 0}
                noise = drawn.get(source_of_noise, generator.standard_normal(spec.noise_dim, np.float32))
            found = player.tick(row, noise)["action"]
            observation = unflatten_observation(spec, row.astype(np.float64))
            wanted = np.asarray(policy.select_action(observation, noise=noise)).reshape(1, -1)
            differing += not np.array_equal(found, wanted.astype(np.float32))
    return differing, policy


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_acts_like_select_action(make_source: Make, form: Any, noise: Any) -> None:
    differing, policy = played(make_source(), TickSettings(form, noise, rows=5))
    assert differing == 0
    assert policy.health().inferences == EPISODES * -(-TICKS // 3)


CASES: dict[str, dict[str, Any]] = {
    "best of 3": {"best_of": 3},
    "int8": {"precision": "int8"},
    "fp16": {"precision": "fp16"},
    "half the noise": {"noise_scale": 0.5},
    "one action of each chunk": {"execute_steps": 1},
    "all actions of each chunk": {"execute_steps": 4},
    "a chunk of one": {"chunk_size": 1, "execute_steps": 1},
    "map coordinates": {"observation_offset": (0.0, 4.5e5, 0.0, -2.25)},
    "a float64 box": {"action": BoxSpec((2,), "float64", (-1.0, -2.0), (1.0, 0.5))},
    "a matrix of actions": {"action": BoxSpec((1, 2), "float32", (-1.0, -2.0), (1.0, 0.5))},
    "keys called as the graph's own values are": {
        "observation": tuple(
            BoxSpec((1,), "float32", (-np.inf,), (np.inf,), key) for key in ("c0", "state in", "noise", "tick_1")
        )
    },
    "a Dict observation": {
        "observation": (
            BoxSpec((1, 2), "float32", (-np.inf,) * 2, (np.inf,) * 2, "goal x/y"),
            BoxSpec((2,), "float64", (-np.inf,) * 2, (np.inf,) * 2, "joints"),
        )
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_other_policies_act_like_select_action(make_source: Make, case: str, form: Any) -> None:
    source = make_source(**CASES[case])
    assert played(source, TickSettings(form, rows=3), ticks=40)[0] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [None, 0.7])
def test_the_contracts_limits_and_rates_hold_in_the_graph(
    make_source: Make, make_contract: Contract, form: Any, rate: float | None
) -> None:
    source = make_source(make_contract(rate))
    differing, policy = played(source, TickSettings(form, rows=7))
    assert differing == 0
    assert policy.health().limited > 100
    assert (policy.health().rate_limited > 100) == (rate is not None)


def test_parts_are_the_contracts_kinds_in_the_policys_order(make_source: Make, make_contract: Contract) -> None:
    source = make_source(make_contract(0.7))
    tick = build_tick(source.graph, source.spec, source.robot, in_parts=True, gains=True)
    assert [(part.name, part.indices) for part in tick.observation] == [
        ("state_joint_position", (0, 2)),
        ("state_joint_velocity", (1, 3)),
    ]
    assert [part.name for part in tick.action] == ["target_joint_position"]
    row = drawn_observations(source.spec, 1, 0)[0]
    found = TickPlayer(tick).tick(row)
    whole = TickPlayer(build_tick(source.graph, source.spec, source.robot)).tick(row)
    np.testing.assert_array_equal(found["target_joint_position"], whole["action"])
    np.testing.assert_array_equal(found["kp"], [[80, 80]])
    np.testing.assert_array_equal(found["kd"], [[2, 2]])


def test_a_dict_observation_has_a_part_for_each_key(make_source: Make) -> None:
    source = make_source(**CASES["a Dict observation"])
    parts = build_tick(source.graph, source.spec).observation
    assert [(part.name, part.size) for part in parts] == [("goal_x_y", 2), ("joints", 2)]


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_open_or_random_and_the_batch_is_one(make_source: Make, form: Any) -> None:
    source = make_source()
    model = onnx.load_model_from_string(build_tick(source.graph, source.spec, None, TickSettings(form)).graph)
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert all(dim.HasField("dim_value") and dim.dim_value > 0 for dim in dims)
        assert dims[0].dim_value == 1
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert b"Random" not in model.SerializeToString()
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)  # what onnxruntime 1.17 and later read


def test_the_metadata_say_what_it_is_and_what_it_was_made_from(make_source: Make) -> None:
    source = make_source()
    tick = build_tick(source.graph, source.spec, None, TickSettings("if", rows=5, seed=3))
    metadata = check_graph(tick.graph, conditional=True).metadata
    own = {"meam_tick": "if", "meam_noise": "table", "meam_noise_rows": "5", "meam_noise_seed": "3"}
    assert own.items() <= metadata.items()
    assert metadata["meam_graph_sha256"] == source.sha256
    assert metadata["spec_sha256"] == source.spec.identity


def test_a_policy_that_acts_by_zero_noise_needs_no_table(make_source: Make) -> None:
    source = make_source(noise_scale=0.0)
    assert TickSettings().noise_of(source.spec) == "zero"
    graph = build_tick(source.graph, source.spec).graph
    assert len(graph) < len(build_tick(source.graph, source.spec, None, TickSettings(noise="table")).graph)
    assert played(source, TickSettings(), ticks=20)[0] == 0


def test_a_state_of_garbage_reads_no_row_and_no_action_that_is_not_there(
    make_source: Make, make_contract: Contract
) -> None:
    source = make_source(make_contract(0.7))
    tick = build_tick(source.graph, source.spec, source.robot, TickSettings(rows=3))
    player, row = TickPlayer(tick), drawn_observations(source.spec, 1, 0)[0]
    for state in ([-7, -1e9], [1e9, 1e9], [0.3, 2.7], [2, 1e30], [np.nan, np.nan], [np.inf, -np.inf]):
        player._state = {
            "queue_in": np.zeros((1, 4, 2), np.float32),
            "state_in": np.array([state], np.float32),
            "last_in": np.array([[1e9, -1e9, 1]], np.float32),
        }
        action = player.tick(row)["action"][0]
        assert (action <= 0.3).all()
        assert (action >= [-1, -2]).all()


@pytest.mark.parametrize("robot", [False, True])
def test_float64_bounds_hold_in_the_graphs_float32(make_source: Make, make_contract: Contract, robot: bool) -> None:
    low, high = (-0.1, -1 / 3), (0.4, 0.6)  # of which float32 rounds all outwards
    assert (np.abs(np.array([*low, *high], np.float32)) > np.abs([*low, *high])).all()
    source = make_source(
        make_contract() if robot else None,
        action=BoxSpec((2,), "float64", low, high),
        action_scale=(9.0, 9.0),
        action_offset=(0.0, 0.0),
    )
    player, policy = TickPlayer(build_tick(source.graph, source.spec, source.robot)), source.acting()
    plain = TickPlayer(build_plain(source.graph, source.spec, source.robot))
    rows = drawn_observations(source.spec, 200, 0)
    upper = np.minimum(high, 0.3) if robot else high
    for found in ([player.tick(row)["action"][0] for row in rows], [plain.tick(row)["actions"][0] for row in rows]):
        actions = np.array(found, np.float64)
        assert (actions >= low).all()
        assert (actions <= upper).all()
        for side in (low, upper):  # and are reached
            assert (np.isclose(actions, side, rtol=1e-6, atol=0).any(axis=0)).all()
    assert check_tick(build_tick(source.graph, source.spec, source.robot), policy, TickSettings()).ticks > 60


@pytest.mark.parametrize("form", FORMS)
def test_a_queue_of_garbage_gives_actions_within_the_box_or_nan(make_source: Make, form: Any) -> None:
    source = make_source()
    player = TickPlayer(build_tick(source.graph, source.spec, None, TickSettings(form)))
    row = drawn_observations(source.spec, 1, 0)[0]
    for value, expected in ((1e9, [1, 0.5]), (-1e9, [-1, -2]), (np.inf, [1, 0.5]), (np.nan, [np.nan, np.nan])):
        player._state = {
            "queue_in": np.full((1, 4, 2), value, np.float32),
            "state_in": np.array([[2, 0]], np.float32),
        }
        np.testing.assert_array_equal(player.tick(row)["action"][0], np.array(expected, np.float32))


def test_old_metadata_that_elsewhere_mean_something_else_are_left_out(
    make_source: Make, make_contract: Contract
) -> None:
    source = make_source(make_contract())
    model = onnx.load_model_from_string(source.graph)
    for key, value in {"action_scale": "2,2", "action_offset": "0,0", "joint_names": "x,y"}.items():
        model.metadata_props.add(key=key, value=value)
    graph = model.SerializeToString()
    metadata = check_graph(build_tick(graph, source.spec, source.robot).graph).metadata
    assert not {"action_scale", "action_offset"} & metadata.keys()
    assert metadata["joint_names"] == "a,b"
    assert "joint_names" not in check_graph(build_tick(graph, source.spec).graph).metadata


def test_a_rate_on_float64_actions_is_refused_by_name(make_source: Make, make_contract: Contract) -> None:
    wide = make_source(make_contract(0.7), action=BoxSpec((2,), "float64", (-1.0, -2.0), (1.0, 0.5)))
    with pytest.raises(ConfigError, match="has a max_rate, and the actions are float64; expected float32"):
        build_tick(wide.graph, wide.spec, wide.robot)


def test_plain_is_the_first_action_from_zero_noise(make_source: Make, make_contract: Contract) -> None:
    source = make_source(make_contract())
    plain = TickPlayer(build_plain(source.graph, source.spec, source.robot))
    policy = source.acting()
    row, *others = drawn_observations(source.spec, 50, 0)
    for each in (*others, row):
        policy.reset()
        np.testing.assert_array_equal(plain.tick(each)["actions"][0], policy.act(each, deterministic=True))
    whole = TickPlayer(build_plain(source.graph, source.spec, source.robot, names=("state", "action"), whole=True))
    policy.reset()
    np.testing.assert_array_equal(
        whole.tick(row)["action"][0], [policy.act(row, deterministic=True) for _ in range(source.spec.execute_steps)]
    )


def test_what_has_no_tick_graph_is_refused_by_name(make_source: Make, make_contract: Contract) -> None:
    source = make_source()
    with pytest.raises(ConfigError, match=f"expected at most {LARGEST_TABLE}, 32768 rows of this policy"):
        build_tick(source.graph, source.spec, None, TickSettings(rows=40_000))
    whole = replace(source.spec, action=BoxSpec((2,), "int64", (-1, -2), (1, 1)))
    with pytest.raises(ConfigError, match="The actions are int64; expected float32 or float64"):
        build_tick(source.graph, whole)
    continued = make_source(takes_prefix=True, name="continued")
    with pytest.raises(ConfigError, match="prefix, prefix_weight; expected observation and noise alone"):
        build_tick(continued.graph, continued.spec)
    limited = make_source(make_contract(0.7), name="limited")
    with pytest.raises(ConfigError, match="a graph without a state has no memory"):
        build_plain(limited.graph, limited.spec, limited.robot)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "loop"}, "form is .*loop.*; expected one of where, if"),
        ({"noise": "gauss"}, "noise is .*gauss.*; expected one of table, zero, input"),
        ({"rows": 0}, "rows is 0 and seed is 0; expected rows >= 1"),
        ({"seed": -1}, "seed is -1; expected rows >= 1 and seed >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TickSettings(**settings)


def test_a_graph_that_acts_otherwise_is_not_written(make_source: Make, tmp_path: Any, monkeypatch: Any) -> None:
    source = make_source()
    other = build_tick(source.graph, source.spec, None, TickSettings(seed=1))
    with pytest.raises(ParityError, match="differs from the policy by .* at tick 0 of episode 0; expected the same"):
        check_tick(other, source.acting(), TickSettings(seed=0))
    monkeypatch.setattr("meam_export.deploy.tick_player.build_tick", lambda *_: other)
    with pytest.raises(ParityError, match=r"^t\.onnx differs"):
        write_tick(source, tmp_path / "t.onnx")
    assert not (tmp_path / "t.onnx").exists()


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; import meam_export.commands.deploy; "
        "assert 'torch' not in sys.modules; assert not any(m.startswith('meam_training') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The gate: one If, in a tick graph, that runs the network in one branch and does nothing in the other.


def with_if(then: Any, other: Any, outputs: int = 1) -> bytes:
    """A graph with one If of these branches, on a condition made of its input."""
    node = helper.make_node("If", ["begins"], [f"y{i}" for i in range(outputs)], then_branch=then, else_branch=other)
    less = helper.make_node("Less", ["x", "limit"], ["begins"])
    one = helper.make_tensor("limit", onnx.TensorProto.FLOAT, [], [1.0])
    value = helper.make_tensor_value_info
    ends = [value(f"y{i}", onnx.TensorProto.FLOAT, []) for i in range(outputs)]
    graph = helper.make_graph([less, node], "g", [value("x", onnx.TensorProto.FLOAT, [])], ends, [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return model.SerializeToString()


def branch(*nodes: Any, end: str, weights: Any = (), inputs: Any = ()) -> Any:
    value = helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, [])
    return helper.make_graph(list(nodes), "branch", list(inputs), [value], list(weights))


WEIGHT = helper.make_tensor("w", onnx.TensorProto.FLOAT, [], [3.0])
NETWORK = branch(helper.make_node("Mul", ["x", "w"], ["a"]), end="a", weights=[WEIGHT])
PASSING = branch(helper.make_node("Identity", ["x"], ["b"]), end="b")


def test_the_gate_admits_the_if_of_a_tick_graph_and_no_other() -> None:
    graph = with_if(NETWORK, PASSING)
    summary = check_graph(graph, conditional=True)
    assert summary.operators == {"Identity": 1, "If": 1, "Less": 1, "Mul": 1}
    assert summary.weight_bytes == 8
    with pytest.raises(FormatError, match="uses the operator If, which runs subgraphs"):
        check_graph(graph)


nested = helper.make_node("If", ["begins"], ["a"], then_branch=NETWORK, else_branch=PASSING)
file = helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
file.ClearField("float_data")
file.data_location = onnx.TensorProto.EXTERNAL
file.external_data.add(key="location", value="/etc/passwd")

REFUSED: dict[str, tuple[bytes, str]] = {
    "a second branch that computes": (with_if(NETWORK, NETWORK), "else_branch computes something"),
    "an If in a branch": (with_if(branch(nested, end="a"), PASSING), "uses the operator If"),
    "a loop in a branch": (
        with_if(branch(helper.make_node("Loop", ["", "begins"], ["a"], body=PASSING), end="a"), PASSING),
        "uses the operator Loop",
    ),
    "a name of nowhere": (
        with_if(branch(helper.make_node("Mul", ["x", "v"], ["a"]), end="a"), PASSING),
        "nothing before it defines",
    ),
    "a result of nowhere": (
        with_if(branch(helper.make_node("Neg", ["x"], ["a"]), end="x"), PASSING),
        "does not define",
    ),
    "an input of a branch": (
        with_if(
            branch(
                helper.make_node("Neg", ["x"], ["a"]),
                end="a",
                inputs=[helper.make_tensor_value_info("i", onnx.TensorProto.FLOAT, [])],
            ),
            PASSING,
        ),
        "a branch that has inputs",
    ),
    "a weight from another file": (
        with_if(branch(helper.make_node("Mul", ["x", "w"], ["a"]), end="a", weights=[file]), PASSING),
        "external",
    ),
    "a weight that is NaN": (
        with_if(
            branch(
                helper.make_node("Mul", ["x", "w"], ["a"]),
                end="a",
                weights=[helper.make_tensor("w", onnx.TensorProto.FLOAT, [], [float("nan")])],
            ),
            PASSING,
        ),
        "non-finite",
    ),
    "two outputs": (with_if(NETWORK, PASSING, outputs=2), "1 inputs and 2 outputs"),
    "one name in both branches": (
        with_if(NETWORK, branch(helper.make_node("Identity", ["x"], ["a"]), end="a")),
        "defined twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_gate_refuses_other_ifs(case: str) -> None:
    graph, message = REFUSED[case]
    with pytest.raises(FormatError, match=message):
        check_graph(graph, conditional=True)


def test_a_name_of_a_branch_is_not_read_outside_it() -> None:
    model = onnx.load_model_from_string(with_if(NETWORK, PASSING))
    model.graph.node.append(helper.make_node("Neg", ["a"], ["z"]))
    with pytest.raises(FormatError, match='Neg reads "a", which nothing before it defines'):
        check_graph(model.SerializeToString(), conditional=True)
    del model.graph.node[-1]
    model.graph.node.append(helper.make_node("If", ["begins"], ["z"], then_branch=NETWORK, else_branch=PASSING))
    with pytest.raises(FormatError, match="uses the operator If"):
        check_graph(model.SerializeToString(), conditional=True)


def test_the_costs_of_an_if_are_those_of_its_larger_branch() -> None:
    value = helper.make_tensor_value_info
    big = helper.make_tensor("big", onnx.TensorProto.FLOAT, [1, 2**20], np.zeros(2**20, np.float32).tobytes(), raw=True)
    network = branch(helper.make_node("Mul", ["x", "w"], ["a"]), end="a", weights=[WEIGHT])
    passing = branch(helper.make_node("Identity", ["big"], ["b"]), end="b")
    nodes = [
        helper.make_node("Less", ["x", "limit"], ["begins"]),
        helper.make_node("If", ["begins"], ["y"], then_branch=network, else_branch=passing),
        helper.make_node("Transpose", ["y"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["t", "y"], ["z"]),
    ]
    one = helper.make_tensor("limit", onnx.TensorProto.FLOAT, [1, 1], [1.0])
    graph = helper.make_graph(
        nodes, "g", [value("x", onnx.TensorProto.FLOAT, [1, 1])], [value("z", onnx.TensorProto.FLOAT, None)], [one, big]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(FormatError, match="multiplications|memory|numbers"):
        check_graph(model.SerializeToString(), conditional=True)
