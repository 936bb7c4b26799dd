import os
from collections import Counter

import numpy as np
import pytest

from meam_policy.environments import make_environment
from meam_policy.errors import ConfigError, NotFoundError, OutputError
from meam_training.collect import collect, default_dataset_id
from meam_training.dataset import OfflineDataset
from meam_training.demonstrators import PointmazeDemonstrator

pytest.importorskip("mujoco")
POCKETS = "meam/Pockets-v0"
POINTMAZE = "pointmaze-medium-navigate-singletask-task3-v0"
FIELDS = ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends")


def assert_same(one, other):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="module")
def pockets(tmp_path_factory):
    """Two thousand transitions, and their folder."""
    folder = collect(POCKETS, 2000, seed=3, root=tmp_path_factory.mktemp("data"))
    return OfflineDataset.from_minari(folder), folder


@pytest.mark.parametrize(
    ("environment", "dataset"),
    [
        (POCKETS, "meam/pockets-v0"),
        (POINTMAZE, "pointmaze/medium-navigate-singletask-task3-v0"),
        ("HalfCheetah-v5", "halfcheetah/demonstrations-v5"),
    ],
)
def test_the_data_set_is_named_after_its_environment(environment, dataset):
    assert default_dataset_id(environment) == dataset


def test_whole_episodes_are_recorded_until_there_are_enough(pockets):
    data, folder = pockets
    lengths = np.diff(np.flatnonzero(data.episode_ends), prepend=-1)
    assert len(data) >= 2000 > len(data) - lengths[-1]
    assert len(set(lengths)) == 1
    assert folder.parts[-2:] == ("meam", "pockets-v0")
    assert (data.dataset_id, data.environment_id) == ("meam/pockets-v0", POCKETS)


def test_the_recorded_transitions_are_those_of_the_environment(pockets):
    data, _ = pockets
    inside = ~data.episode_ends
    np.testing.assert_array_equal(data.next_observations[inside], data.observations[1:][inside[:-1]])
    assert np.abs(data.actions).max() <= 1
    assert not data.terminations.any()
    first = np.concatenate([[0], np.flatnonzero(data.episode_ends)[:-1] + 1])
    assert len(np.unique(data.observations[first], axis=0)) == len(first)


def test_the_rate_is_that_of_the_environment(pockets):
    assert pockets[0].control_rate_hz == 10


def test_the_same_seed_gives_the_same_data_and_another_seed_other_data(pockets, tmp_path):
    same = OfflineDataset.from_minari(collect(POCKETS, 2000, seed=3, root=tmp_path / "same"))
    other = OfflineDataset.from_minari(collect(POCKETS, 2000, seed=4, root=tmp_path / "other"))
    assert_same(pockets[0], same)
    assert not np.array_equal(pockets[0].observations[0], other.observations[0])
    assert not np.array_equal(pockets[0].actions, other.actions)


def test_the_ball_is_steered_as_often_to_a_pocket_as_its_share_says(tmp_path):
    shares = {"east": 0.75, "west": 0.25}
    data = OfflineDataset.from_minari(collect(POCKETS, 6000, root=tmp_path, mode_shares=shares))
    ends = data.next_observations[data.episode_ends]
    sides = Counter("east" if x > 0 else "west" for x in ends[:, 0])
    spread = 4 * np.sqrt(len(ends) * 0.75 * 0.25)
    assert abs(sides["east"] - 0.75 * len(ends)) <= spread
    assert sides["west"] > 0
    assert (np.abs(ends[:, 0]) > np.abs(ends[:, 1])).mean() > 0.9


def test_an_existing_data_set_is_left_alone(pockets):
    _, folder = pockets
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(OutputError, match=f"data set {folder} exists already"):
        collect(POCKETS, 10, root=folder.parent.parent)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "name", ["pockets", "a/b", "x/pockets-v0", "../pockets-v0", "/pockets-v0", "a b/c-v0", "ns/-v0"]
)
def test_what_is_no_minari_id_is_refused_before_recording(tmp_path, name):
    recorded = []
    with pytest.raises(ConfigError, match=f'"{name}" is not a Minari id'):
        collect(POCKETS, 10, root=tmp_path, dataset_id=name, on_progress=lambda *seen: recorded.append(seen))
    assert not recorded
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transitions", [0, -5])
def test_nothing_to_record_is_refused(tmp_path, transitions):
    with pytest.raises(ConfigError, match=f"transitions is {transitions}"):
        collect(POCKETS, transitions, root=tmp_path)


def test_a_root_that_is_a_file_is_refused(tmp_path):
    root = tmp_path / "file"
    root.write_text("kept")
    with pytest.raises(OutputError, match="cannot be made"):
        collect(POCKETS, 10, root=root)
    assert root.read_text() == "kept"


def test_a_namespace_that_is_a_file_is_refused_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "meam").write_text("kept")
    with pytest.raises(OutputError):
        collect(POCKETS, 10, root=tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("meam", "kept")]


def test_an_environment_without_a_demonstrator_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no demonstrator for HalfCheetah-v5. Known: meam/Pockets-v0"):
        collect("HalfCheetah-v5", 10, root=tmp_path)


def test_an_unknown_environment_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match='no environment "meam/Pocket-v0". Did you mean meam/Pockets-v0'):
        collect("meam/Pocket-v0", 10, root=tmp_path)


def test_mode_shares_are_only_for_pockets(tmp_path):
    with pytest.raises(ConfigError, match="mode_shares is a setting of meam/Pockets-v0"):
        collect(POINTMAZE, 10, root=tmp_path, mode_shares={"north": 1.0})
    with pytest.raises(ConfigError, match="no pocket 'nort'"):
        collect(POCKETS, 10, root=tmp_path, mode_shares={"nort": 1.0})


def test_progress_counts_up_to_what_was_asked_for(tmp_path):
    seen = []
    collect(POCKETS, 250, root=tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    counts = [done for done, _ in seen]
    assert counts == sorted(set(counts))
    assert seen[-1] == (250, 250)
    assert {total for _, total in seen} == {250}


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_an_interrupted_collection_leaves_nothing_behind(tmp_path, monkeypatch, before):
    if before is None:
        monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    else:
        monkeypatch.setenv("MINARI_DATASETS_PATH", before)

    def interrupt(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(POCKETS, 300, root=tmp_path, on_progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert os.environ.get("MINARI_DATASETS_PATH") == before
    folder = collect(POCKETS, 300, root=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["meam"]
    assert os.environ.get("MINARI_DATASETS_PATH") == before
    assert len(OfflineDataset.from_minari(folder)) >= 300


def test_the_root_is_minaris_own_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert collect(POCKETS, 10, dataset_id="mine/few-v3") == tmp_path / "mine" / "few-v3"
    assert OfflineDataset.from_minari("mine/few-v3").dataset_id == "mine/few-v3"


# Pointmaze


@pytest.fixture(scope="module")
def pointmaze(tmp_path_factory):
    pytest.importorskip("ogbench")
    return OfflineDataset.from_minari(collect(POINTMAZE, 2000, seed=1, root=tmp_path_factory.mktemp("maze")))


def test_pointmaze_data_reads_back(pointmaze):
    assert len(pointmaze) == 2000
    np.testing.assert_array_equal(np.flatnonzero(pointmaze.episode_ends), [999, 1999])
    assert pointmaze.environment_id == POINTMAZE
    assert pointmaze.control_rate_hz is not None
    assert pointmaze.control_rate_hz > 0


def test_pointmaze_terminates_exactly_where_the_reward_is_zero(pointmaze):
    assert set(np.unique(pointmaze.rewards)) <= {-1.0, 0.0}
    np.testing.assert_array_equal(pointmaze.terminations, pointmaze.rewards == 0)


def test_pointmaze_rewards_are_zero_within_one_unit_of_the_tasks_goal(pointmaze, pointmaze_goal):
    distances = np.linalg.norm(pointmaze.observations - pointmaze_goal(POINTMAZE), axis=1)
    clear = np.abs(distances - 1) > 1e-4  # recorded as float32
    np.testing.assert_array_equal(pointmaze.rewards[clear], -1.0 + (distances[clear] <= 1.0))


def test_the_point_moves_and_stays_in_the_maze(pointmaze):
    inside = ~pointmaze.episode_ends
    np.testing.assert_array_equal(pointmaze.next_observations[inside], pointmaze.observations[1:][inside[:-1]])
    steps = np.linalg.norm(pointmaze.next_observations - pointmaze.observations, axis=1)
    assert steps.max() < 0.5
    assert np.median(steps) > 0.05
    assert np.ptp(pointmaze.observations, axis=0).min() > 4


def test_the_pointmaze_demonstrator_repeats_itself_with_its_seed(pointmaze):
    walks = [PointmazeDemonstrator(POINTMAZE, seed=seed).record_episode() for seed in (1, 1, 2)]
    for one, same in zip(walks[0], walks[1], strict=True):
        np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(walks[0][0][:-1].astype(np.float32), pointmaze.observations[:1000])
    assert not np.array_equal(walks[0][1], walks[2][1])


def test_a_pointmaze_without_a_task_has_no_demonstrator():
    with pytest.raises(ConfigError, match='has no fixed task, so no reward; expected a "singletask" name'):
        PointmazeDemonstrator("pointmaze-medium-navigate-v0")


def test_an_evaluation_never_starts_where_the_data_started(tmp_path):
    recorded = OfflineDataset.from_minari(collect("meam/Pockets-v0", 400, seed=0, root=tmp_path))
    starts = {tuple(row) for row in recorded.observations[::20]}
    env = make_environment("meam/Pockets-v0")
    assert len(starts) == 20
    assert not starts & {tuple(env.reset(seed=seed)[0]) for seed in range(100)}


@pytest.mark.parametrize("environment", ["meam/Pockets-v0", "pointmaze-medium-navigate-singletask-task3-v0"])
def test_a_negative_seed_is_refused(tmp_path, environment):
    with pytest.raises(ConfigError, match="seed is -1"):
        collect(environment, 10, seed=-1, root=tmp_path)
    assert not list(tmp_path.iterdir())
