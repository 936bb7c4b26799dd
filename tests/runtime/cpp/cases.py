"""The tables of cases that Python and `meam_policy.hpp` both run, made by Python's policies and loops."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from meam_policy import ActionError, BoxSpec, ControlLoop, MeamPolicy, ObservationError, PolicySpec, SafetySettings
from meam_policy.folder.policy_folder import read_contract, sha256
from meam_policy.inference.session import PolicySession
from meam_policy.robot import ActionNumber, ObservationNumber, RobotContract, Timing
from meam_policy.robot.contract_file import contract_text

CASES, LOOP_CASES = 300, 240
PYTHONS = ("last_error", "dropped_records")
"""Fields of `LoopHealth` that the header does not have."""


def box(dtype: str, low: tuple[float, ...], high: tuple[float, ...]) -> BoxSpec:
    return BoxSpec((len(low),), dtype, low, high)


def joints(*fields: dict[str, Any], **timing: Any) -> RobotContract:
    """A contract of two joint positions, with these fields."""
    action = tuple(
        ActionNumber(f"a{i}", **{"kind": "target/joint/position", "unit": "rad", "joint": f"j{i}", **own})
        for i, own in enumerate(fields)
    )
    observed = tuple(
        ObservationNumber(f"o{i}", kind="state/joint/position", unit="rad", joint=f"j{i}") for i in range(3)
    )
    return RobotContract(observed, action, Timing(**timing))


SPEED = {"kind": "target/joint/velocity", "unit": "rad/s"}
CONTRACTS: dict[str, RobotContract] = {
    "hold": joints({"max_rate": 3.0}, {"lower": -0.3, "upper": 0.7}, on_failure="hold"),
    "home": joints({"default": 0.1, "max_rate": 2.0}, {"default": -0.2, "upper": 0.4}, on_failure="home"),
    "neutral": joints({**SPEED, "lower": 0.1}, {**SPEED, "max_rate": 1.0}, on_failure="neutral"),
    "disable": joints({"lower": -0.1}, {}, on_failure="disable"),
    "changes": joints({"representation": "delta_to_last", "max_rate": 2.0}, {"representation": "delta_to_state"}),
    "speeds": joints({**SPEED, "upper": 0.9}, SPEED, rate_hz=10.0),
}
"""Contracts of policies that act ten times a second, by name."""


def put_contract(folder: Path, contract: RobotContract) -> None:
    text = contract_text(contract).encode()
    (folder / "robot.json").write_bytes(text)
    spec = PolicySpec.from_json((folder / "config.json").read_bytes())
    files = {**spec.files, "robot.json": sha256(text)}
    (folder / "config.json").write_text(replace(spec, files=files).to_json())


def policy_folders(make_policy: Callable[..., Any]) -> dict[str, Path]:
    """Policy folders with what the header has to follow: types, bounds, offsets, samples, and robots."""
    unit, rate = box("float32", (-1.0, -1.0), (1.0, 1.0)), {"control_rate_hz": 10.0}
    made = {
        "plain": make_policy(),
        "float64": make_policy(action=box("float64", (-0.1, 0.25), (0.3, 1 / 3))),
        "float16": make_policy(action=box("float16", (-0.1, -0.7), (0.3, 0.1)), execute_steps=3),
        "int8": make_policy(action=box("int8", (-2.5, -1.0), (1.5, 2.0)), observation_std=(4.0, 2.0, 1.0)),
        "bool": make_policy(action=box("bool", (0.0, 0.0), (1.0, 1.0)), execute_steps=1),
        "offset": make_policy(observation_offset=(1e6, 0.0, -3e5), observation_mean=(0.5, 0.0, -0.25)),
        "samples": make_policy(best_of=3),
        "one": make_policy(action=box("float32", (-0.7,), (0.9,)), chunk_size=1, execute_steps=1),
    }
    for name, through in (("unbounded", "Identity"), ("nan", "Sqrt"), ("infinite", "Reciprocal")):
        made[name] = make_policy(action=replace(unit, low=(-0.3, -0.1), high=(0.2, 0.4)), **rate)
        made[name].leave_out_bounds(through)
    for name in CONTRACTS:
        made[name] = make_policy(**rate)
        put_contract(made[name].folder, CONTRACTS[name])
    made["nan and home"] = make_policy(**rate)
    made["nan and home"].leave_out_bounds("Sqrt")
    put_contract(made["nan and home"].folder, CONTRACTS["home"])
    made["half and slow"] = make_policy(action=box("float16", (-1.0, -1.0), (1.0, 1.0)), **rate)
    put_contract(made["half and slow"].folder, joints({"max_rate": 1.0, "upper": 0.3333}, {"lower": -0.0001}))
    made["whole and slow"] = make_policy(action=box("int16", (-3.0, -3.0), (3.0, 3.0)), **rate)
    put_contract(made["whole and slow"].folder, joints({"max_rate": 7.0, "upper": 2.5}, {"lower": -1.5}))
    return {name: policy.folder for name, policy in made.items()}


def coarse(random: np.random.Generator, size: int) -> Any:
    """Multiples of 1/4, of which sums in float32 are exact in any order."""
    return random.integers(-8, 9, size) / 4


def drawn_settings(random: np.random.Generator, home: bool) -> dict[str, Any]:
    reactions = ["contract", "raise", "hold", "neutral", *(["home"] if home else [])]
    chosen = [str(random.choice(reactions)) for _ in range(3)]
    rates: list[Any] = [None, None, 0.25, [0.5, 0.125], [0.3, float("inf")], float("inf")]
    return {
        "on_bad_observation": chosen[0],
        "on_bad_action": chosen[1],
        "on_unfamiliar": None if random.random() < 0.2 else chosen[2],
        "unfamiliarity_limit": float(random.choice([1.5, 10.0, np.inf])),
        "rate_limit": rates[random.integers(len(rates))],
    }


def drawn_steps(random: np.random.Generator, spec: PolicySpec, noisy: bool) -> Iterator[dict[str, Any]]:
    """Steps of one case, of which some must not be acted on."""
    for _ in range(random.integers(8, 25)):
        kind = random.choice(["usual"] * 12 + ["zero", "far", "nan", "huge", "short", "bad noise", "reset"])
        if kind == "reset":
            yield {"reset": True}
            continue
        observation = coarse(random, spec.observation_dim) * (kind != "zero") + np.array(spec.observation_offset or 0.0)
        noise = coarse(random, spec.noise_dim) * (kind != "zero")
        if kind == "far":
            observation[random.integers(spec.observation_dim)] += 64.0
        if kind in ("nan", "huge"):
            wrong = [np.nan, np.inf, -np.inf] if kind == "nan" else [1e300, -4e38]
            observation[random.integers(spec.observation_dim)] = random.choice(wrong)
        if kind == "bad noise":
            noise[-1] = random.choice([np.nan, 1e39])
        step = {"observation": observation[: -1 if kind == "short" else None].tolist()}
        yield step | ({"noise": noise.tolist()} if noisy else {})


def take_step(act: Callable[[], Any]) -> dict[str, Any]:
    """The action of a step, or the status that the header has in place of an error."""
    try:
        return {"action": np.ravel(act()).astype(float).tolist()}
    except ObservationError:
        return {"status": 1}
    except ActionError:
        return {"status": 2}


def act_through(policy: MeamPolicy, steps: list[dict[str, Any]]) -> None:
    """Put the result of Python's policy into every step."""
    for step in steps:
        if "reset" in step:
            policy.reset()
        else:
            step |= take_step(lambda step=step: policy.select_action(step["observation"], step.get("noise")))


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """Settings as the program takes them: a list of rates."""
    rate = given["rate_limit"]
    return {**given, "rate_limit": [] if rate is None else rate if isinstance(rate, list) else [rate]}


def written(value: Any) -> Any:
    """JSON data, in which numbers that JSON has not are texts."""
    if isinstance(value, dict):
        return {key: written(each) for key, each in value.items()}
    if isinstance(value, list):
        return [written(each) for each in value]
    return str(value) if isinstance(value, float) and not np.isfinite(value) else value


def table_file(found: list[dict[str, Any]], health: str, counters: Sequence[str], folder: Path) -> Path:
    """Write cases as the table that the program reads, once enough of them reach every counter of a health."""
    for counter in counters:
        assert sum(bool(case[health][counter]) for case in found) >= 10, f"few cases reach {counter}"
    assert {step.get("status", 0) for case in found for step in case["steps"]} == {0, 1, 2}
    file = folder / "cases.json"
    file.write_text(json.dumps(written(found), allow_nan=False))
    return file


def policy_cases(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    sessions = {}
    for number in range(CASES):
        random = np.random.default_rng(number)
        name = list(folders)[number % len(folders)]
        spec = PolicySpec.from_json((folders[name] / "config.json").read_bytes())
        if name not in sessions:
            sessions[name] = PolicySession((folders[name] / "policy.onnx").read_bytes(), spec)
        robot = read_contract(folders[name], spec)
        home = robot is not None and bool(robot.action) and all(number.default is not None for number in robot.action)
        settings, noisy = drawn_settings(random, home), random.random() < 0.8
        if spec.action_dim == 1 and isinstance(settings["rate_limit"], list):
            settings["rate_limit"] = 0.2
        acting = replace(spec, acting=replace(spec.acting, noise_scale=float(noisy)))
        policy = MeamPolicy(acting, sessions[name], safety=SafetySettings(**settings), robot=robot)
        steps = list(drawn_steps(random, spec, noisy))
        act_through(policy, steps)
        yield {
            "name": f"case {number}, {name}",
            "folder": str(folders[name]),
            "noise_scale": float(noisy),
            "safety": settings_of(settings),
            "steps": steps,
            "health": asdict(policy.health()),
        }


# Control loops


CONTINUING = (np.random.default_rng(1).integers(-8, 9, (3, 12)) / 64).astype(np.float32)
LATE = {"max_observation_age_s": 0.15, "latency_budget_ms": 0.5, "rate_hz": 10.0}
LOOP_CONTRACTS: dict[str, RobotContract | None] = {
    "free": None,
    "hold": joints({"max_rate": 3.0}, {"lower": -0.3}, on_failure="hold", blend_in_s=0.35, **LATE),
    "home": joints({"default": 0.1}, {"default": -0.2, "upper": 0.4}, on_failure="home", blend_in_s=0.2, **LATE),
    "neutral": joints({**SPEED, "lower": 0.1}, {**SPEED, "max_rate": 1.0}, on_failure="neutral", blend_in_s=1.0),
    "disable": joints({"lower": -0.1}, {}, on_failure="disable", **LATE),
}
ROOT_CAUSES = ("usual",) * 14 + ("far", "nan", "short", "stale", "reset", "pause")


def quick(robot: RobotContract) -> RobotContract:
    """The contract with rates that let whole numbers change from tick to tick."""
    return replace(robot, action=tuple(replace(n, max_rate=n.max_rate and 7.0) for n in robot.action))


def loop_folders(make_policy: Callable[..., Any]) -> dict[str, Path]:
    """Policy folders with a variant rtc, of every contract, and of other types of actions."""
    made = {}
    boxes = {"float32": (-1.0, 1.0), "float64": (-0.9, 0.7), "float16": (-0.3, 1.0), "int8": (-2.5, 2.5)}
    for (contract, robot), dtype in itertools.product(LOOP_CONTRACTS.items(), boxes):
        action = box(dtype, (boxes[dtype][0],) * 2, (boxes[dtype][1],) * 2)
        offset = {"observation_offset": (1e5, 0.0, -8.0)} if dtype == "float64" else {}
        policy = make_policy(action=action, chunk_size=6, execute_steps=3, control_rate_hz=10.0, **offset)
        policy.add_continuing(CONTINUING, np.zeros((12, 12), np.float32))
        if robot is not None:
            put_contract(policy.folder, quick(robot) if dtype == "int8" else robot)
        made[f"{contract}, {dtype}"] = policy.folder
    return made


class Clock:
    """Time that passes whenever somebody looks at it, and where a test lets it; the program has the same."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 2**-10
        return self.now


def drawn_loop(random: np.random.Generator, home: bool) -> dict[str, Any]:
    """Options of a loop: simulated, or blocking on a clock."""
    simulated = random.random() < 0.7
    overruns = ["contract", "hold", "repeat", "zero", "stop", *(["home"] if home else [])]
    chosen: dict[str, Any] = {"rate_hz": 10.0, "overrun": str(random.choice(overruns)), "chunking": "blocking"}
    if simulated:
        chosen["chunking"] = str(random.choice(["naive", "naive", "realtime", "realtime", "blocking"]))
        chosen["simulated_delay"] = int(random.integers(6))
    if random.random() < 0.3:
        chosen["expected_delay"] = int(random.integers(6))
    if random.random() < 0.5:
        chosen["execute_steps"] = int(random.integers(1, 7))
    if random.random() < 0.4:
        chosen["max_observation_age_s"] = float(random.choice([0.05, 0.25, np.inf]))
    if random.random() < 0.2:
        chosen["blend_in_s"] = 0.0
    return chosen


def drawn_loop_steps(random: np.random.Generator, spec: PolicySpec, simulated: bool) -> Iterator[dict[str, Any]]:
    """Steps of a loop; timestamps of a clock are how old the observation is."""
    for _ in range(random.integers(10, 40)):
        kind = random.choice(ROOT_CAUSES)
        if kind == "reset":
            yield {"reset": True}
            continue
        observation = coarse(random, spec.observation_dim) + np.array(spec.observation_offset or 0.0)
        observation[0] += 64.0 * (kind == "far")
        observation[1] = np.nan if kind == "nan" else observation[1]
        step: dict[str, Any] = {"observation": observation[: -1 if kind == "short" else None].tolist()}
        if not simulated:
            # Some ticks are a little late; a pause skips some, or goes back in time.
            step["pause"] = float(random.choice([0.3, 0.9, -0.5, 30.0]) if kind == "pause" else 0.1)
        if kind == "stale" or random.random() < 0.3:
            step["age"] = float(random.choice([0.5, -0.5, np.nan]) if kind == "stale" else 0.0)
        yield step


def loop_through(loop: ControlLoop, steps: list[dict[str, Any]], clock: Clock, simulated: bool) -> None:
    """Put the result of Python's loop into every step, and the timestamps."""
    tick = 0
    for step in steps:
        clock.now += step.get("pause", 0.0)
        if "reset" in step:
            loop.reset()
            tick = 0
            continue
        if "age" in step:
            step["timestamp"] = (tick / 10.0 if simulated else clock.now) - step.pop("age")
        step |= take_step(lambda step=step: loop.step(step["observation"], step.get("timestamp")))
        tick += "action" in step


def loop_cases(folders: dict[str, Path]) -> Iterator[dict[str, Any]]:
    for number in range(LOOP_CASES):
        random = np.random.default_rng(10_000 + number)
        name = list(folders)[number % len(folders)]
        recorded = PolicySpec.from_json((folders[name] / "config.json").read_bytes())
        robot = read_contract(folders[name], recorded)
        home = robot is not None and all(each.default is not None for each in robot.action)
        options, settings = drawn_loop(random, home), drawn_settings(random, home)
        variant = "rtc" if options["chunking"] == "realtime" or random.random() < 0.3 else None
        spec, file = recorded.select(variant)
        spec, simulated = replace(spec, acting=replace(spec.acting, noise_scale=0.0)), "simulated_delay" in options
        session = PolicySession((folders[name] / file).read_bytes(), spec)
        policy, clock = MeamPolicy(spec, session, safety=SafetySettings(**settings), robot=robot), Clock()
        arguments: dict[str, Any] = {key: None if value == "contract" else value for key, value in options.items()}
        steps = list(drawn_loop_steps(random, spec, simulated))
        with ControlLoop(policy, **arguments, clock=clock) as loop:
            loop_through(loop, steps, clock, simulated)
            loop_health = loop.health()
        yield {
            "name": f"loop {number}, {name}",
            "folder": str(folders[name]),
            "variant": variant or "",
            "noise_scale": 0.0,
            "safety": settings_of(settings),
            "loop": options,
            "steps": steps,
            "health": asdict(policy.health()),
            "loop_health": {key: value for key, value in loop_health.to_json().items() if key not in PYTHONS},
        }
