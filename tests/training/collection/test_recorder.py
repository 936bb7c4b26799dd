"""Recording one's own robot step by step; Minari itself reads it back."""

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
from typing import Any

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces

from meam_policy import ConfigError, DatasetError, LockedError, OutputError
from meam_training import OfflineDataset, Recorder
from meam_training.collection import partial_recording

BOX = spaces.Box(-10, 10, (3,))
KEYED = spaces.Dict([("tool", spaces.Box(-10, 10, (1, 2))), ("arm", BOX), ("mode", spaces.Box(0, 3, (1,), np.uint8))])
ACTIONS = spaces.Box(-1, 1, (2,))


def draw(space, random) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: draw(box, random) for key, box in space.spaces.items()}
    return random.uniform(space.low, space.high).astype(space.dtype)


def drawn_episodes(space, lengths, seed=0):
    """Episodes as lists of observations and of (action, reward, terminated, truncated)."""
    random = np.random.default_rng(seed)
    return [
        (
            [draw(space, random) for _ in range(length + 1)],
            [
                (draw(ACTIONS, random), random.normal(), last and index % 2 == 0, last and index % 2 == 1)
                for last in [False] * (length - 1) + [True]
            ],
        )
        for index, length in enumerate(lengths)
    ]


def record(recorder, episodes, successes=None):
    for observations, steps in episodes:
        recorder.reset(observations[0])
        for t, (action, reward, terminated, truncated) in enumerate(steps):
            assert recorder.running
            won = {} if successes is None else {"success": successes(t)}
            recorder.step(action, observations[t + 1], reward, terminated, truncated, **won)
        assert not recorder.running


def read_back(folder):
    return list(minari.MinariDataset(folder / "data").iterate_episodes())


@pytest.mark.parametrize("space", [BOX, KEYED])
def test_minari_reads_back_what_was_recorded(tmp_path, space):
    episodes = drawn_episodes(space, (5, 1, 7))
    with Recorder("lab/arm-v0", space, ACTIONS, root=tmp_path, control_rate_hz=50, environment_id="Arm") as recorder:
        record(recorder, episodes)
        assert (recorder.episodes, recorder.transitions) == (3, 13)
        folder = recorder.finish()
    assert folder == tmp_path / "lab/arm-v0"
    found = read_back(folder)
    for episode, (observations, steps) in zip(found, episodes, strict=True):
        keys: Any = space.spaces if isinstance(space, spaces.Dict) else [None]
        for key in keys:
            expected = np.stack([o if key is None else o[key] for o in observations])
            seen = episode.observations if key is None else episode.observations[key]
            np.testing.assert_array_equal(seen, expected)
            assert seen.dtype == expected.dtype
        actions, rewards, terminated, truncated = (np.array(column) for column in zip(*steps, strict=True))
        np.testing.assert_array_equal(episode.actions, actions)
        np.testing.assert_array_equal(episode.rewards, rewards.astype(np.float32))
        np.testing.assert_array_equal(episode.terminations, terminated)
        np.testing.assert_array_equal(episode.truncations, truncated)
        assert not episode.infos
    data = OfflineDataset.from_minari(folder)
    assert (len(data), data.environment_id, data.control_rate_hz) == (13, "Arm", 50)
    assert [path.name for path in (tmp_path / "lab").iterdir() if path.name.endswith(".partial")] == []


def test_the_names_of_a_dicts_keys_stay_with_their_numbers(tmp_path):
    episodes = drawn_episodes(KEYED, (4, 3))
    with Recorder("lab/arm-v0", KEYED, ACTIONS, root=tmp_path) as recorder:
        record(
            recorder, [([dict(reversed(o.items())) for o in observations], steps) for observations, steps in episodes]
        )
        data = OfflineDataset.from_minari(recorder.finish())
    start = 0
    for box in data.observation_boxes:
        expected = [np.ravel(o[str(box.key)]) for observations, _ in episodes for o in observations[:-1]]
        np.testing.assert_array_equal(data.observations[:, start : start + box.size], np.array(expected, np.float32))
        start += box.size


def test_successes_are_in_minaris_infos(tmp_path):
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, success=True) as recorder:
        record(recorder, drawn_episodes(BOX, (3, 2)), successes=lambda t: np.bool_(t == 1))
        folder = recorder.finish()
    assert [e.infos["success"].tolist() for e in read_back(folder)] == [
        [False, False, True, False],
        [False, False, True],
    ]
    assert len(OfflineDataset.from_minari(folder)) == 5


def test_arrays_that_the_driver_uses_again_are_copied(tmp_path):
    observation, action = np.zeros(3, np.float32), np.zeros(2, np.float32)
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path) as recorder:
        recorder.reset(observation)
        for t in range(1, 4):
            observation[:], action[:] = t, t / 10
            recorder.step(action, observation, [0.5], False, t == 3)
        (episode,) = read_back(recorder.finish())
    assert episode.observations[:, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(episode.actions[:, 1], np.array([0.1, 0.2, 0.3], np.float32))


def test_a_recording_goes_on_another_day_and_is_then_the_same(tmp_path):
    episodes = drawn_episodes(BOX, (5, 4, 6))
    with Recorder("lab/whole-v0", BOX, ACTIONS, root=tmp_path) as recorder:
        record(recorder, episodes)
        whole = recorder.finish()
    for part in (episodes[:1], episodes[1:]):
        with Recorder("lab/parts-v0", BOX, ACTIONS, root=tmp_path, resume=True) as recorder:
            record(recorder, part)
            folder = recorder.finish() if recorder.episodes == 3 else None
    assert folder is not None
    assert OfflineDataset.from_minari(folder).fingerprint == OfflineDataset.from_minari(whole).fingerprint


def test_whole_episodes_outlive_a_kill(tmp_path):
    code = f"""
        import os, signal, numpy as np
        from gymnasium import spaces
        from meam_training import Recorder
        recorder = Recorder("lab/arm-v0", spaces.Box(-10, 10, (3,)), spaces.Box(-1, 1, (2,)), root={str(tmp_path)!r})
        for episode in range(3):
            recorder.reset(np.full(3, episode))
            for t in range(4):
                if episode == 2 and t == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                recorder.step(np.zeros(2), np.full(3, episode), t, False, t == 3)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "lab/arm-v0").exists()
    with pytest.raises(OutputError, match="An unfinished recording is in"):
        Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path)
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, resume=True) as recorder:
        assert (recorder.episodes, recorder.transitions) == (2, 8)
        record(recorder, drawn_episodes(BOX, (3,)))
        found = read_back(recorder.finish())
    assert [len(episode.rewards) for episode in found] == [4, 4, 3]
    assert [episode.observations[0, 0] for episode in found[:2]] == [0, 1]


def test_neither_jax_nor_a_simulator_is_needed(tmp_path):
    code = f"""
        import sys
        sys.modules.update(dict.fromkeys(("jax", "jaxlib", "mujoco", "ogbench", "dm_control"), None))
        import numpy as np
        from gymnasium import spaces
        from meam_training import Recorder
        box, actions = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))
        with Recorder("lab/arm-v0", box, actions, root={str(tmp_path)!r}) as recorder:
            recorder.reset(np.zeros(3))
            recorder.step(np.zeros(2), np.zeros(3), 0, True, False)
            recorder.finish()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=100)
    assert len(read_back(tmp_path / "lab/arm-v0")) == 1


GOOD: dict[str, Any] = {
    "action": [0, 0],
    "observation": [0, 0, 0],
    "reward": 0,
    "terminated": False,
    "truncated": False,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"action": [0, 1.5]}, "actions is 1.5 at episode 1, step 2, index 1; expected a value within its space"),
        ({"action": [0, np.nan]}, "actions is nan at episode 1, step 2, index 1; expected a finite number"),
        ({"action": [0, 0, 0]}, "actions has shape (1, 3); expected (1, 2)"),
        ({"action": ["a", "b"]}, "action has type <U1; expected real numbers"),
        ({"observation": [0, np.inf, 0]}, "next_observations is inf at episode 1, step 2, index 1"),
        ({"observation": [0, 0, 110]}, "next_observations is 110 at episode 1, step 2, index 2"),
        ({"observation": [[0, 0, 0]]}, "next_observations has shape (1, 1, 3); expected (1, 3)"),
        ({"observation": {"arm": [0, 0, 0]}}, "next_observations is a mapping, but the observation space is a Box"),
        ({"observation": [[0], [0, 0]]}, "observation is ragged"),
        ({"reward": np.nan}, "rewards is nan at episode 1, step 2"),
        ({"reward": [0, 1]}, "rewards has shape (1, 2)"),
        ({"reward": None}, "reward has type object"),
        ({"terminated": 2}, "terminated has shape (1,) or values other than 0 and 1"),
        ({"truncated": None}, "truncated has type object"),
        ({"truncated": [False, True]}, "truncated has shape (2,); expected one flag"),
    ],
)
def test_a_wrong_step_is_refused_by_name_and_the_episode_goes_on(tmp_path, change, reason):
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path) as recorder:
        record(recorder, drawn_episodes(BOX, (2,)))
        recorder.reset([0, 0, 0])
        recorder.step(**GOOD)
        recorder.step(**GOOD)
        with pytest.raises(DatasetError, match=re.escape(reason)):
            recorder.step(**{**GOOD, **change})
        recorder.step(**{**GOOD, "truncated": True})
        assert [len(episode.rewards) for episode in read_back(recorder.finish())] == [2, 3]


@pytest.mark.parametrize(
    ("space", "observation", "reason"),
    [
        (BOX, ([0, 0, 0], {}), "a pair (observation, info), as env.reset() returns it"),
        (BOX, [0, 0, np.nan], "observations is nan at episode 0, step 0, index 2"),
        (KEYED, {"arm": [0, 0, 0]}, "observations has ['arm']; expected a mapping with the keys"),
        (spaces.Box(0, 9, (1,), np.int64), [0.5], "observation has numbers that are no int64"),
    ],
)
def test_a_wrong_first_observation_is_refused_at_once(tmp_path, space, observation, reason):
    with Recorder("lab/arm-v0", space, ACTIONS, root=tmp_path) as recorder:
        with pytest.raises(DatasetError, match=re.escape(reason)):
            recorder.reset(observation)
        assert not recorder.running
    assert not list((tmp_path / "lab").iterdir())


def test_calls_out_of_order_are_refused(tmp_path):
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path) as recorder:
        with pytest.raises(ConfigError, match="No episode has begun"):
            recorder.step(**GOOD)
        with pytest.raises(ConfigError, match="no episode has been recorded"):
            recorder.finish()
        recorder.reset([0, 0, 0])
        recorder.step(**GOOD)
        with pytest.raises(ConfigError, match="Episode 0 has not ended after 1 steps"):
            recorder.reset([0, 0, 0])
        with pytest.raises(ConfigError, match="episode 0 has not ended"):
            recorder.finish()
        with pytest.raises(ConfigError, match="success is given, but the recorder was made with success=False"):
            recorder.step(**GOOD, success=True)
        with pytest.raises(LockedError, match="Another process is recording"):
            Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, resume=True)
        recorder.discard()
        record(recorder, drawn_episodes(BOX, (2,)))
        folder = recorder.finish()
    with pytest.raises(ConfigError, match=r"The recorder of lab/arm-v0 is closed\."):
        recorder.reset([0, 0, 0])
    assert len(read_back(folder)) == 1
    with pytest.raises(OutputError, match="exists already"):
        Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path)


def test_success_must_be_said_at_every_step_or_never(tmp_path):
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, success=True) as recorder:
        recorder.reset([0, 0, 0])
        with pytest.raises(ConfigError, match="success is missing, but the recorder was made with success=True"):
            recorder.step(**GOOD)
        recorder.discard()


def test_an_episode_that_has_not_ended_is_dropped_aloud(tmp_path):
    recorder = Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path)
    record(recorder, drawn_episodes(BOX, (2,)))
    recorder.reset([0, 0, 0])
    recorder.step(**GOOD)
    with pytest.warns(UserWarning, match="Episode 1 of lab/arm-v0 has not ended: its 1 steps are dropped"):
        recorder.close()
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, resume=True) as again:
        assert again.episodes == 1


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"dataset_id": "arm"}, ConfigError, '"arm" is not a Minari id'),
        ({"control_rate_hz": 0}, ConfigError, "control_rate_hz is 0; expected a rate above 0"),
        ({"control_rate_hz": np.nan}, ConfigError, "control_rate_hz is nan"),
        ({"action_space": spaces.Discrete(3)}, DatasetError, "expected a Box"),
        ({"action_space": spaces.Box(-np.inf, np.inf, (2,))}, DatasetError, "expected finite ones"),
        ({"observation_space": spaces.Discrete(3)}, DatasetError, "expected a Box"),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(tmp_path, settings, error, reason):
    given = {"dataset_id": "lab/arm-v0", "observation_space": BOX, "action_space": ACTIONS, **settings}
    with pytest.raises(error, match=re.escape(reason)):
        Recorder(**given, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_environment_that_is_recorded_is_followed_if_it_is_given(tmp_path):
    env = gymnasium.wrappers.ClipAction(gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=5))
    spaces_ = env.observation_space, env.unwrapped.action_space
    with Recorder("lab/swing-v0", *spaces_, environment=env, root=tmp_path) as recorder:
        recorder.reset(env.reset(seed=0)[0])
        while recorder.running:
            observation, reward, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
            recorder.step(np.zeros(1, np.float32), observation, float(reward), terminated, truncated)
        recorded = OfflineDataset.from_minari(recorder.finish()).environment
    assert recorded is not None
    assert (recorded.id, recorded.kwargs, recorded.max_episode_steps) == ("Pendulum-v1", {"g": 2.0}, 5)
    assert [wrapper.name for wrapper in recorded.wrappers] == ["ClipAction"]


def test_an_environment_that_cannot_be_the_recorded_one_is_refused_and_one_without_a_recipe_told(tmp_path):
    swing = gymnasium.make("Pendulum-v1")
    robot = swing.observation_space, swing.action_space
    with pytest.raises(ConfigError, match="environment is 'Pendulum-v1'; expected an environment of Gymnasium"):
        Recorder("lab/swing-v0", *robot, environment="Pendulum-v1", root=tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="environment has the observation space"):
        Recorder("lab/swing-v0", *robot, environment=gymnasium.make("CartPole-v1"), root=tmp_path)
    with pytest.warns(UserWarning, match="cannot be recorded"):
        Recorder("lab/swing-v0", *robot, environment=gymnasium.make("Pendulum-v1", g=np.ones(1)), root=tmp_path).close()


def test_another_robot_does_not_continue_the_recording(tmp_path):
    with Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, control_rate_hz=50) as recorder:
        record(recorder, drawn_episodes(BOX, (2,)))
    with pytest.raises(ConfigError, match="has control_rate_hz = 50, but now it is 20"):
        Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path, control_rate_hz=20, resume=True)
    with pytest.raises(ConfigError, match="has action_space = "):
        Recorder("lab/arm-v0", BOX, spaces.Box(-2, 2, (2,)), root=tmp_path, control_rate_hz=50, resume=True)


def test_map_coordinates_are_recorded_with_their_digits_in_a_space_that_holds_them(tmp_path):
    places = np.random.default_rng(0).normal([447_120, 5_411_840], 2, (41, 2))

    def recorded(name, dtype):
        space = spaces.Box(-np.inf, np.inf, (2,), dtype)
        with Recorder(name, space, ACTIONS, root=tmp_path) as recorder:
            recorder.reset(places[0])
            for t, place in enumerate(places[1:]):
                recorder.step(np.zeros(2), place, 0.0, False, t == 39)
            return recorder.finish()

    data = OfflineDataset.from_minari(recorded("lab/exact-v0", np.float64))
    assert data.observation_offset == (447_120, 5_411_840)
    np.testing.assert_allclose(data.observations, places[:-1] - data.observation_offset, rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match=r"The observation is rounded by .*, to float32, .* np.float64") as told:
        folder = recorded("lab/rounded-v0", np.float32)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="recorded as float32, which rounds them by up to"):
        OfflineDataset.from_minari(folder)


def record_one_step(recorder: Recorder) -> None:
    recorder.step(np.zeros(2), np.zeros(3), 1.0, False, True)
    recorder.finish()


@pytest.mark.parametrize("broken", ["shard", "data set", "move"])
def test_a_full_disk_is_said_with_the_bytes_that_are_needed_and_loses_nothing(tmp_path, monkeypatch, broken):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {"shard": (np, "savez"), "data set": (minari, "create_dataset_from_buffers")}
    recorder = Recorder("lab/arm-v0", BOX, ACTIONS, root=tmp_path)
    recorder.reset(np.zeros(3))
    with monkeypatch.context() as patch:
        patch.setattr(*place.get(broken, (partial_recording, "move_folder")), full)
        with pytest.raises(OutputError, match=r"No space left on device: \d{3,} bytes are needed, and \d+ are free\."):
            record_one_step(recorder)
    assert len(OfflineDataset.from_minari(recorder.finish())) == 1
