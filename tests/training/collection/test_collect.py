import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import filelock
import gymnasium
import minari
import numpy as np
import pytest

from meam_export import export_policy
from meam_policy import MeamPolicy
from meam_policy.environments.make import make_environment
from meam_policy.errors import ConfigError, DatasetError, LockedError, NotFoundError, OutputError, SpaceError
from meam_training.collection import partial_recording
from meam_training.collection.collect import collect
from meam_training.collection.dataset_folder import default_dataset_id
from meam_training.collection.demonstrators import Episode, PocketsDemonstrator, PointmazeDemonstrator
from meam_training.collection.demonstrators import pointmaze as pointmaze_module
from meam_training.collection.demonstrators.episode import record_steps
from meam_training.commands import collect as command
from meam_training.commands import train as train_command
from meam_training.data.dataset import OfflineDataset
from meam_training.trainer import train

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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_data_and_another_seed_other_data(pockets, tmp_path):
    same = OfflineDataset.from_minari(collect(POCKETS, 2000, seed=3, root=tmp_path / "same"))
    other = OfflineDataset.from_minari(collect(POCKETS, 2000, seed=4, root=tmp_path / "other"))
    assert_same(pockets[0], same)
    assert not np.array_equal(pockets[0].observations[0], other.observations[0])
    assert not np.array_equal(pockets[0].actions, other.actions)


@pytest.mark.slow
def test_pockets_are_aimed_at_in_proportion_to_their_shares(tmp_path):
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
    with pytest.raises(OutputError, match="cannot be created"):
        collect(POCKETS, 10, root=root)
    assert root.read_text() == "kept"


def test_a_namespace_that_is_a_file_is_refused_and_left_alone(tmp_path):
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


def interrupt_at(count):
    def interrupt(done, total):
        if done >= count:
            raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_an_interrupted_recording_is_kept_aside_and_resumed(tmp_path, monkeypatch, before):
    if before is None:
        monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    else:
        monkeypatch.setenv("MINARI_DATASETS_PATH", before)
    with pytest.raises(KeyboardInterrupt):
        collect(POCKETS, 300, root=tmp_path, on_progress=interrupt_at(300))
    assert [path.name for path in (tmp_path / "meam").iterdir()] == [".pockets-v0.partial"]
    seen = []
    folder = collect(POCKETS, 300, root=tmp_path, resume=True, on_progress=lambda *counts: seen.append(counts))
    assert seen == []
    assert [path.name for path in (tmp_path / "meam").iterdir()] == ["pockets-v0"]
    assert os.environ.get("MINARI_DATASETS_PATH") == before
    assert len(OfflineDataset.from_minari(folder)) == 300


def test_nothing_recorded_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(PocketsDemonstrator, "act", lambda *_: interrupt_at(0)(0, 0))
    with pytest.raises(KeyboardInterrupt):
        collect(POCKETS, 300, root=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["meam"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "transitions", "stops"),
    [(POCKETS, 2000, (20, 700, 1500)), pytest.param(POINTMAZE, 4000, (1000, 2000), marks=pytest.mark.slow)],
)
def test_a_resumed_recording_is_the_uninterrupted_one(tmp_path, monkeypatch, environment, transitions, stops):
    whole = OfflineDataset.from_minari(collect(environment, transitions, seed=3, root=tmp_path / "whole"))
    monkeypatch.setattr(partial_recording, "SHARD_TRANSITIONS", 500)
    for count in stops:
        with pytest.raises(KeyboardInterrupt):
            collect(
                environment,
                transitions,
                seed=3,
                root=tmp_path / "resumed",
                resume=True,
                on_progress=interrupt_at(count),
            )
    resumed = collect(environment, transitions, seed=3, root=tmp_path / "resumed", resume=True)
    assert_same(OfflineDataset.from_minari(resumed), whole)


KILLED = """
import sys
from meam_training.collection import partial_recording
from meam_training.collection.collect import collect
partial_recording.SHARD_TRANSITIONS = 200
say = lambda done, total: print(done, flush=True)
collect("meam/Pockets-v0", 4000, seed=3, root=sys.argv[1], resume=True, on_progress=say)
"""


@pytest.mark.slow
def test_a_recording_killed_again_and_again_is_the_uninterrupted_one(tmp_path):
    generator, root, kills = np.random.default_rng(0), tmp_path / "killed", 0
    while True:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        last = 0
        episodes = int(generator.integers(80, 120))
        for _, line in zip(range(episodes), process.stdout, strict=False):
            last = int(line)
        time.sleep(generator.uniform(0, 0.02))
        process.kill()
        process.stdout.close()
        process.wait()
        kills += 1
        if last == 4000 or (root / "meam" / "pockets-v0").exists():
            break
    assert kills > 1
    folder = root / "meam" / "pockets-v0"
    if not folder.exists():
        collect(POCKETS, 4000, seed=3, root=root, resume=True)
    whole = OfflineDataset.from_minari(collect(POCKETS, 4000, seed=3, root=tmp_path / "whole"))
    assert_same(OfflineDataset.from_minari(folder), whole)


@pytest.mark.parametrize("at", ["create_dataset_from_buffers", "rename"])
def test_a_recording_that_died_while_the_data_set_was_written_is_resumed(tmp_path, monkeypatch, at):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path if at == "rename" else minari, at, die)
        with pytest.raises(KeyboardInterrupt):
            collect(POCKETS, 300, root=tmp_path)
    assert not (tmp_path / "meam" / "pockets-v0").exists()
    folder = collect(POCKETS, 300, root=tmp_path, resume=True)
    assert len(OfflineDataset.from_minari(folder)) == 300
    assert [path.name for path in folder.parent.iterdir()] == ["pockets-v0"]


@pytest.fixture
def unfinished(tmp_path):
    """The folder of an unfinished recording of Pockets, 300 transitions with seed 3."""
    with pytest.raises(KeyboardInterrupt):
        collect(POCKETS, 300, seed=3, root=tmp_path, on_progress=interrupt_at(100))
    return tmp_path / "meam" / ".pockets-v0.partial"


def test_an_unfinished_recording_is_not_overwritten(tmp_path, unfinished):
    before = {file.name: file.read_bytes() for file in unfinished.iterdir()}
    with pytest.raises(OutputError, match=rf"unfinished recording is in {unfinished}. Continue it \(--resume"):
        collect(POCKETS, 300, seed=3, root=tmp_path)
    assert {file.name: file.read_bytes() for file in unfinished.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 4}, "has seed = 3, but now it is 4"),
        ({"transitions": 400}, "has transitions = 300, but now it is 400"),
        ({"mode_shares": {"west": 1.0}}, "has mode_shares = None, but now it is {'west': 1.0}"),
        (
            {"environment_id": POINTMAZE, "dataset_id": "meam/pockets-v0"},
            f"has environment_id = '{POCKETS}', but now it is '{POINTMAZE}'",
        ),
    ],
)
def test_a_recording_is_resumed_with_its_own_settings_only(tmp_path, unfinished, changed, message):
    settings = {"environment_id": POCKETS, "transitions": 300, "seed": 3} | changed
    with pytest.raises(ConfigError, match=re.escape(message)):
        collect(**settings, root=tmp_path, resume=True)
    assert len(list(unfinished.glob("*.npz"))) == 1


def test_a_broken_shard_is_refused(tmp_path, unfinished):
    (unfinished / "00000000.npz").write_bytes(b"PK broken")
    with pytest.raises(DatasetError, match=f"shard {unfinished}/00000000.npz is broken"):
        collect(POCKETS, 300, seed=3, root=tmp_path, resume=True)


def test_a_second_process_may_not_record_the_same_data_set(tmp_path, unfinished):
    with filelock.FileLock(unfinished / ".lock"), pytest.raises(LockedError, match="Another process is recording"):
        collect(POCKETS, 300, seed=3, root=tmp_path, resume=True)


def test_shards_keep_the_episodes_of_dict_observations(tmp_path):
    generator = np.random.default_rng(0)
    episodes = [
        Episode(
            {"arm/pose": generator.normal(size=(n + 1, 3)), "camera": generator.integers(9, size=(n + 1, 2, 2))},
            generator.normal(size=(n, 2)),
            np.arange(n, dtype=np.float32),
            np.arange(n) == 1,
        )
        for n in (3, 1, 5)
    ]
    with partial_recording.PartialRecording.open(tmp_path / "partial", {}, resume=False) as partial:
        for episode in episodes:
            partial.add(episode, [])
        partial.flush()
        (read,) = partial.shards()
    assert len(read) == 3
    pairs: Any = zip(read, episodes, strict=True)
    for ours, theirs in pairs:
        assert ours.observations.keys() == theirs.observations.keys()
        for key, array in theirs.observations.items():
            np.testing.assert_array_equal(ours.observations[key], array)
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_array_equal(one, other)


def test_memory_holds_no_more_than_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_recording, "SHARD_TRANSITIONS", 100)
    with pytest.raises(KeyboardInterrupt):
        collect(POCKETS, 1000, root=tmp_path, on_progress=interrupt_at(250))
    names = sorted(path.name for path in tmp_path.rglob("*.npz"))
    assert names == ["00000000.npz", "00000005.npz", "00000010.npz"]


# Policies


@pytest.fixture(scope="module")
def policy(pockets, make_config, tmp_path_factory):
    checkpoint = train(make_config(), pockets[0], tmp_path_factory.mktemp("run"))
    return export_policy(checkpoint, tmp_path_factory.mktemp("policies") / "tiny")


@pytest.fixture(scope="module")
def rolled_out(policy, tmp_path_factory):
    """Four hundred transitions of the policy, and their folder."""
    folder = collect(POCKETS, 400, seed=3, policy=policy, root=tmp_path_factory.mktemp("rolled_out"))
    return OfflineDataset.from_minari(folder), folder


@pytest.mark.slow
def test_a_policys_recording_is_what_the_policy_does(policy, rolled_out):
    data, folder = rolled_out
    assert (len(data), data.environment_id, data.control_rate_hz) == (400, POCKETS, 10)
    assert '"algorithm_name": "policy ' in (folder / "data" / "metadata.json").read_text()
    acting, env = MeamPolicy.from_pretrained(policy), make_environment(POCKETS)
    start, noise = (int(seed) for seed in np.random.default_rng([3, 1]).integers(2**31, 2**32, size=2))
    acting.reset(seed=noise)
    observation, _ = env.reset(seed=start)
    for row in range(20, 40):
        np.testing.assert_array_equal(observation, data.observations[row])
        action = acting.act(observation)
        np.testing.assert_array_equal(action, data.actions[row])
        observation, reward, *_ = env.step(action)
        assert np.float32(reward) == data.rewards[row]


def test_a_policy_repeats_itself_with_its_seed_interrupted_or_not(policy, rolled_out, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        collect(POCKETS, 400, seed=3, policy=policy, root=tmp_path / "same", on_progress=interrupt_at(100))
    with pytest.raises(ConfigError, match="has policy = '[0-9a-f]{64}', but now it is None"):
        collect(POCKETS, 400, seed=3, root=tmp_path / "same", resume=True)
    same = collect(POCKETS, 400, seed=3, policy=policy, root=tmp_path / "same", resume=True)
    assert_same(OfflineDataset.from_minari(same), rolled_out[0])
    other = collect(POCKETS, 400, seed=4, policy=policy, root=tmp_path / "other")
    assert not np.array_equal(OfflineDataset.from_minari(other).actions, rolled_out[0].actions)


def test_a_policy_of_another_environment_is_refused(policy, tmp_path):
    with pytest.raises(SpaceError, match="observation has shape"):
        collect(POINTMAZE, 10, policy=policy, root=tmp_path)
    with pytest.raises(NotFoundError):
        collect(POCKETS, 10, policy=tmp_path / "nowhere", root=tmp_path)
    with pytest.raises(ConfigError, match="not of a policy"):
        collect(POCKETS, 10, policy=policy, mode_shares={"west": 1.0}, root=tmp_path)
    assert not list(tmp_path.iterdir())


# Command line


def test_an_interrupted_command_says_how_to_resume(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, on_progress, **settings):
        return collect(*arguments, **settings, on_progress=interrupt_at(40))

    arguments = [POCKETS, "--transitions", "100", "--root", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(command, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            command.run(arguments, "meam collect")
    assert "--resume to continue" in capsys.readouterr().err
    command.run([*arguments, "--resume"], "meam collect")
    assert "transitions/s" in capsys.readouterr().err
    assert len(OfflineDataset.from_minari(tmp_path / "meam" / "pockets-v0")) == 100


def test_the_command_to_train_with_can_be_pasted_whatever_the_folder_is_called(tmp_path, capsys):
    command.run([POCKETS, "--transitions", "40", "--root", str(tmp_path / "it's data")], "meam collect")
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Train with: ")]
    words = shlex.split(line.removeprefix("Train with: "))
    assert train_command._parse(words[2:], "meam train").output_dir == Path("runs/first")
    assert words[4] == str(tmp_path / "it's data" / "meam" / "pockets-v0")


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


@pytest.mark.slow
def test_the_pointmaze_demonstrator_repeats_itself_with_its_seed(pointmaze):
    walks: Any = [PointmazeDemonstrator(POINTMAZE, seed=seed).record_episode() for seed in (1, 1, 2)]
    for one, same in zip(walks[0], walks[1], strict=True):
        np.testing.assert_array_equal(one, same)
    np.testing.assert_array_equal(walks[0][0][:-1].astype(np.float32), pointmaze.observations[:1000])
    assert not np.array_equal(walks[0][1], walks[2][1])


@pytest.mark.slow
@pytest.mark.parametrize("size", ["large", "giant", "teleport"])
def test_every_pointmaze_repeats_itself_with_its_seed(monkeypatch, size):
    monkeypatch.setattr(pointmaze_module, "EPISODE_STEPS", 300)
    name = f"pointmaze-{size}-navigate-singletask-task1-v0"
    walks = []
    for _ in range(2):
        demonstrator = PointmazeDemonstrator(name, seed=1)
        walks.append([demonstrator.record_episode() for _ in range(3)])
    for one, same in zip(*walks, strict=True):
        for ours, theirs in zip(one, same, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pointmaze-medium-navigate-v0", 'has no fixed task, so no reward; expected a "singletask" name'),
        ("pointmaze-medium-stitch-singletask-task1-v0", 'names the kind of data "stitch"; expected "navigate"'),
    ],
)
def test_other_pointmaze_data_have_no_demonstrator(name, message):
    with pytest.raises(ConfigError, match=message):
        PointmazeDemonstrator(name)


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


@pytest.mark.parametrize(
    ("given", "message"),
    [({"root": ""}, "root is ''; expected the path of a folder"), ({"dataset_id": ""}, '"" is not a Minari id')],
)
def test_empty_text_is_no_default(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        collect(POCKETS, 10, **{"root": tmp_path, **given})
    assert not list(tmp_path.iterdir())


def test_an_endless_episode_of_a_recording_is_cut_off_with_a_warning(monkeypatch):
    monkeypatch.setattr("meam_policy.rollouts.episodes.LONGEST_EPISODE", 7)
    env = gymnasium.make("Pendulum-v1").unwrapped  # without its time limit
    with pytest.warns(UserWarning, match="cut off after 7 steps"):
        episode = record_steps(env, lambda _: np.zeros(1, np.float32), 0)
    assert len(episode.rewards) == 7
    assert not episode.terminations.any()
