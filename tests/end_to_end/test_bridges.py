"""The examples of docs/ for other worlds are run: real code between stand-ins for what is not installed here."""

from __future__ import annotations

import abc
import copy
import dataclasses
import importlib.util
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from meam_export import export_policy
from meam_policy import ActionError, ConfigError, MeamPolicy, ObservationError
from meam_policy.robot import RobotContract
from meam_training import OfflineDataset, TrainConfig, train

DOCS = Path(__file__).parents[2] / "docs"
ARM = ("shoulder/position", "elbow/position", "shoulder/velocity", "elbow/velocity")
ARM_SPACE = spaces.Box(-np.inf, np.inf, (4,))
ACTIONS = spaces.Box(np.array([-2.0, 0.5], np.float32), np.array([2.0, 3.0], np.float32))
PERIOD = 1 / 50


def block(page: str, name: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None, f"{page} has no tested block {name}"
    return found[1]


def execute(code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    exec(compile(code, f"{name}.py", "exec"), module.__dict__)
    return module


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


def export_arm(folder: Path, space: spaces.Space[Any], **names: Any) -> Path:
    """A policy of 50 Hz with chunks of 3 actions, of which it executes 2."""
    random = np.random.default_rng(3)
    n = 40
    boxes: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
    drawn = {key: random.normal(size=(n, *box.shape)) for key, box in boxes.items()}
    observations = drawn.get("", drawn)
    actions = random.uniform(ACTIONS.low, ACTIONS.high, (n, 2)).astype(np.float32)
    ends = np.arange(n) % 20 == 19
    flags = np.zeros(n, bool), ends
    dataset = OfflineDataset.from_arrays(
        observations,
        actions,
        np.zeros(n),
        observations,
        *flags,
        observation_space=space,
        action_space=ACTIONS,
        control_rate_hz=50,
    )
    config = TrainConfig.preset("bc", steps=2, hidden_dims=(8,), chunk_size=3, execute_steps=2, nfe=2)
    return export_policy(train(config, dataset, folder / "run"), folder / "policy", **names).folder


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    return export_arm(folder, ARM_SPACE, observation_names=ARM, action_names=("shoulder", "elbow/position"))


@pytest.fixture(scope="module")
def arm_with_goal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    space = spaces.Dict([("joints", ARM_SPACE), ("goal", spaces.Box(-np.inf, np.inf, (1, 2)))])
    folder = tmp_path_factory.mktemp("arm_with_goal")
    names = {"joints": ARM, "goal": ("goal x", "goal y")}
    return export_arm(folder, space, observation_names=names, action_names=("shoulder", "elbow"))


# ROS 2: messages that take what rosidl's generated classes take, and a node that records.


class Message:
    def __init__(self, **values: Any) -> None:
        for name, default in self.fields().items():
            setattr(self, name, copy.deepcopy(values.pop(name, default)))
        assert not values, f"{type(self).__name__} has no field {', '.join(values)}"

    def __setattr__(self, name: str, value: Any) -> None:
        default = self.fields()[name]
        if isinstance(default, list):
            # rosidl refuses NumPy arrays, and numbers that are not Python floats.
            kind = {"positions": float, "data": float, "position": float, "velocity": float, "effort": float}
            kind |= {"name": str, "joint_names": str, "points": JointTrajectoryPoint}
            assert isinstance(value, (list, tuple)), f"{name} is a {type(value).__name__}"
            assert all(type(item) is kind[name] for item in value), f"{name} holds {value}"
        else:
            assert type(value) is type(default), f"{name} is a {type(value).__name__}"
        super().__setattr__(name, value)

    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        raise NotImplementedError


class Time(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"sec": 0, "nanosec": 0}


class Header(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"stamp": Time(), "frame_id": ""}


class JointState(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"header": Header(), "name": [], "position": [], "velocity": [], "effort": []}


class Bool(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"data": False}


class Float64MultiArray(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"data": []}


class JointTrajectoryPoint(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"positions": [], "velocities": [], "time_from_start": Time()}


class JointTrajectory(Message):
    @classmethod
    def fields(cls) -> Mapping[str, Any]:
        return {"header": Header(), "joint_names": [], "points": []}


class Duration:
    def __init__(self, *, seconds: float) -> None:
        self.seconds = seconds

    def to_msg(self) -> Time:
        return Time(sec=int(self.seconds), nanosec=round(self.seconds % 1 * 1e9))


class ClockTime(Duration):
    """Of rclpy.time.Time, what the example uses."""

    @property
    def nanoseconds(self) -> int:
        return round(self.seconds * 1e9)

    def __sub__(self, other: Duration) -> "ClockTime":
        return ClockTime(seconds=self.seconds - other.seconds)


class Node:
    """Of rclpy's, what the example uses; `parameters` are the overrides of the command line."""

    parameters: Mapping[str, Any] = {}

    def __init__(self, name: str) -> None:
        self.now, self.name = 1000.0, name
        self.callbacks: dict[str, Callable[..., Any]] = {}
        self.published: list[tuple[str, Any]] = []
        self.log: list[str] = []
        self.said: list[str] = []
        self.qos: dict[str, Any] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def declare_parameter(self, name: str, value: Any) -> SimpleNamespace:
        given = self.parameters.get(name, value)
        assert value != [], "rclpy takes an empty list for one of bytes"
        assert type(given) is type(value), f"{name}: rclpy refuses another type than the default's"
        return SimpleNamespace(value=given)

    def create_subscription(self, kind: type, topic: str, callback: Callable[..., Any], qos: Any) -> None:
        self.callbacks[topic], self.qos[topic] = callback, qos

    def create_service(self, kind: type, name: str, callback: Callable[..., Any]) -> None:
        self.callbacks[name] = callback

    def create_publisher(self, kind: type, topic: str, qos: Any) -> SimpleNamespace:
        self.qos[topic] = qos

        def publish(message: Any) -> None:
            assert type(message) is kind
            self.published.append((topic, message))

        return SimpleNamespace(publish=publish)

    def create_timer(self, period: float, callback: Callable[[], None]) -> None:
        self.timers.append((period, callback))

    def get_clock(self) -> SimpleNamespace:
        return SimpleNamespace(now=lambda: ClockTime(seconds=self.now))

    def get_logger(self) -> SimpleNamespace:
        return SimpleNamespace(
            info=self.said.append,
            error=self.log.append,
            warning=lambda text, throttle_duration_sec: self.log.append(text),
        )

    def destroy_node(self) -> None:
        pass

    # What a test does with it.

    def joints(
        self, position: Mapping[str, float], velocity: Mapping[str, float] | None = None, age: float = 0
    ) -> None:
        at = self.now - age
        stamp = Time(sec=int(at), nanosec=round(at % 1 * 1e9))
        velocities = [] if velocity is None else [float(velocity[joint]) for joint in position]
        positions = [float(value) for value in position.values()]
        message = JointState(header=Header(stamp=stamp), name=list(position), position=positions, velocity=velocities)
        self.callbacks["joint_states"](message)

    def arm(self, observation: Any, age: float = 0) -> None:
        """The four numbers of `ARM`, in another order than the policy's, with a joint that it does not know."""
        a, b, c, d = (float(value) for value in observation)
        self.joints({"wrist": 9.0, "elbow": b, "shoulder": a}, {"wrist": 9.0, "elbow": d, "shoulder": c}, age)

    def enable(self, enabled: bool = True) -> str:
        response = self.callbacks["~/enable"](
            SimpleNamespace(data=enabled), SimpleNamespace(success=None, message=None)
        )
        assert response.success is (response.message == "")
        return response.message

    def tick(self, seconds: float = PERIOD) -> None:
        self.now += seconds
        ((_, callback),) = self.timers
        callback()

    def positions(self) -> list[list[float]]:
        return [message.points[0].positions for _, message in self.published]


@pytest.fixture
def rclpy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    qos = {"KEEP_LAST": "keep last", "BEST_EFFORT": "best effort", "RELIABLE": "reliable", "VOLATILE": "volatile"}
    policies = ("QoSDurabilityPolicy", "QoSHistoryPolicy", "QoSReliabilityPolicy")
    fakes = [
        module("rclpy", init=lambda **_: None, spin=lambda _: None, shutdown=lambda: None),
        module("rclpy.duration", Duration=Duration),
        module("rclpy.node", Node=Node),
        module("rclpy.qos", QoSProfile=SimpleNamespace, **{name: SimpleNamespace(**qos) for name in policies}),
        module("rclpy.signals", SignalHandlerOptions=SimpleNamespace(NO="no handlers")),
        module("sensor_msgs.msg", JointState=JointState),
        module("std_msgs.msg", Bool=Bool, Float64MultiArray=Float64MultiArray),
        module("std_srvs.srv", SetBool=object),
        module("trajectory_msgs.msg", JointTrajectory=JointTrajectory, JointTrajectoryPoint=JointTrajectoryPoint),
    ]
    for fake in fakes:
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for package in ("sensor_msgs", "std_msgs", "std_srvs", "trajectory_msgs"):
        monkeypatch.setitem(sys.modules, package, module(package))
    return fakes[0]


@pytest.fixture
def ros2(rclpy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return execute(block("ros2.md", "ros2"), "meam_policy_node", monkeypatch)


@pytest.fixture
def start(ros2: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    nodes = []

    def make(folder: Path, **parameters: Any) -> Any:
        defaults = {"policy": str(folder), "seed": 5, "chunking": "blocking"}
        monkeypatch.setattr(Node, "parameters", {**defaults, **parameters})
        nodes.append(ros2.PolicyNode())
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def trajectory(length: int, size: int) -> Any:
    return np.random.default_rng(11).normal(size=(length, size))


def test_the_node_publishes_what_the_policy_does_with_joints_in_any_order(arm: Path, start: Callable[..., Any]) -> None:
    node, policy = start(arm), MeamPolicy.from_pretrained(arm, seed=5)
    assert node.timers[0][0] == pytest.approx(PERIOD)
    expected = []
    for step, observation in enumerate(trajectory(7, 4)):
        node.arm(observation)
        assert step or node.enable() == ""
        node.tick()
        expected.append(policy.act(observation).tolist())
    assert node.positions() == expected
    topics, messages = zip(*node.published, strict=True)
    assert set(topics) == {"~/joint_trajectory"}
    assert messages[0].joint_names == ["shoulder", "elbow"]
    assert messages[0].points[0].time_from_start.nanosec == 20_000_000


def test_the_node_takes_each_joint_from_a_message_of_its_own(arm: Path, start: Callable[..., Any]) -> None:
    node, policy = start(arm, command_joints=["elbow", "shoulder"]), MeamPolicy.from_pretrained(arm, seed=5)
    node.joints({"elbow": 2.0}, {"elbow": 4.0})
    assert "shoulder/position, shoulder/velocity" in node.enable()
    node.joints({"shoulder": 1.0})
    assert "for shoulder/velocity." in node.enable()
    node.joints({"shoulder": 1.0}, {"shoulder": 3.0})
    assert node.enable() == ""
    node.tick()
    assert node.positions() == [policy.act([1.0, 2.0, 3.0, 4.0]).tolist()[::-1]]
    assert node.published[0][1].joint_names == ["elbow", "shoulder"]


def test_the_node_fills_a_dict_observation_by_key(arm_with_goal: Path, start: Callable[..., Any]) -> None:
    node, policy = start(arm_with_goal), MeamPolicy.from_pretrained(arm_with_goal, seed=5)
    assert {"joint_states", "~/observation/goal"} < set(node.callbacks)
    expected = []
    for step, numbers in enumerate(trajectory(5, 6)):
        node.callbacks["~/observation/goal"](Float64MultiArray(data=numbers[4:].tolist()))
        node.arm(numbers[:4])
        assert step or node.enable() == ""
        node.tick()
        expected.append(policy.act({"goal": numbers[None, 4:], "joints": numbers[:4]}).tolist())
    assert node.positions() == expected


def test_the_node_takes_joints_ages_and_failure_from_the_robots_contract(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    numbers = [(joint, what) for what in ("position", "velocity") for joint in ("shoulder", "elbow")]
    units = {"position": "rad", "velocity": "rad/s"}
    observation = [
        {"name": f"o{i}", "kind": f"state/joint/{what}", "joint": joint, "unit": units[what]}
        for i, (joint, what) in enumerate(numbers)
    ]
    action = [
        {"name": f"to_{joint}", "kind": "target/joint/position", "joint": joint, "unit": "rad"}
        for joint in ("shoulder", "elbow")
    ]
    timing = {"max_observation_age_s": 10 * PERIOD, "on_failure": "hold"}
    robot = RobotContract.from_object({"observation": observation, "action": action, "timing": timing})
    folder = export_arm(tmp_path, ARM_SPACE, robot=robot)
    node, policy = start(folder), MeamPolicy.from_pretrained(folder, seed=5)
    node.arm([1.0, 2.0, 3.0, 4.0], age=8 * PERIOD)
    assert node.enable() == ""
    node.tick()
    assert node.positions() == [policy.act([1.0, 2.0, 3.0, 4.0]).tolist()]
    assert node.published[0][1].joint_names == ["shoulder", "elbow"]
    node.arm([1e6, 2.0, 3.0, 4.0])  # unfamiliar: the contract holds
    node.tick()
    assert node.positions()[1] == node.positions()[0]


@pytest.fixture(scope="module")
def reacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of positions, velocities and a target, whose keys Gymnasium sorted."""
    box = spaces.Box(-np.inf, np.inf, (2,))
    space = spaces.Dict({"velocity": box, "position": box, "target": box})
    return export_arm(tmp_path_factory.mktemp("reacher"), space, action_names=("shoulder", "elbow"))


REACH = {"position": ARM[:2], "velocity": ARM[2:], "target": ("goal x[m]", "goal y[m]")}


def test_a_joint_velocity_cannot_go_into_target(reacher: Path, start: Callable[..., Any]) -> None:
    flat = [name for names in REACH.values() for name in names]
    with pytest.raises(ConfigError, match=r"no key of the observation; expected position=NAME,NAME target="):
        start(reacher, observation_names=flat)
    by_key = [f"{key}={','.join(names)}" for key, names in REACH.items()]
    node, policy = start(reacher, observation_names=by_key), MeamPolicy.from_pretrained(reacher, seed=5)
    assert "target: target[0]; target: target[1]; velocity: shoulder/velocity;" in node.said[0]
    node.callbacks["~/observation/target"](Float64MultiArray(data=[0.5, -0.5]))
    node.arm([1, 2, 3, 4])
    assert node.enable() == ""
    node.tick()
    observation = {"position": [1, 2], "velocity": [3, 4], "target": [0.5, -0.5]}
    assert node.positions() == [policy.act(observation).tolist()]


def test_names_given_by_key_at_export_reach_the_node(reacher: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    names = {"observation_names": REACH, "action_names": ("shoulder[rad]", "elbow[rad]")}
    node = start(Path(export_policy(reacher.parent / "run", tmp_path / "named", **names)))
    assert node.said[0].startswith("Takes position: shoulder/position; position: elbow/position; target: target[0];")
    assert node.said[0].endswith("Commands ['shoulder', 'elbow'].")


def test_an_observation_without_names_is_one_array(tmp_path: Path, start: Callable[..., Any], ros2: ModuleType) -> None:
    folder = export_arm(tmp_path, ARM_SPACE)
    with pytest.raises(ConfigError, match="The policy has no action_names; give the node 2"):
        start(folder)
    node, policy = start(folder, action_names=["a", "b"]), MeamPolicy.from_pretrained(folder, seed=5)
    assert "joint_states" not in node.callbacks
    node.callbacks["~/observation"](Float64MultiArray(data=[1.0, 2.0, 3.0, 4.0]))
    assert node.enable() == ""
    node.tick()
    assert node.positions() == [policy.act([1.0, 2.0, 3.0, 4.0]).tolist()]
    node.callbacks["~/observation"](Float64MultiArray(data=[1.0]))
    assert "1 values; expected 4" in node.log[-1]
    named = start(folder, action_names=["a", "b"], observation_names=list(ARM))
    assert "~/observation" not in named.callbacks


def test_by_default_the_network_runs_beside_the_node(arm: Path, start: Callable[..., Any], ros2: ModuleType) -> None:
    opened: list[str] = []
    real = ros2.ControlLoop
    ros2.__dict__["ControlLoop"] = lambda *args, **keys: opened.append(keys["chunking"]) or real(*args, **keys)
    node, policy = start(arm, overrun="hold"), MeamPolicy.from_pretrained(arm, seed=5)
    del Node.parameters["chunking"]  # type: ignore[attr-defined]
    node.close()
    node = ros2.PolicyNode()
    try:
        assert opened[1] == ("realtime" if policy.takes_prefix else "naive")
        for step, observation in enumerate(trajectory(20, 4)):
            node.arm(observation)
            assert step or node.enable() == ""
            node.tick()
        assert node.positions()[0] == policy.act(trajectory(20, 4)[0]).tolist()
        assert all(ACTIONS.contains(np.array(numbers, np.float32)) for numbers in node.positions())
        assert len(node.positions()) == 20
    finally:
        node.close()


@pytest.mark.parametrize(("age", "acts"), [(0.0, True), (0.05, True), (0.07, False), (-0.07, False), (1000.0, True)])
def test_a_stale_joint_or_one_of_another_clock_does_not_begin_an_episode(
    arm: Path, start: Callable[..., Any], age: float, acts: bool
) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0], age)  # the age of 1000 s is a stamp of zero: no stamp, the time of arrival counts
    message = node.enable()
    assert (message == "") is acts
    assert acts or message.startswith("shoulder/position is 0.070 s old; expected at most 0.060 s.")
    node.tick(0.0)
    assert len(node.published) == acts


def test_a_joint_that_falls_silent_ends_the_episode_until_it_is_enabled_again(
    arm: Path, start: Callable[..., Any]
) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0])
    node.enable()
    for _ in range(5):  # the elbow goes on
        node.joints({"elbow": 0.0}, {"elbow": 0.0})
        node.tick(0.018)
    assert len(node.published) == 3
    assert node.log[0].startswith("shoulder/position is 0.072 s old")
    node.arm([0, 0, 0, 0])
    node.tick()
    assert (len(node.published), len(node.log)) == (3, 1)
    assert node.enable() == ""
    node.tick()
    assert len(node.published) == 4


def test_nothing_acts_before_it_is_enabled_or_after_it_is_disabled(arm: Path, start: Callable[..., Any]) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0])
    node.tick()
    node.enable()
    node.tick()
    node.enable(False)
    node.tick()
    assert len(node.published) == 1


def test_the_emergency_stop_ends_the_episode_and_latches(arm: Path, start: Callable[..., Any]) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0])
    node.enable()
    node.callbacks["/emergency_stop"](Bool(data=True))
    node.tick()
    assert "The emergency stop is pressed." in node.enable()
    node.callbacks["/emergency_stop"](Bool(data=False))
    node.tick()
    assert node.published == []
    node.arm([0, 0, 0, 0])
    assert node.enable() == ""
    node.tick()
    assert len(node.published) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_joint_that_is_not_finite_ends_the_episode(arm: Path, start: Callable[..., Any], bad: float) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0])
    node.enable()
    node.arm([0, bad, 0, 0])
    node.tick()
    assert node.published == []
    assert node.log[0].startswith(f"elbow/position is {bad}; expected a finite number")


def test_a_joint_state_with_too_few_numbers_ends_the_episode(arm: Path, start: Callable[..., Any]) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0])
    node.enable()
    node.callbacks["joint_states"](JointState(name=["shoulder", "elbow"], position=[1.0]))
    node.tick()
    assert node.published == []
    assert node.log[0].startswith("A message has 1 values; expected 2: shoulder/position, elbow/position.")


def test_a_failed_inference_ends_the_episode_and_the_next_one_begins_anew(
    arm: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = start(arm)
    node.arm([0, 0, 0, 0])
    node.enable()
    node.tick()

    def fail(*_: Any, **__: Any) -> Any:
        raise ActionError("The policy produced NaN.")

    with monkeypatch.context() as patch:
        patch.setattr(MeamPolicy, "predict_action_chunk", fail)
        node.tick()
        node.arm([0, 0, 0, 0])
        node.tick()
    assert len(node.published) == 2  # the chunk's second action is still executed
    assert node.log[0].startswith("The policy produced NaN. Acting no more")
    node.tick()
    assert len(node.published) == 2
    node.arm([0, 0, 0, 0])
    assert node.enable() == ""
    node.tick()
    assert len(node.published) == 3


class Controller:
    """Of joint_trajectory_controller: executes the newest message, and holds its last point."""

    def __init__(self) -> None:
        self.points: list[tuple[float, list[float]]] = []
        self.ends: list[tuple[float, float]] = []

    def take(self, message: Any, now: float) -> None:
        stamp = message.header.stamp
        start = stamp.sec + stamp.nanosec * 1e-9 or now
        times = [start + p.time_from_start.sec + p.time_from_start.nanosec * 1e-9 for p in message.points]
        assert times[-1] > now, "all its points lie in the past"
        assert times == sorted(times)
        self.points = [(time, point.positions) for time, point in zip(times, message.points, strict=True)]
        self.ends.append((times[0], times[-1]))

    def at(self, now: float) -> list[float]:
        return next((positions for time, positions in self.points if time >= now - 1e-6), self.points[-1][1])


@pytest.mark.parametrize("chunking", ["blocking", "naive"])
def test_whole_chunks_drive_the_joints_as_single_points_would(
    arm: Path, start: Callable[..., Any], chunking: str
) -> None:
    node, controller = start(arm, command_type="chunk", chunking=chunking), Controller()
    for step, observation in enumerate(trajectory(20, 4)):
        node.arm(observation)
        assert step or node.enable() == ""
        sent = len(node.published)
        node.tick()
        time.sleep(0.02 * (chunking == "naive"))  # the inference beside it
        for _, message in node.published[sent:]:
            controller.take(message, node.now)
        plan = node._loop.plan()
        assert controller.at(node.now + PERIOD) == plan.actions[0].tolist()
    messages = [message for _, message in node.published]
    assert len(messages) < 20
    assert all(message.joint_names == ["shoulder", "elbow"] for message in messages)
    first = messages[0]
    assert len(first.points) == (2 if chunking == "blocking" else 3)
    assert first.header.stamp.sec + first.header.stamp.nanosec * 1e-9 == pytest.approx(1000 + PERIOD)
    # No gap between chunks: each begins, at the latest, one period after the one before it ends.
    assert all(begin <= end + 1.001 * PERIOD for (_, end), (begin, _) in itertools.pairwise(controller.ends))


def test_a_chunk_is_stamped_with_its_observations_time_however_long_the_inference_was_waited_for(
    arm: Path, start: Callable[..., Any]
) -> None:
    node = start(arm, command_type="chunk")
    step = node._loop.step

    def slow(observation: Any) -> Any:
        node.now += 0.3 * PERIOD
        return step(observation)

    node._loop.step = slow
    node.arm([1, 2, 3, 4])
    node.enable()
    for tick in range(3):
        began = node.now + PERIOD
        node.arm([1, 2, 3, 4])
        node.tick()
        if tick != 1:  # two actions of each chunk are executed
            stamp = node.published[-1][1].header.stamp
            assert stamp.sec + stamp.nanosec * 1e-9 == pytest.approx(began)
    assert len(node.published) == 2


def test_a_halt_takes_back_what_is_left_of_a_chunk(arm: Path, start: Callable[..., Any]) -> None:
    node, policy = start(arm, command_type="chunk"), MeamPolicy.from_pretrained(arm, seed=5)
    node.arm([1, 2, 3, 4])
    node.enable()
    node.enable(False)
    assert node.published == []
    node.enable()
    node.tick()
    node.callbacks["/emergency_stop"](Bool(data=True))
    assert [len(message.points) for _, message in node.published] == [2, 1]
    assert node.positions()[1] == policy.act([1, 2, 3, 4]).tolist()
    assert node.published[1][1].header.stamp.sec == 0  # from now on
    # Of the next episode nothing is known yet: the robot may have been moved.
    node.callbacks["/emergency_stop"](Bool(data=False))
    node.enable()
    node.enable(False)
    assert len(node.published) == 2


def test_velocities_are_set_to_zero_within_the_bounds_when_the_node_halts(arm: Path, start: Callable[..., Any]) -> None:
    velocities = ["shoulder/velocity", "elbow/velocity"]
    with pytest.raises(ConfigError, match="expected array for velocity commands"):
        start(arm, action_names=velocities, command_type="trajectory")
    node, policy = start(arm, action_names=velocities), MeamPolicy.from_pretrained(arm, seed=5)
    node.arm([1, 2, 3, 4])
    node.enable()
    node.tick()
    node.callbacks["/emergency_stop"](Bool(data=True))
    node.tick()
    assert [(topic, message.data) for topic, message in node.published] == [
        ("~/commands", policy.act([1, 2, 3, 4]).tolist()),
        ("~/commands", [0.0, 0.5]),  # the second number's lower bound is 0.5
    ]


def test_the_velocity_of_a_halt_is_within_the_robots_contract(tmp_path: Path, start: Callable[..., Any]) -> None:
    action = [
        {"name": joint, "kind": "target/joint/velocity", "joint": joint, "unit": "rad/s", **limits}
        for joint, limits in (("shoulder", {"lower": 0.125}), ("elbow", {"lower": 0.75}))
    ]
    robot = RobotContract.from_object({"observation": [], "action": action, "timing": {}})
    node = start(export_arm(tmp_path, ARM_SPACE, robot=robot), observation_names=list(ARM))
    node.arm([1, 2, 3, 4])
    node.enable()
    node.tick()
    node.callbacks["/emergency_stop"](Bool(data=True))
    assert node.published[-1][1].data == [0.125, 0.75]


def test_ctrl_c_halts_before_the_context_ends(
    arm: Path, start: Callable[..., Any], ros2: ModuleType, rclpy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(arm, action_names=["shoulder/effort", "elbow/effort"])
    seen: list[Any] = []

    def spin(node: Any) -> None:
        node.arm([0, 0, 0, 0])
        node.enable()
        node.tick()
        seen.append(node)
        raise KeyboardInterrupt

    rclpy.__dict__.update(
        init=lambda **keys: seen.append(keys), spin=spin, shutdown=lambda: seen.append(len(seen[1].published))
    )
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    ros2.main()
    assert seen[0]["signal_handler_options"] == "no handlers"
    assert seen[1].published[-1][1].data == [0.0, 0.5]
    assert seen[2] == 2


def test_sensors_are_taken_as_they_come_and_commands_are_reliable(arm: Path, start: Callable[..., Any]) -> None:
    node = start(arm)
    assert (node.qos["joint_states"].reliability, node.qos["joint_states"].depth) == ("best effort", 1)
    for topic in ("~/joint_trajectory", "/emergency_stop"):
        assert (node.qos[topic].reliability, node.qos[topic].durability) == ("reliable", "volatile")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"observation_names": ["shoulder"]}, "observation_names is 1 names (shoulder); expected 4 names"),
        ({"observation_names": [*ARM[:3], "goal x"]}, "goal x; expected all to be of joints, or none"),
        ({"observation_names": ["a/effort"] * 4}, "each name once"),
        ({"action_names": ["a/position", "b/velocity"]}, "expected one of position, velocity, effort for all"),
        ({"action_names": ["a/jerk", "b/jerk"]}, "expected one of position, velocity, effort for all"),
        ({"command_joints": ["shoulder", "shoulder"]}, "expected shoulder, elbow, each once"),
        ({"rate_hz": -1.0}, "rate_hz is -1.0; expected more than 0"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(
    arm: Path, start: Callable[..., Any], parameters: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        start(arm, **parameters)


def readings(monkeypatch: pytest.MonkeyPatch) -> Any:
    code = block("ros2.md", "ros2")
    part = "import numpy as np\nfrom meam_policy import ObservationError\n"
    part += code[code.index("INTERFACES =") : code.index("class ObservationMap")]
    return execute(part, "readings", monkeypatch).Readings()


@given(
    messages=st.lists(
        st.tuples(st.dictionaries(st.sampled_from("abcd"), st.floats(-9, 9), min_size=1), st.floats(0, 10)), max_size=6
    ),
    now=st.floats(0, 10),
)
def test_readings_are_those_of_the_last_message_with_the_joint_or_refused(
    messages: list[tuple[dict[str, float], float]], now: float
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        found = readings(monkeypatch)
    newest: dict[str, tuple[float, float]] = {}
    for values, stamp in messages:
        joints = SimpleNamespace(name=list(values), position=list(values.values()), velocity=[], effort=[])
        found.put_joints(joints, stamp)
        newest |= {joint: (value, stamp) for joint, value in values.items()}
    names = ["a/position", "b/position"]
    good = all(joint in newest and abs(now - newest[joint][1]) <= 1 for joint in "ab")
    if good:
        assert found.take(names, now, 1.0).tolist() == [newest["a"][0], newest["b"][0]]
    else:
        with pytest.raises(ObservationError, match=r"Nothing was received for|s old; expected at most 1\.000 s"):
            found.take(names, now, 1.0)


def test_the_parameters_of_the_page_are_those_of_the_node(ros2: ModuleType) -> None:
    page = (DOCS / "ros2.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]*)\|[^|]*\|[^|]*\|$", page.split("| Parameter |")[1], re.MULTILINE)
    described = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    code = block("ros2.md", "ros2")
    assert described == set(re.findall(r'self\.(?:_parameter|_names)\("(\w+)"', code))


# LeRobot: its own classes if it is installed, else stand-ins with the same abstract methods.

HAS_LEROBOT = importlib.util.find_spec("lerobot") is not None


def abstract(names: str) -> dict[str, Any]:
    return {name: abc.abstractmethod(lambda self: None) for name in names.split()}


def take_config(self: Any, config: Any) -> None:
    torch.nn.Module.__init__(self)
    self.config = config


StandInConfig = dataclasses.make_dataclass(
    "StandInConfig",
    [("device", "str | None", "cpu")],
    bases=(abc.ABC,),
    namespace=abstract("observation_delta_indices action_delta_indices reward_delta_indices validate_features")
    | abstract("get_optimizer_preset get_scheduler_preset")
    | {"register_subclass": staticmethod(lambda name: lambda cls: cls)},
)
StandInPolicy = abc.ABCMeta(
    "StandInPolicy",
    (torch.nn.Module,),
    abstract("get_optim_params reset forward predict_action_chunk select_action") | {"__init__": take_config},
)


@pytest.fixture
def lerobot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not HAS_LEROBOT:
        steps = ("AddBatchDimensionProcessorStep", "DeviceProcessorStep", "RenameObservationsProcessorStep")
        names = ("policy_action_to_transition", "transition_to_policy_action")
        for fake in (
            module("lerobot"),
            module("lerobot.configs"),
            module("lerobot.configs.policies", PreTrainedConfig=StandInConfig),
            module("lerobot.policies"),
            module("lerobot.policies.pretrained", PreTrainedPolicy=StandInPolicy),
            module("lerobot.processor", **dict.fromkeys((*steps, "PolicyProcessorPipeline"), SimpleNamespace)),
            module("lerobot.processor.converters", **dict.fromkeys(names, None)),
        ):
            monkeypatch.setitem(sys.modules, fake.__name__, fake)
    else:
        config = pytest.importorskip("lerobot.configs.policies").PreTrainedConfig
        monkeypatch.setattr(config, "_choice_registry", dict(config._choice_registry))
    return execute(block("lerobot.md", "lerobot"), "lerobot_policy_meam", monkeypatch)


def lerobot_policy(lerobot: ModuleType, folder: Path) -> Any:
    return lerobot.MeamPolicy(lerobot.MeamConfig(folder=str(folder), noise_seed=5, device="cpu"))


def test_select_action_in_lerobot_is_act(arm: Path, lerobot: ModuleType) -> None:
    adapter, policy = lerobot_policy(lerobot, arm), MeamPolicy.from_pretrained(arm, seed=5)
    observations = trajectory(6, 8).reshape(6, 2, 4).astype(np.float32)
    for rows in observations:
        action = adapter.select_action({"observation.state": torch.from_numpy(rows), "task": ["", ""]})
        assert action.dtype == torch.float32
        assert action.tolist() == policy.act(rows).tolist()
    adapter.reset()
    policy.reset()
    row = observations[0, :1]  # a new episode may have another batch size
    assert adapter.select_action({"observation.state": torch.from_numpy(row)}).tolist() == policy.act(row).tolist()


def test_predict_action_chunk_in_lerobot_is_sample_with_the_given_noise(arm: Path, lerobot: ModuleType) -> None:
    adapter, policy = lerobot_policy(lerobot, arm), MeamPolicy.from_pretrained(arm)
    rows, noise = trajectory(2, 4), trajectory(2, policy.spec.noise_dim)
    batch = {"observation.state": torch.from_numpy(rows)}
    chunks = adapter.predict_action_chunk(batch, noise=torch.from_numpy(noise))
    assert chunks.shape == (2, 3, 2)
    assert chunks.tolist() == policy.sample(rows, noise).tolist()
    first = adapter.select_action(batch, noise=torch.from_numpy(noise))
    assert first.tolist() == chunks[:, 0].tolist()


def test_a_dict_observation_has_lerobots_keys(arm_with_goal: Path, lerobot: ModuleType) -> None:
    adapter, policy = lerobot_policy(lerobot, arm_with_goal), MeamPolicy.from_pretrained(arm_with_goal, seed=5)
    joints, goal = trajectory(2, 4), trajectory(2, 2)[:, None]
    batch = {"observation.joints": torch.from_numpy(joints), "observation.goal": torch.from_numpy(goal)}
    assert adapter.select_action(batch).tolist() == policy.act({"goal": goal, "joints": joints}).tolist()
    with pytest.raises(ObservationError, match=r"expected observation\.goal"):
        adapter.select_action({"observation.joints": batch["observation.joints"]})


def test_the_adapter_does_not_train(arm: Path, lerobot: ModuleType) -> None:
    adapter = lerobot.MeamPolicy.from_pretrained(arm)
    for refused in (adapter.get_optim_params, lambda: adapter.forward({})):
        with pytest.raises(NotImplementedError, match="meam train"):
            refused()


@pytest.mark.skipif(not HAS_LEROBOT, reason="LeRobot is not installed")
def test_lerobots_own_factory_and_loop_run_the_plugin(arm: Path, lerobot: ModuleType) -> None:
    factory = pytest.importorskip("lerobot.policies.factory")
    control = pytest.importorskip("lerobot.utils.control_utils")
    config, policy = lerobot.MeamConfig(folder=str(arm), noise_seed=5, device="cpu"), MeamPolicy.from_pretrained(arm)
    policy.reset(seed=5)
    adapter = factory.get_policy_class(config.type)(config=config)
    before, after = factory.make_pre_post_processors(config)
    for observation in trajectory(5, 4).astype(np.float32):
        given = {"observation.state": observation.copy()}
        action = control.predict_action(given, adapter, torch.device("cpu"), before, after, use_amp=False)
        assert action.tolist() == [policy.act(observation).tolist()]
