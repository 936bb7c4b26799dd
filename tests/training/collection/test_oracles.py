import json
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError, NotFoundError
from meam_training.collection.collect import collect
from meam_training.collection.demonstrators import ManipulationDemonstrator, manipulation
from meam_training.collection.demonstrators.episode import episode_generator, seeded_globally
from meam_training.data.dataset import OfflineDataset

pytest.importorskip("ogbench")
# OGBench makes the action space anew at every step, from float64 bounds.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*precision lowered by casting:UserWarning")]

CUBE = "cube-single-play-singletask-task1-v0"
SCENE = "scene-play-singletask-task2-v0"
PUZZLE = "puzzle-3x3-play-singletask-v0"
NOISY_CUBE = CUBE.replace("play", "noisy")
TASKS = [CUBE, *(pytest.param(name, marks=pytest.mark.slow) for name in (SCENE, PUZZLE, NOISY_CUBE))]
STEPS = 80


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch):
    monkeypatch.setattr(manipulation, "EPISODE_STEPS", STEPS)


@pytest.fixture(scope="module", params=TASKS)
def recorded(request):
    """Environment id and the demonstrator's first two episodes at seed 5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manipulation, "EPISODE_STEPS", STEPS)
        demonstrator = ManipulationDemonstrator(request.param, seed=5)
        yield request.param, [demonstrator.record_episode(number) for number in range(2)]
        demonstrator.close()


def assert_same(one, other):
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def goals_held(environment_id, observations):
    """Which goals of the task hold, read from the observations as OGBench lays them out [n, goals]."""
    env = make_environment(environment_id)
    env.reset()
    env.close()
    task: Any = env.unwrapped
    xyz = observations[:, 19:22] / 10 + [0.425, 0, 0]
    cube: Any = np.linalg.norm(xyz - task._data.mocap_pos[0], axis=1) <= 0.04 if len(task._data.mocap_pos) else None
    if environment_id.startswith("cube"):
        return cube[:, None]
    first, count = (28, 2) if cube is not None else (19, 9)  # two bits, position and velocity of every button
    pressed = observations[:, first : first + 4 * count].reshape(-1, count, 4)[:, :, 1]
    buttons = pressed == task._target_button_states
    if cube is None:
        return buttons
    drawer = np.abs(observations[:, 36] / 18 - task._target_drawer_pos) <= 0.04
    window = np.abs(observations[:, 38] / 15 - task._target_window_pos) <= 0.04
    return np.column_stack([cube, buttons, drawer, window])


def test_recordings_lie_in_the_spaces_of_the_task(recorded):
    environment_id, episodes = recorded
    env: Any = make_environment(environment_id)
    for episode in episodes:
        assert episode.observations.shape == (STEPS + 1, *env.observation_space.shape)
        assert episode.actions.shape == (STEPS, *env.action_space.shape)
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert np.isfinite(episode.observations).all()
        assert all(env.action_space.contains(action) for action in episode.actions)
        assert (episode.actions.std(axis=0)[:4] > 0.05).all()
    assert not np.array_equal(episodes[0].observations[0], episodes[1].observations[0])
    env.close()


def test_a_reward_counts_the_goals_that_do_not_hold_before_the_step(recorded):
    environment_id, episodes = recorded
    for episode in episodes:
        held = goals_held(environment_id, episode.observations[:-1])
        np.testing.assert_array_equal(episode.rewards, held.sum(axis=1) - held.shape[1])
        np.testing.assert_array_equal(episode.terminations, held.all(axis=1))


def test_an_episode_depends_on_its_number_and_the_seed_alone(recorded):
    environment_id, episodes = recorded
    alone = ManipulationDemonstrator(environment_id, seed=5)
    assert_same(alone.record_episode(1), episodes[1])
    assert_same(alone.record_episode(0), episodes[0])
    alone.close()
    other = ManipulationDemonstrator(environment_id, seed=6)
    assert not np.array_equal(other.record_episode(0).actions, episodes[0].actions)
    other.close()


def test_the_recorded_actions_lead_through_the_recorded_observations():
    demonstrator = ManipulationDemonstrator(CUBE, seed=5)
    episode = demonstrator.record_episode(0)
    demonstrator.close()
    env = make_environment(CUBE, mode="data_collection", terminate_at_goal=False)
    observation, _ = env.reset(seed=int(episode_generator(5, 0).integers(2**31, 2**32)))
    for action, expected in zip(episode.actions, episode.observations, strict=False):
        np.testing.assert_array_equal(observation.astype(np.float32), expected)
        observation = env.unwrapped.step(action)[0]
    env.close()


def test_recording_leaves_numpys_global_generator_alone():
    demonstrator = ManipulationDemonstrator(CUBE)
    with seeded_globally(1):
        demonstrator.record_episode(0)
        after = np.random.uniform()  # noqa: NPY002
    with seeded_globally(1):
        assert np.random.uniform() == after  # noqa: NPY002
    demonstrator.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cube-single-expert-singletask-task1-v0", 'names the kind of data "expert"; expected "play" or "noisy"'),
        ("cube-single-play-v0", 'has no fixed task, so no reward; expected a "singletask" name'),
    ],
)
def test_a_name_without_an_oracle_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigError, match=f'"{name}" {message}'):
        collect(name, 10, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_size_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="cube-sextuple"):
        collect("cube-sextuple-play-singletask-task1-v0", 10, root=tmp_path)


def test_a_name_without_a_kind_of_data_is_recorded_as_play():
    demonstrator = ManipulationDemonstrator("cube-single-singletask-task1-v0", seed=5)
    assert demonstrator.kind == "play"
    demonstrator.close()


def test_the_data_set_records_its_origin(tmp_path):
    folder = collect(CUBE, 2 * STEPS, seed=5, root=tmp_path)
    data = OfflineDataset.from_minari(folder)
    assert folder == tmp_path / "cube" / "single-play-singletask-task1-v0"
    assert (data.environment_id, data.control_rate_hz) == (CUBE, 20)
    assert len(data) == 2 * STEPS
    metadata = (folder / "data" / "metadata.json").read_text()
    assert re.search(r'"algorithm_name": "OGBench\'s scripted oracles \(play\)"', metadata)
    assert '"meam_seed": 5' in metadata


@pytest.mark.slow
@pytest.mark.parametrize("name", [SCENE, "cube-double-noisy-singletask-task1-v0"])
def test_a_resumed_recording_is_the_uninterrupted_one(tmp_path, name):
    def interrupt(done, total):
        if done >= 2 * STEPS:
            raise KeyboardInterrupt

    whole = collect(name, 4 * STEPS, root=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect(name, 4 * STEPS, root=tmp_path / "resumed", on_progress=interrupt)
    resumed = collect(name, 4 * STEPS, root=tmp_path / "resumed", resume=True)
    assert OfflineDataset.from_minari(resumed).fingerprint == OfflineDataset.from_minari(whole).fingerprint


@pytest.mark.slow
def test_a_scene_whose_block_leaves_the_workspace_is_recorded_again(monkeypatch):
    seen = []

    def in_workspace_at_last(states):
        seen.append(states)
        return len(seen) == 3

    demonstrator = ManipulationDemonstrator(SCENE, seed=5)
    first: Any = demonstrator.record_episode(0)
    monkeypatch.setattr(manipulation, "_in_workspace", in_workspace_at_last)
    again: Any = demonstrator.record_episode(0)
    demonstrator.close()
    assert len(seen) == 3
    assert not np.array_equal(first.observations[0], again.observations[0])


@pytest.mark.parametrize(
    ("y", "z", "seen"), [(0.0, 0.02, True), (0.3, 0.02, False), (-0.31, 0.02, False), (-0.31, 0.07, True)]
)
def test_a_block_is_in_the_workspace_on_the_table_and_in_the_drawer(y, z, seen):
    states = np.zeros((5, 20))
    states[3, 15:17] = y, z
    assert manipulation._in_workspace(states) is seen


@pytest.mark.slow
def test_the_goal_is_met_now_and_then_and_left_again(tmp_path, monkeypatch):
    monkeypatch.setattr(manipulation, "EPISODE_STEPS", 1000)
    data = OfflineDataset.from_minari(collect(CUBE, 4000, root=tmp_path))
    np.testing.assert_array_equal(data.terminations, data.rewards == 0)
    assert 0 < data.terminations.mean() < 0.2
    assert (data.terminations[:-1] & ~data.terminations[1:] & ~data.episode_ends[:-1]).any()


def test_recording_needs_no_display_and_does_not_ask_for_one(tmp_path):
    """A process of its own: what draws is chosen when it is imported."""
    drawing = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")
    environment = {name: value for name, value in os.environ.items() if name not in drawing}
    code = (
        "import sys; from meam_policy.cli import run; from meam_training.collection.demonstrators import manipulation; "
        "manipulation.EPISODE_STEPS = 5; sys.exit(run(['collect', sys.argv[1], '--transitions', '1', '--json', "
        "'--root', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, CUBE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert (tmp_path / "cube" / "single-play-singletask-task1-v0").samefile(json.loads(done.stdout)["dataset"])
