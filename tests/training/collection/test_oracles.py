import functools
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError, NotFoundError
from meam_training.collection.collect import collect
from meam_training.collection.demonstrators import ManipulationDemonstrator, manipulation
from meam_training.collection.demonstrators.episode import Episode, episode_generator, seeded_globally
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


@dataclass(frozen=True)
class Recorded:
    """The demonstrator's first two episodes at seed 5, and the task's own environment, reset once."""

    environment_id: str
    demonstrator: ManipulationDemonstrator
    episodes: list[Episode]
    env: Any


@pytest.fixture(scope="module")
def recordings():
    """Records a task once: OGBench takes a second or two to make an environment, and up to three are needed."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as opened:
        patch.setattr(manipulation, "EPISODE_STEPS", STEPS)

        @functools.cache
        def record(environment_id):
            demonstrator = ManipulationDemonstrator(environment_id, seed=5)
            opened.callback(demonstrator.close)
            env = make_environment(environment_id)
            opened.callback(env.close)
            env.reset()
            return Recorded(
                environment_id, demonstrator, [demonstrator.record_episode(number) for number in range(2)], env
            )

        yield record


@pytest.fixture(params=TASKS)
def recorded(request, recordings):
    return recordings(request.param)


def assert_same(one, other):
    for ours, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def goals_held(environment_id, task, observations):
    """Which goals of the task hold, read from the observations as OGBench lays them out [n, goals]."""
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
    env, episodes = recorded.env, recorded.episodes
    for episode in episodes:
        assert episode.observations.shape == (STEPS + 1, *env.observation_space.shape)
        assert episode.actions.shape == (STEPS, *env.action_space.shape)
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert np.isfinite(episode.observations).all()
        assert all(env.action_space.contains(action) for action in episode.actions)
        assert (episode.actions.std(axis=0)[:4] > 0.05).all()
    assert not np.array_equal(episodes[0].observations[0], episodes[1].observations[0])


def test_a_reward_counts_the_goals_that_do_not_hold_before_the_step(recorded):
    for episode in recorded.episodes:
        held = goals_held(recorded.environment_id, recorded.env.unwrapped, episode.observations[:-1])
        np.testing.assert_array_equal(episode.rewards, held.sum(axis=1) - held.shape[1])
        np.testing.assert_array_equal(episode.terminations, held.all(axis=1))


def test_an_episode_depends_on_its_number_alone(recorded):
    for number in (1, 0):
        assert_same(recorded.demonstrator.record_episode(number), recorded.episodes[number])


def test_another_seed_gives_other_episodes(recordings):
    other = ManipulationDemonstrator(CUBE, seed=6)
    assert not np.array_equal(other.record_episode(0).actions, recordings(CUBE).episodes[0].actions)
    other.close()


def test_the_recorded_actions_lead_through_the_recorded_observations(recordings):
    episode = recordings(CUBE).episodes[0]
    env = make_environment(CUBE, mode="data_collection", terminate_at_goal=False)
    observation, _ = env.reset(seed=int(episode_generator(5, 0).integers(2**31, 2**32)))
    for action, expected in zip(episode.actions, episode.observations, strict=False):
        np.testing.assert_array_equal(observation.astype(np.float32), expected)
        observation = env.unwrapped.step(action)[0]
    env.close()


def test_recording_leaves_numpys_global_generator_alone(recordings):
    demonstrator = recordings(CUBE).demonstrator
    with seeded_globally(1):
        demonstrator.record_episode(0)
        after = np.random.uniform()  # noqa: NPY002
    with seeded_globally(1):
        assert np.random.uniform() == after  # noqa: NPY002


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


@pytest.mark.slow
def test_a_resumed_recording_is_the_uninterrupted_one(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    name = "cube-double-noisy-singletask-task1-v0"
    whole = collect(name, 2 * STEPS, root=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect(name, 2 * STEPS, root=tmp_path / "resumed", on_progress=interrupt)
    resumed = collect(name, 2 * STEPS, root=tmp_path / "resumed", resume=True)
    assert OfflineDataset.from_minari(resumed).fingerprint == OfflineDataset.from_minari(whole).fingerprint


@pytest.mark.slow
def test_a_scene_whose_block_leaves_the_workspace_is_recorded_again(recordings, monkeypatch):
    seen = []

    def in_workspace_at_last(states):
        seen.append(states)
        return len(seen) == 3

    recorded = recordings(SCENE)
    monkeypatch.setattr(manipulation, "_in_workspace", in_workspace_at_last)
    again = recorded.demonstrator.record_episode(0)
    assert len(seen) == 3
    assert not np.array_equal(recorded.episodes[0].observations[0], again.observations[0])


@pytest.mark.parametrize(
    ("y", "z", "seen"), [(0.0, 0.02, True), (0.3, 0.02, False), (-0.31, 0.02, False), (-0.31, 0.07, True)]
)
def test_a_block_is_in_the_workspace_on_the_table_and_in_the_drawer(y, z, seen):
    states = np.zeros((5, 20))
    states[3, 15:17] = y, z
    assert manipulation._in_workspace(states) is seen


@pytest.mark.slow
def test_the_goal_is_met_now_and_then_and_left_again_where_the_name_has_no_kind_of_data(tmp_path, monkeypatch):
    monkeypatch.setattr(manipulation, "EPISODE_STEPS", 500)
    folder = collect("cube-single-singletask-task1-v0", 1000, seed=3, root=tmp_path)
    assert algorithm_of(folder) == "OGBench's scripted oracles (play)"
    data = OfflineDataset.from_minari(folder)
    np.testing.assert_array_equal(data.terminations, data.rewards == 0)
    assert 0 < data.terminations.mean() < 0.2
    assert (data.terminations[:-1] & ~data.terminations[1:] & ~data.episode_ends[:-1]).any()


def algorithm_of(folder):
    return json.loads((folder / "data" / "metadata.json").read_text())["algorithm_name"]


def test_recording_needs_no_display_and_the_data_set_records_its_origin(tmp_path):
    """A process of its own: what draws is chosen when it is imported."""
    drawing = ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")
    environment = {name: value for name, value in os.environ.items() if name not in drawing}
    code = (
        "import sys; from meam_policy.cli import run; from meam_training.collection.demonstrators import manipulation; "
        "manipulation.EPISODE_STEPS = 5; sys.exit(run(['collect', sys.argv[1], '--transitions', '6', '--seed', '5', "
        "'--json', '--root', sys.argv[2]]))"
    )
    command = [sys.executable, "-c", code, NOISY_CUBE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    folder = tmp_path / "cube" / "single-noisy-singletask-task1-v0"
    assert folder.samefile(json.loads(done.stdout)["dataset"])
    data = OfflineDataset.from_minari(folder)
    assert (data.environment_id, data.control_rate_hz, len(data)) == (NOISY_CUBE, 20, 10)
    assert algorithm_of(folder) == "OGBench's scripted oracles (noisy)"
    assert json.loads((folder / "data" / "metadata.json").read_text())["meam_seed"] == 5
