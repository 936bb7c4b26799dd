import json

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from meam_policy import BoxSpec, ConfigError, OutputError, PolicySpec, SpaceError, rollout
from meam_policy.spec import Integration
from meam_training.collection.record_rollouts import record_rollouts
from meam_training.data.dataset import OfflineDataset

FREE = (-np.inf,) * 3, (np.inf,) * 3


class Walk(gymnasium.Env):
    """A noisy walk whose seed decides how long it lasts, and whether it terminates."""

    metadata = {"render_fps": 25}  # noqa: RUF012

    def __init__(self, dict_space=False, fails_at=None):
        box = spaces.Box(-np.inf, np.inf, (3,))
        self.observation_space = spaces.Dict({"arm": box, "wrist": box}) if dict_space else box
        self.action_space = spaces.Box(-1.0, 1.0, (2,))
        self.fails_at = fails_at

    def observe(self):
        place = self.place.astype(np.float32)
        return {"arm": place, "wrist": -place} if isinstance(self.observation_space, spaces.Dict) else place

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.length = seed, int(self.np_random.integers(2, 9))
        self.terminates = bool(self.np_random.integers(2))
        self.place, self.steps = self.np_random.normal(size=3), 0
        return self.observe(), {}

    def step(self, action):
        if self.fails_at is not None and self.fails_at == self.seed:
            raise OSError("the simulator has crashed")
        self.steps += 1
        self.place[:2] += action
        done = self.steps == self.length
        return self.observe(), float(self.place.sum()), done and self.terminates, done and not self.terminates, {}


class Drifter:
    """Acts by its seed and its observation."""

    def __init__(self, dict_space=False):
        boxes = [BoxSpec((3,), "float32", *FREE, key=key) for key in (("arm", "wrist") if dict_space else (None,))]
        size = 3 * len(boxes)
        self.spec = PolicySpec(
            integration=Integration(nfe=1),
            observation=tuple(boxes),
            action=BoxSpec((2,), "float32", (-1.0,) * 2, (1.0,) * 2),
            chunk_size=1,
            execute_steps=1,
            observation_mean=(0.0,) * size,
            observation_std=(1.0,) * size,
            action_offset=(0.0,) * 2,
            action_scale=(1.0,) * 2,
            method="by hand",
        )
        self.inferences = 0
        self.generators = {}

    def reset(self, seed=None, mask=None):
        for slot, each in enumerate(seed if isinstance(seed, list) else [seed]):
            if mask is None or mask[slot]:
                self.generators[slot] = np.random.default_rng(each)

    def act(self, observation):
        self.inferences += 1
        place = observation["arm"] if isinstance(observation, dict) else observation
        rows = np.atleast_2d(place)
        noise = np.array([self.generators[slot].uniform(-0.5, 0.5, size=2) for slot in range(len(rows))])
        actions = (noise + 0.5 * np.tanh(rows[:, :2])).astype(np.float32)
        return actions if np.ndim(place) == 2 else actions[0]


def lengths_of(data):
    return np.diff(np.flatnonzero(data.episode_ends), prepend=-1)


@pytest.mark.parametrize("dict_space", [False, True])
def test_recorded_episodes_are_what_a_hand_written_loop_sees(tmp_path, dict_space):
    result, folder = record_rollouts(Drifter(dict_space), Walk(dict_space), 6, 20, "walk/rollouts-v0", root=tmp_path)
    data = OfflineDataset.from_minari(folder)
    rows, policy, env = [], Drifter(dict_space), Walk(dict_space)
    for seed in range(20, 26):
        policy.reset(seed=seed)
        (observation, _), done = env.reset(seed=seed), False
        while not done:
            action = policy.act(observation)
            following, reward, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
            rows.append((observation, action, reward, following, terminated, done))
            observation = following

    def flat(one):
        return np.concatenate(list(one.values())) if isinstance(one, dict) else one

    columns = [np.array([flat(cell) for cell in column]) for column in zip(*rows, strict=True)]
    fields = ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends")
    for name, column in zip(fields, columns, strict=True):
        np.testing.assert_array_equal(getattr(data, name), column.astype(getattr(data, name).dtype), err_msg=name)
    assert lengths_of(data).tolist() == result.lengths.tolist()


def test_truncation_is_not_termination(tmp_path):
    _, folder = record_rollouts(Drifter(), Walk(), 12, 0, "walk/rollouts-v0", root=tmp_path)
    data = OfflineDataset.from_minari(folder)
    expected = []
    for seed in range(12):
        env = Walk()
        env.reset(seed=seed)
        expected.append(env.terminates)
    assert data.terminations[data.episode_ends].tolist() == expected
    assert set(expected) == {True, False}
    assert not data.terminations[~data.episode_ends].any()
    truncated = [bool(e.truncations[-1]) for e in minari.MinariDataset(folder / "data").iterate_episodes()]
    assert truncated == [not terminated for terminated in expected]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environment_records_the_same_data_in_the_same_order(tmp_path, mode):
    single = record_rollouts(Drifter(), Walk(), 11, 3, "walk/single-v0", root=tmp_path)
    env = SyncVectorEnv([Walk] * 3, autoreset_mode=mode)
    vector = record_rollouts(Drifter(), env, 11, 3, "walk/vector-v0", root=tmp_path)
    np.testing.assert_array_equal(single[0].returns, vector[0].returns)
    one, other = (OfflineDataset.from_minari(folder) for _, folder in (single, vector))
    assert one.fingerprint == other.fingerprint


def test_result_is_that_of_a_rollout(tmp_path):
    done = []
    result, _ = record_rollouts(Drifter(), Walk(), 4, 0, "walk/data-v0", root=tmp_path, on_episode=done.append)
    plain = rollout(Drifter(), Walk(), 4, 0)
    np.testing.assert_array_equal(result.returns, plain.returns)
    assert result.observations == []
    assert done == [1, 2, 3, 4]


def test_data_set_records_its_origin(tmp_path):
    policy = Drifter()
    _, folder = record_rollouts(policy, Walk(), 1, 0, "walk/data-v0", root=tmp_path, environment_id="Walk-v3")
    data = OfflineDataset.from_minari(folder)
    assert (data.dataset_id, data.environment_id, data.control_rate_hz) == ("walk/data-v0", "Walk-v3", 25)
    metadata = json.loads((folder / "data" / "metadata.json").read_text())
    assert metadata["algorithm_name"].startswith("policy ")
    assert metadata["meam_seed"] == 0
    assert list(folder.parent.iterdir()) == [folder]  # nothing of the recording is left


def test_environment_names_itself(tmp_path):
    gymnasium.register("Walk-v1", lambda **_: Walk(), max_episode_steps=50)
    env = gymnasium.make("Walk-v1")
    del gymnasium.registry["Walk-v1"]
    _, folder = record_rollouts(Drifter(), env, 1, 0, "walk/data-v0", root=tmp_path)
    assert OfflineDataset.from_minari(folder).environment_id == "Walk-v1"


def test_existing_data_set_is_left_alone(tmp_path):
    _, folder = record_rollouts(Drifter(), Walk(), 2, 0, "walk/data-v0", root=tmp_path)
    before = OfflineDataset.from_minari(folder).fingerprint
    policy = Drifter()
    with pytest.raises(OutputError, match="exists already"):
        record_rollouts(policy, Walk(), 2, 5, "walk/data-v0", root=tmp_path)
    assert policy.inferences == 0
    assert OfflineDataset.from_minari(folder).fingerprint == before


@pytest.mark.parametrize("name", ["rollouts", "../x-v0"])
def test_what_is_no_minari_id_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="not a Minari id"):
        record_rollouts(Drifter(), Walk(), 1, 0, name, root=tmp_path)


def test_nothing_is_left_of_a_policy_that_cannot_act_there(tmp_path):
    env = Walk()
    env.action_space = spaces.Box(-2.0, 2.0, (2,))
    with pytest.raises(SpaceError):
        record_rollouts(Drifter(), env, 1, 0, "walk/data-v0", root=tmp_path)
    assert not list((tmp_path / "walk").iterdir())


@pytest.mark.parametrize("vector", [False, True])
def test_interrupt_keeps_the_episodes_before_the_first_unfinished_one(tmp_path, vector):
    def interrupt(count):
        if count == 5:
            raise KeyboardInterrupt

    env = SyncVectorEnv([Walk] * 3) if vector else Walk()
    finished = {}
    with pytest.raises(KeyboardInterrupt):
        rollout(Drifter(), env, 20, 0, on_episode=interrupt, on_trajectory=finished.setdefault)
    env = SyncVectorEnv([Walk] * 3) if vector else Walk()
    with pytest.raises(KeyboardInterrupt):
        record_rollouts(Drifter(), env, 20, 0, "walk/data-v0", root=tmp_path, on_episode=interrupt)
    data = OfflineDataset.from_minari(tmp_path / "walk" / "data-v0")
    kept = next(index for index in range(20) if index not in finished)
    assert lengths_of(data).tolist() == [len(finished[index].rewards) for index in range(kept)]
    assert kept >= 3
    assert not list((tmp_path / "walk").glob(".*"))


def test_error_of_the_environment_passes_on_and_what_was_finished_is_kept(tmp_path):
    with pytest.raises(OSError, match="the simulator has crashed"):
        record_rollouts(Drifter(), Walk(fails_at=4), 9, 0, "walk/data-v0", root=tmp_path)
    data = OfflineDataset.from_minari(tmp_path / "walk" / "data-v0")
    np.testing.assert_array_equal(lengths_of(data), rollout(Drifter(), Walk(), 4, 0).lengths)
