"""Positions in map coordinates, from the data to the action: the same actions as near the origin."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import onnx
import pytest
import torch
from gymnasium import spaces
from safetensors.numpy import load_file

from meam_export import export_policy
from meam_policy import FormatError, MeamPolicy, rollout
from meam_policy.cli import run as command
from meam_policy.diagnosis.verify import verify_policy
from meam_policy.inference.session import PolicySession
from meam_policy.loop.control_loop import ControlLoop
from meam_training import OfflineDataset, PolicyModule, TrainConfig, load_networks, train

ROWS = 400
ORIGIN = np.array([447_120.0, 5_411_840.0, 0.0])
"""Easting and northing of a field in UTM zone 32, metres; and a heading."""

CONFIG: dict[str, Any] = {
    "steps": 300,
    "hidden_dims": (32,),
    "batch_size": 64,
    "learning_rate": 3e-3,
    "device": "cpu",
    "threads": 1,
    "chunk_size": 2,
}
METRES = spaces.Box(-np.inf, np.inf, (3,), np.float64)


def recording(origin: np.ndarray, seed: int = 0) -> OfflineDataset:
    """A vehicle that steers back to a point: the action depends on where it is, within metres."""
    generator = np.random.default_rng(seed)
    local = generator.uniform([-5, -5, -1], [5, 5, 1], (ROWS, 3))
    actions = np.tanh(-local[:, :2] / 5)
    ends = np.arange(ROWS) % 40 == 39
    return OfflineDataset.from_arrays(
        local + origin,
        actions,
        np.zeros(ROWS),
        local + origin,
        np.zeros(ROWS),
        ends,
        observation_space=METRES,
        control_rate_hz=10,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same policy trained on the map, and near the origin."""
    base = tmp_path_factory.mktemp("map")
    config = TrainConfig.preset("bc", CONFIG)
    for name, origin in (("map", ORIGIN), ("origin", np.zeros(3))):
        train(config, recording(origin), base / name)
        export_policy(base / name, base / f"{name}-policy")
    return {"runs": base, "map": base / "map-policy", "origin": base / "origin-policy"}


def local_points(count: int = 50) -> np.ndarray:
    return np.random.default_rng(9).uniform([-5, -5, -1], [5, 5, 1], (count, 3))


def test_the_actions_are_those_of_the_same_data_near_the_origin(folders: dict[str, Path]) -> None:
    far, near = (MeamPolicy.from_pretrained(folders[name], seed=0) for name in ("map", "origin"))
    assert far.spec.observation_offset == (447_120.0, 5_411_840.0, 0.0)
    assert near.spec.observation_offset == ()
    local = local_points()
    noise = np.zeros((len(local), far.spec.noise_dim), np.float32)
    actions, expected = far.sample(local + ORIGIN, noise), near.sample(local, noise)
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    assert np.abs(actions[:, 0] - np.tanh(-local[:, :2] / 5)).mean() < 0.08  # and they are right
    # In float32 the digits are gone before the policy sees them.
    lossy = (local + ORIGIN).astype(np.float32)
    with pytest.warns(RuntimeWarning, match=r"index 1 near 5411840 has steps of 0.5: .* float64"):
        assert np.abs(far.sample(lossy, noise) - expected).max() > 0.01
    for act in (far.act, far.select_action, far.predict_action_chunk, far.sample):  # it has been said
        act(lossy)
    for name in ("act", "select_action", "predict_action_chunk", "sample"):
        with pytest.warns(RuntimeWarning, match="index 1 near 5411840"):
            getattr(MeamPolicy.from_pretrained(folders["map"]), name)(lossy)


def test_every_way_of_acting_takes_the_offset_off(folders: dict[str, Path]) -> None:
    far, near = (MeamPolicy.from_pretrained(folders[name], noise_scale=0.0) for name in ("map", "origin"))
    points = local_points(3)
    for act in (
        lambda policy, o: policy.act(o),
        lambda policy, o: policy.predict(o)[0],
        lambda policy, o: policy.select_action(o),
        lambda policy, o: policy.predict_action_chunk(o, deterministic=True),
        lambda policy, o: policy.act(o[0]),
        lambda policy, o: [policy.accepts(o[0])],
    ):
        for policy in (far, near):
            policy.reset()
        np.testing.assert_allclose(act(far, points + ORIGIN), act(near, points), atol=1e-5)
    acted = []
    for policy, origin in ((far, ORIGIN), (near, 0 * ORIGIN)):
        with ControlLoop(policy, 10, chunking="blocking", simulated_delay=0) as loop:
            acted.append([loop.step(point + origin) for point in points])
    np.testing.assert_allclose(*acted, atol=1e-5)


def test_an_unfamiliar_place_is_told_by_metres(folders: dict[str, Path]) -> None:
    policy = MeamPolicy.from_pretrained(folders["map"])
    policy.act(ORIGIN + np.array([4.0, -4.0, 0.5]))
    assert policy.health().unfamiliar == 0
    policy.act(ORIGIN + np.array([100.0, 0.0, 0.0]))
    assert policy.health().unfamiliar == 1


class Field(gymnasium.Env[np.ndarray, np.ndarray]):
    """Drive to the middle of the field."""

    observation_space = METRES
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, origin: np.ndarray = ORIGIN) -> None:
        self._origin, self._place, self._ticks = origin, np.zeros(3), 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._place, self._ticks = self.np_random.uniform(-5, 5, 3), 0
        return self._origin + self._place, {}

    def step(self, action: np.ndarray) -> Any:
        self._place[:2] += action
        self._ticks += 1
        distance = float(np.linalg.norm(self._place[:2]))
        return self._origin + self._place, -distance, False, self._ticks == 20, {}


def test_rollouts_are_those_near_the_origin(folders: dict[str, Path]) -> None:
    near = rollout(MeamPolicy.from_pretrained(folders["origin"], noise_scale=0.0), Field(np.zeros(3)), 3, 0)
    policy = MeamPolicy.from_pretrained(folders["map"], noise_scale=0.0)
    far = rollout(policy, Field(), 3, 0, record=True)
    np.testing.assert_allclose(far.returns, near.returns, rtol=1e-4)
    assert far.observations[0][0] == pytest.approx(ORIGIN, abs=10)  # raw, as recorded
    vector = gymnasium.vector.SyncVectorEnv([Field] * 3)
    np.testing.assert_allclose(rollout(policy, vector, 3, 0).returns, near.returns, rtol=1e-4)


def test_the_folder_says_so(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_policy(folders["map"], calls=1).graphs[0].max_difference == pytest.approx(0, abs=1e-5)
    assert command(["info", str(folders["map"])]) == 0
    assert "447120.0 of 0, 5411840.0 of 1; give observations in float64" in " ".join(
        capsys.readouterr().out.replace("│", " ").split()
    )
    assert json.loads((folders["map"] / "config.json").read_text())["observation_offset"] == ORIGIN.tolist()
    assert "observation_offset" not in (folders["origin"] / "config.json").read_text()
    told = {p.key: p.value for p in onnx.load(folders["map"] / "policy.onnx").metadata_props}
    assert told["observation_offset"] == "447120.0,5411840.0,0.0"
    assert "observation_offset" in (folders["map"] / "README.md").read_text()


def test_a_graph_with_another_offset_than_its_folder_is_refused(folders: dict[str, Path]) -> None:
    spec, graph = MeamPolicy.from_pretrained(folders["map"]).spec, (folders["map"] / "policy.onnx").read_bytes()
    for other in ((), (447_120.0, 5_411_850.0, 0.0)):
        with pytest.raises(
            FormatError, match=r"its observation_offset are 447120.0,5411840.0,0.0, but config.json says"
        ):
            PolicySession(graph, replace(spec, observation_offset=other))


def test_the_networks_in_pytorch_take_what_is_left(folders: dict[str, Path]) -> None:
    spec, local = MeamPolicy.from_pretrained(folders["map"]).spec, local_points(5)
    rows = torch.tensor(local, dtype=torch.float32)
    found = PolicyModule(load_networks(folders["map"]), spec)(rows, torch.zeros(5, spec.noise_dim)).detach().numpy()
    expected = MeamPolicy.from_pretrained(folders["map"]).sample(local + ORIGIN, np.zeros((5, spec.noise_dim)))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("statistics", ["kept", "renewed"])
def test_going_on_elsewhere_normalises_the_same_place_alike(
    folders: dict[str, Path], tmp_path: Path, statistics: Any
) -> None:
    moved = ORIGIN + np.array([300.0, 0, 0])
    config = TrainConfig.preset("bc", CONFIG, steps=1, learning_rate=1e-12)
    last = train(config, recording(moved, 1), tmp_path / "run", start_from=folders["map"], statistics=statistics)
    assert last.spec.observation_offset == (447_420.0, 5_411_840.0, 0.0)
    resumed = train(config.changed(steps=2), recording(moved, 1), tmp_path / "run", resume=True)
    assert resumed.spec.observation_mean == last.spec.observation_mean
    found = MeamPolicy.from_pretrained(export_policy(last, tmp_path / "policy").folder)
    before, local = MeamPolicy.from_pretrained(folders["map"]), local_points(5)
    noise = np.zeros((5, before.spec.noise_dim), np.float32)
    place = ORIGIN if statistics == "kept" else moved
    tolerance = 1e-4 if statistics == "kept" else 0.1  # means of other data
    np.testing.assert_allclose(found.sample(local + place, noise), before.sample(local + ORIGIN, noise), atol=tolerance)


def test_online_learning_records_what_the_data_holds(tmp_path: Path) -> None:
    config = TrainConfig.preset(
        "me-am",
        CONFIG,
        steps=4,
        critic_hidden_dims=(16,),
        num_critics=2,
        online_steps=25,
        online_warmup=20,
        evaluate_every=4,
        evaluate_episodes=1,
    )
    last = train(config, recording(ORIGIN), tmp_path / "run", env=Field(), online_env=Field())
    rows = load_file(last.path / "online.safetensors")["observations"]
    assert rows.shape == (25, 3)
    assert np.abs(rows).max() < 40
    assert len(np.unique(rows[:, 0])) > 20  # no digit is lost
