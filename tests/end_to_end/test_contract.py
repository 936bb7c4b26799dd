"""Every public callable, given what it does not expect, works or raises one of the package's errors."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub_constants

import meam_export
import meam_policy
import meam_policy.robot
import meam_training
from meam_export import LadderTask, export_policy
from meam_policy import (
    ConfigError,
    ControlLoop,
    EnvironmentSpec,
    MeamError,
    MeamPolicy,
    ObservationError,
    PolicySpec,
    Recording,
    RolloutResult,
    SafetySettings,
    cli,
)
from meam_policy.robot import ActionNumber, ObservationNumber, RobotContract, Timing
from meam_policy.spec import VariantSpec
from meam_training import Checkpoint, OfflineDataset, PolicyModule, Recorder, TrainConfig, collect, train
from meam_training.data.data_report import data_report
from meam_training.learning.learner import Learner
from meam_training.runs.checkpoint import TrainingState

PACKAGES: tuple[ModuleType, ...] = (meam_policy, meam_policy.robot, meam_training, meam_export)

WRONG: Mapping[str, Any] = {
    "None": None,
    "text": "text",
    "-1": -1,
    "0": 0,
    "2**70": 2**70,
    "10**13": 10**13,
    "nan": math.nan,
    "inf": math.inf,
    "True": True,
    "[]": [],
    "{}": {},
    "object": object(),
    "ragged": [[1.0], [1.0, 2.0]],
    "bytes": b"bytes",
    "nowhere": Path("nowhere/at/all"),
}
LONGEST_S = 30
"""After this long a call hangs."""

LEAST_CALLS = 5000
"""Calls of the fast walk."""

Case = tuple[Callable[..., Any], dict[str, Any]]


class HangError(BaseException):
    """A call did not end."""


@contextmanager
def time_limit() -> Iterator[None]:
    def end(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def public() -> dict[str, Any]:
    """Every public function, constructor and method that takes arguments, by its name; the errors aside."""
    found = {}
    for package in PACKAGES:
        for name in package.__all__:
            thing = getattr(package, name)
            if not callable(thing) or (isinstance(thing, type) and issubclass(thing, Exception)):
                continue
            found[name] = thing
            for method, member in inspect.getmembers(thing) if isinstance(thing, type) else ():
                if not method.startswith("_") and callable(member) and member.__module__.startswith("meam_"):
                    found[f"{name}.{method}"] = member
    return {name: thing for name, thing in found.items() if set(inspect.signature(thing).parameters) - {"self"}}


class World:
    """A data set, a run and a policy, small, and what the public callables are called with."""

    def __init__(self, root: Path) -> None:
        self.root, self._numbers = root, itertools.count()
        self.minari = collect("meam/Pockets-v0", transitions=60, root=root / "data")
        self.data = OfflineDataset.from_minari(self.minari)
        sizes = {"hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "nfe": 2}
        settings = {"steps": 1, "chunk_size": 2, "best_of": 2, "candidates": 4, "device": "cpu"}
        self.config = TrainConfig.preset("me-am", **settings, **sizes)
        self.run = root / "run"
        self.checkpoint = train(self.config, self.data, self.run)
        self.networks = self.checkpoint.load_networks()
        self.module = PolicyModule(self.networks, self.checkpoint.spec)
        self.folder = Path(export_policy(self.checkpoint, root / "policy"))
        self.policy = MeamPolicy.from_pretrained(self.folder)
        self.env = meam_policy.make_environment("meam/Pockets-v0")
        self.row = self.env.reset(seed=0)[0]
        self.hdf5 = root / "data.hdf5"
        with h5py.File(self.hdf5, "w") as file:
            self._columns(file)
        self.npz = root / "pointmaze-medium-navigate-v0.npz"
        columns: dict[str, Any] = {}
        self._columns(columns)
        columns["terminals"] = self.data.episode_ends
        columns["qpos"] = columns["qvel"] = self.data.observations
        np.savez(self.npz, **{name: columns[name] for name in ("observations", "actions", "terminals", "qpos", "qvel")})
        self.sweep = root / "sweep.toml"
        self.sweep.write_text("")

    def _columns(self, file: Any) -> None:
        file["observations"] = self.data.observations
        file["actions"] = self.data.actions
        file["rewards"] = self.data.rewards
        file["terminals"] = self.data.terminations
        file["timeouts"] = self.data.episode_ends

    def new(self) -> Path:
        """A path at which nothing is."""
        return self.root / f"new-{next(self._numbers)}"

    def arrays(self) -> dict[str, Any]:
        data = self.data
        return {
            "observations": data.observations,
            "actions": data.actions,
            "rewards": data.rewards,
            "next_observations": data.next_observations,
            "terminations": data.terminations,
            "truncations": data.episode_ends & ~data.terminations,
        }

    def recording_loop(self) -> ControlLoop:
        options: dict[str, Any] = {"chunking": "naive", "any_rate": True, "simulated_delay": 1}
        return ControlLoop(self.policy, 1000.0, record=Recording(self.new(), ring_seconds=1.0), **options)

    def flight(self) -> Path:
        path = self.new()
        options: dict[str, Any] = {"chunking": "naive", "any_rate": True, "simulated_delay": 1}
        with ControlLoop(self.policy, 1000.0, record=path, **options) as loop:
            loop.step(self.row)
        return path

    def loop(self) -> ControlLoop:
        return ControlLoop(self.policy, 1000.0, chunking="naive", any_rate=True, expected_delay=1)

    def recorder(self) -> Recorder:
        return Recorder("lab/a-v0", self.env.observation_space, self.env.action_space, root=self.new())

    def recording(self) -> Recorder:
        recorder = self.recorder()
        recorder.reset(self.row)
        return recorder

    def tensors(self) -> dict[str, Any]:
        spec = self.checkpoint.spec
        return {"observation": torch.zeros(1, spec.observation_dim), "noise": torch.zeros(1, spec.noise_dim)}

    def state(self) -> TrainingState:
        spec = self.checkpoint.spec
        learner = Learner(spec, self.config, torch.device("cpu"))
        return TrainingState(0, self.config, spec, "data", learner.networks, learner.optimizer, learner.generator)


def held(cls: type) -> Callable[[World], Case]:
    """A record, which holds whatever it is given."""
    return lambda _: (cls, dict.fromkeys(inspect.signature(cls).parameters))


def fields(thing: Any) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in inspect.signature(type(thing)).parameters}


JOINT = ActionNumber("elbow", "target/joint/position", "rad", joint="elbow", max_rate=1.0)
READING = ObservationNumber("angle", "state/joint/position", "rad", joint="elbow")
CONTRACT = RobotContract((READING,), (JOINT,), Timing(rate_hz=10.0))


def stopped() -> threading.Event:
    """A sign to stop that has been given, so that no number of steps takes long."""
    event = threading.Event()
    event.set()
    return event


CASES: Mapping[str, Callable[[World], Case]] = {
    "ActionNumber": lambda _: (ActionNumber, fields(JOINT)),
    "ObservationNumber": lambda _: (ObservationNumber, fields(READING)),
    "RobotContract": lambda _: (RobotContract, fields(CONTRACT)),
    "RobotContract.check": lambda w: (
        RobotContract(timing=Timing(on_failure="disable")).check,
        {"spec": w.policy.spec},
    ),
    "RobotContract.describe": lambda w: (CONTRACT.describe, {"spec": w.policy.spec}),
    "RobotContract.from_object": lambda _: (RobotContract.from_object, {"data": CONTRACT.to_json()}),
    "RobotContract.measured_by": lambda _: (CONTRACT.measured_by, {"action": JOINT}),
    "RobotContract.named": lambda w: (RobotContract().named, {"spec": w.policy.spec}),
    "RobotContract.rate_hz": lambda w: (CONTRACT.rate_hz, {"spec": w.policy.spec}),
    "Timing": lambda _: (Timing, fields(CONTRACT.timing)),
    "BoxSpec": lambda w: (meam_policy.BoxSpec, fields(w.checkpoint.spec.action)),
    "BoxSpec.from_space": lambda w: (meam_policy.BoxSpec.from_space, {"space": w.env.action_space, "key": None}),
    "ControlLoop": lambda w: (
        ControlLoop,
        {
            "policy": w.policy,
            "rate_hz": 1000.0,
            "chunking": "naive",
            "overrun": "hold",
            "execute_steps": 1,
            "max_observation_age_s": 1.0,
            "blend_in_s": 0.0,
            "expected_delay": 1,
            "simulated_delay": 1,
            "any_rate": True,
            "unchecked": False,
            "record": None,
            "clock": lambda: 0.0,
            "sleep": lambda _: None,
        },
    ),
    "ControlLoop.close": lambda w: (w.loop().close, {"timeout_s": 1.0}),
    "ControlLoop.reset": lambda w: (w.loop().reset, {"seed": 0}),
    "ControlLoop.save_recording": lambda w: (w.recording_loop().save_recording, {"timeout_s": 0.1}),
    "ControlLoop.run": lambda w: (
        w.loop().run,
        {
            "read_observation": lambda: w.row,
            "send_action": lambda _: None,
            "steps": 2,
            "stop": stopped(),
            "send_neutral_on_exit": None,
        },
    ),
    "ControlLoop.step": lambda w: (w.loop().step, {"observation": w.row, "timestamp": None}),
    "Difference": held(meam_policy.Difference),
    "EnvironmentSpec": lambda w: (
        EnvironmentSpec,
        {"id": "meam/Pockets-v0", "kwargs": {}, "max_episode_steps": 5, "wrappers": (), "evaluation": None},
    ),
    "EnvironmentSpec.from_json": lambda w: (
        EnvironmentSpec.from_json,
        {"data": EnvironmentSpec("meam/Pockets-v0").to_json(), "name": "environment"},
    ),
    "EnvironmentSpec.of": lambda w: (EnvironmentSpec.of, {"recorded": w.env.spec, "environment_id": None}),
    "EnvironmentWrapper": lambda w: (meam_policy.EnvironmentWrapper, {"name": "ClipAction", "kwargs": {}}),
    "Health": held(meam_policy.Health),
    "LoopHealth": held(meam_policy.LoopHealth),
    "MeamPolicy": lambda w: (
        MeamPolicy,
        {
            "spec": w.policy.spec,
            "session": w.policy.session,
            "seed": 0,
            "variant": None,
            "safety": None,
            "robot": None,
            "origin": None,
        },
    ),
    "MeamPolicy.accepts": lambda w: (w.policy.accepts, {"observation": w.row}),
    "MeamPolicy.act": lambda w: (w.policy.act, {"observation": w.row, "deterministic": None}),
    "MeamPolicy.check_env": lambda w: (w.policy.check_env, {"env": w.env}),
    "MeamPolicy.from_pretrained": lambda w: (
        MeamPolicy.from_pretrained,
        {
            "path_or_repo_id": w.folder,
            "revision": None,
            "subfolder": None,
            "token": None,
            "cache_dir": None,
            "local_files_only": False,
            "force_download": False,
            "variant": None,
            "latency_budget_ms": None,
            "device": "cpu",
            "threads": 1,
            "fixed_batch": None,
            "tf32": False,
            "best_of": None,
            "noise_scale": None,
            "safety": None,
            "seed": None,
        },
    ),
    "MeamPolicy.limit_action": lambda w: (w.policy.limit_action, {"action": w.policy.act(w.row)}),
    "MeamPolicy.preview_actions": lambda w: (w.policy.preview_actions, {"actions": w.policy.act(w.row)[None]}),
    "MeamPolicy.predict": lambda w: (
        w.policy.predict,
        {"observation": w.row, "state": None, "episode_start": None, "deterministic": None},
    ),
    "MeamPolicy.predict_action_chunk": lambda w: (
        w.policy.predict_action_chunk,
        {"observation": w.row, "noise": None, "deterministic": None, "prefix": None, "prefix_weight": None},
    ),
    "MeamPolicy.push_to_hub": lambda w: (
        w.policy.push_to_hub,
        {
            "repo_id": "owner/name",
            "subfolder": None,
            "branch": None,
            "create_pr": False,
            "tag": None,
            "private": None,
            "commit_message": "Message",
            "parent_commit": None,
            "token": None,
            "dry_run": True,
        },
    ),
    "MeamPolicy.reset": lambda w: (w.policy.reset, {"seed": None, "mask": None}),
    "MeamPolicy.sample": lambda w: (w.policy.sample, {"observation": w.row, "noise": None, "seed": None}),
    "MeamPolicy.save_pretrained": lambda w: (w.policy.save_pretrained, {"folder": w.new()}),
    "MeamPolicy.select_action": lambda w: (w.policy.select_action, {"observation": w.row, "noise": None}),
    "PolicySpec": lambda w: (PolicySpec, fields(w.policy.spec)),
    "PolicySpec.acting_as": lambda w: (
        w.policy.spec.acting_as,
        {"variant": VariantSpec("a.onnx", w.policy.spec.integration)},
    ),
    "PolicySpec.from_json": lambda w: (PolicySpec.from_json, {"text": w.policy.spec.to_json()}),
    "PolicySpec.from_object": lambda w: (PolicySpec.from_object, {"data": json.loads(w.policy.spec.to_json())}),
    "PolicySpec.identity_in": lambda w: (w.policy.spec.identity_in, {"config": json.loads(w.policy.spec.to_json())}),
    "PolicySpec.select": lambda w: (w.policy.spec.select, {"variant": None}),
    "Pushed": held(meam_policy.Pushed),
    "Recording": lambda w: (Recording, {"path": w.new(), "ring_seconds": None, "queue": 10}),
    "ReplayReport": held(meam_policy.ReplayReport),
    "RolloutResult": held(RolloutResult),
    "RolloutResult.latency_ms": lambda w: (
        RolloutResult(np.ones(1), np.ones(1, int), None, np.ones(3)).latency_ms,
        {"percentile": 50.0},
    ),
    "SafetySettings": lambda w: (
        SafetySettings,
        {
            "on_bad_observation": "raise",
            "on_bad_action": "raise",
            "on_unfamiliar": None,
            "unfamiliarity_limit": 10.0,
            "rate_limit": 1.0,
        },
    ),
    "replay_flight": lambda w: (meam_policy.replay_flight, {"file": w.flight(), "policy": w.policy}),
    "StampedObservation": held(meam_policy.StampedObservation),
    "make_environment": lambda w: (meam_policy.make_environment, {"environment": "meam/Pockets-v0"}),
    "rollout": lambda w: (
        meam_policy.rollout,
        {
            "policy": w.policy,
            "env": w.env,
            "episodes": 1,
            "seed": 0,
            "record": False,
            "max_episode_steps": 2,
            "on_episode": None,
            "on_trajectory": None,
        },
    ),
    "Checkpoint": held(Checkpoint),
    "Checkpoint.best": lambda w: (Checkpoint.best, {"output_dir": w.run}),
    "Checkpoint.latest": lambda w: (Checkpoint.latest, {"output_dir": w.run}),
    "Checkpoint.load": lambda w: (Checkpoint.load, {"path": w.run}),
    "Checkpoint.prune": lambda w: (Checkpoint.prune, {"output_dir": w.run, "keep": 1}),
    "Checkpoint.restore": lambda w: (w.checkpoint.restore, {"state": w.state()}),
    "Checkpoint.save": lambda w: (Checkpoint.save, {"output_dir": w.new(), "state": w.state()}),
    "DataReport": held(meam_training.DataReport),
    "OfflineDataset": lambda w: (OfflineDataset, fields(w.data)),
    "OfflineDataset.choose_episodes": lambda w: (w.data.choose_episodes, {"episodes": [0]}),
    "OfflineDataset.chunk_sampler": lambda w: (
        w.data.chunk_sampler,
        {"chunk_size": 2, "discount": 0.9, "pad": True},
    ),
    "OfflineDataset.discounted_returns": lambda w: (w.data.discounted_returns, {"discount": 0.9}),
    "OfflineDataset.from_arrays": lambda w: (
        OfflineDataset.from_arrays,
        {
            **w.arrays(),
            "observation_space": None,
            "action_space": None,
            "action_low": -1.0,
            "action_high": 1.0,
            "clip_actions": True,
            "dataset_id": None,
            "environment_id": None,
            "control_rate_hz": None,
        },
    ),
    "OfflineDataset.from_hdf5": lambda w: (OfflineDataset.from_hdf5, {"path": w.hdf5, **RECORDED}),
    "OfflineDataset.from_lerobot": lambda w: (OfflineDataset.from_lerobot, {"folder": w.root, **RECORDED}),
    "OfflineDataset.from_minari": lambda w: (
        OfflineDataset.from_minari,
        {"id_or_path": w.minari, "observation_keys": None, **BOUNDS},
    ),
    "OfflineDataset.from_ogbench": lambda w: (
        OfflineDataset.from_ogbench,
        {"npz": w.npz, "environment_id": "pointmaze-medium-navigate-singletask-task1-v0", **BOUNDS},
    ),
    "OfflineDataset.joined": lambda w: (
        OfflineDataset.joined,
        {"datasets": [w.data, w.data], "shares": [0.5, 0.5], "environment_id": None},
    ),
    "PolicyModule": lambda w: (
        PolicyModule,
        {"networks": w.networks, "spec": w.checkpoint.spec, "one_step": False, "takes_prefix": False},
    ),
    "PolicyModule.all_values": lambda w: (w.module.all_values, w.tensors()),
    "PolicyModule.decide": lambda w: (w.module.decide, {**w.tensors(), "prefix": None, "prefix_weight": None}),
    "PolicyModule.forward": lambda w: (w.module, w.tensors()),
    "Recorder": lambda w: (
        Recorder,
        {
            "dataset_id": "lab/a-v0",
            "observation_space": w.env.observation_space,
            "action_space": w.env.action_space,
            "root": w.new(),
            "control_rate_hz": None,
            "environment": None,
            "environment_id": None,
            "success": False,
            "resume": False,
        },
    ),
    "Recorder.reset": lambda w: (w.recorder().reset, {"observation": w.row}),
    "Recorder.step": lambda w: (
        w.recording().step,
        {
            "action": w.env.action_space.sample(),
            "observation": w.row,
            "reward": 0.0,
            "terminated": False,
            "truncated": False,
            "success": None,
        },
    ),
    "TrainConfig": lambda w: (TrainConfig, fields(w.config)),
    "TrainConfig.changed": lambda w: (w.config.changed, {"steps": 2}),
    "TrainConfig.deciding": lambda w: (w.config.deciding, {"online": True}),
    "TrainConfig.from_json": lambda w: (TrainConfig.from_json, {"text": w.config.to_json()}),
    "TrainConfig.preset": lambda w: (
        lambda name, shared, steps: TrainConfig.preset(name, shared, steps=steps),
        {"name": "bc", "shared": None, "steps": 1},
    ),
    "TrainConfig.resolved": lambda w: (w.config.resolved, {"begun": None}),
    "collect": lambda w: (
        collect,
        {
            "environment_id": "meam/Pockets-v0",
            "transitions": 1,
            "seed": 0,
            "policy": None,
            "dataset_id": None,
            "root": w.new(),
            "mode_shares": None,
            "resume": False,
            "on_progress": None,
            "env_kwargs": None,
        },
    ),
    "data_report": lambda w: (
        data_report,
        {"dataset": w.data, "chunk_size": 1, "pad_chunks": True, "quick": True, "action_scaling": "data"},
    ),
    "load_networks": lambda w: (meam_training.load_networks, {"policy_or_run": w.folder}),
    "read_sweep": lambda w: (meam_training.read_sweep, {"path": w.sweep, "output_dir": w.new()}),
    "run_sweep": lambda w: (meam_training.run_sweep, {"runs": [], "workers": 1, "report": lambda _: None}),
    "train": lambda w: (
        train,
        {
            "config": w.config,
            "dataset": w.data,
            "output_dir": w.new(),
            "resume": False,
            "on_progress": None,
            "on_evaluation": None,
            "on_warning": None,
            "on_start": None,
            "value": None,
            "prior": None,
            "env": None,
            "online_env": None,
            "origin": None,
            "start_from": None,
            "statistics": "kept",
        },
    ),
    "Exported": held(meam_export.Exported),
    "LadderTask": lambda w: (LadderTask, {"env": w.env, "episodes": 1, "seed": 0, "environment": None}),
    "LadderTask.run": lambda w: (LadderTask(w.env, 1, 0).run, {"policy": w.policy, "seed": 0}),
    "export_policy": lambda w: (
        export_policy,
        {
            "checkpoint": w.checkpoint,
            "output_dir": w.new(),
            "nfe": None,
            "solver": None,
            "time_grid": None,
            "best_of": None,
            "acting": None,
            "variants": (),
            "observations": None,
            "task": None,
            "tolerance": None,
            "action_names": None,
            "observation_names": None,
            "robot": None,
            "license": None,
            "on_stage": None,
        },
    ),
}
BOUNDS: Mapping[str, Any] = {"action_low": -1.0, "action_high": 1.0, "clip_actions": True}
RECORDED: Mapping[str, Any] = {
    "observation_keys": None,
    "action_key": None,
    "action_space": None,
    "reward": None,
    "termination": None,
    "environment_id": None,
    "control_rate_hz": None,
    **BOUNDS,
}
SLOW = ("collect", "train", "export_policy")
"""Those of which a call takes long, and most values make no difference to it."""

WITHOUT_BASE = ("MeamPolicy.push_to_hub", "OfflineDataset.from_lerobot", "read_sweep", "run_sweep")
"""Those that are refused here whatever they are given: there is no Hub, and no such recording or sweep."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with nothing in it, and no Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)


def outcome(world: World, name: str, changes: Mapping[str, Any]) -> str | None:
    """What is wrong with what came of a call; None if it worked, or was refused by one of the package's errors."""
    function, arguments = CASES[name](world)
    try:
        with time_limit():
            function(**{**arguments, **changes})
    except MeamError as error:
        return None if str(error).strip() else f"{type(error).__name__} without a message"
    except HangError:
        return f"no end after {LONGEST_S} s"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def walk(world: World, names: Sequence[str]) -> int:
    """Call each with one wrong value after the other in each place; the number of calls."""
    calls, found = 0, []
    for name in names:
        for place in CASES[name](world)[1]:
            for described, wrong in WRONG.items():
                problem = outcome(world, name, {place: wrong})
                calls += 1
                if problem is not None:
                    found.append(f"{name}({place}={described}): {problem}")
    assert not found, "\n".join(found)
    return calls


def test_the_walk_has_every_public_callable_with_all_of_its_arguments(world):
    callables = public()
    assert set(CASES) == set(callables)
    for name, thing in callables.items():
        arguments = {
            parameter.name
            for parameter in inspect.signature(thing).parameters.values()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        assert arguments - {"self"} <= set(CASES[name](world)[1]), name


@pytest.mark.usefixtures("nowhere")
@pytest.mark.filterwarnings("ignore")
def test_what_is_right_is_taken(world):
    for name in set(CASES) - set(WITHOUT_BASE):
        function, arguments = CASES[name](world)
        function(**arguments)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.filterwarnings("ignore")
def test_every_public_callable_refuses_wrong_arguments_by_an_error_of_the_package(world):
    assert walk(world, [name for name in CASES if name not in SLOW]) >= LEAST_CALLS


@pytest.mark.slow
@pytest.mark.usefixtures("nowhere")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLOW)
def test_what_takes_long_refuses_wrong_arguments_by_an_error_of_the_package(world, name):
    assert walk(world, [name]) >= 100


PYTHON_TO_NUMPY: Mapping[type, type] = {int: np.int64, float: np.float64, bool: np.bool_}


@pytest.mark.usefixtures("nowhere")
@pytest.mark.filterwarnings("ignore")
def test_scalars_of_numpy_are_taken_where_pythons_are(world):
    taken = 0
    for name in set(CASES) - set(WITHOUT_BASE):
        for place, value in CASES[name](world)[1].items():
            if type(value) in PYTHON_TO_NUMPY:
                function, arguments = CASES[name](world)
                function(**{**arguments, place: PYTHON_TO_NUMPY[type(value)](value)})
                taken += 1
    assert taken >= 100


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        (
            {"batch_size": 10**13},
            "batch_size is 10000000000000; expected a whole number of 1 or more, at most 16777216",
        ),
        ({"chunk_size": 10**9}, "chunk_size is 1000000000; expected a whole number of 1 or more, at most 10000"),
        ({"threads": 10**9}, "threads is 1000000000; expected a whole number of 1 or more, or None, at most 1024"),
        ({"hidden_dims": (10**9,)}, "expected whole numbers of 1 or more, at most 65536"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(sizes, named):
    with pytest.raises(ConfigError, match=named):
        TrainConfig(**sizes)


def test_what_does_not_fit_into_memory_is_said_with_the_sizes_that_ask_for_it(world, monkeypatch):
    def full(*_: Any) -> None:
        raise MemoryError("Unable to allocate 1 PiB")

    monkeypatch.setattr(Learner, "update", full)
    with pytest.raises(ConfigError, match="Memory is not enough for batch_size = 8, .*1 PiB.*smaller"):
        train(world.config, world.data, world.new())


def test_a_batch_that_no_memory_holds_is_refused(world):
    with pytest.raises(ObservationError, match="The batch is too large for this machine"):
        world.policy.act(np.broadcast_to(world.row, (10**13, *world.row.shape)))


def test_threads_that_no_machine_has_are_refused_on_the_command_line(world, capsys):
    assert cli.run(["verify", str(world.folder), "--threads", "1000000000"]) == 2
    assert "threads is 1000000000; expected 1 to 1024." in capsys.readouterr().err
