import doctest
import subprocess
import sys
from collections import Counter

import gymnasium
import numpy as np
import pytest

from meam_policy.environments.pockets import POCKETS
from meam_policy.errors import ConfigError
from meam_training.collection.demonstrators import DEFAULT_MODE_SHARES, PocketsDemonstrator, pockets

AT_REST_IN_THE_CENTRE = np.zeros(4, np.float32)


def episodes(demonstrator, count):
    """Return and last pocket of each episode."""
    pytest.importorskip("mujoco")
    env = gymnasium.make("meam/Pockets-v0")
    results = []
    for seed in range(count):
        observation, _ = env.reset(seed=seed)
        demonstrator.reset()
        episode_return, truncated, pocket = 0.0, False, "none"
        while not truncated:
            observation, reward, _, truncated, info = env.step(demonstrator.act(observation))
            episode_return, pocket = episode_return + float(reward), info["pocket"]
        results.append((episode_return, pocket))
    env.close()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", POCKETS)
def test_the_ball_reaches_the_aimed_pocket_early_and_stays(name):
    returns, ends = zip(*episodes(PocketsDemonstrator({name: 1.0}), 100), strict=True)
    assert np.mean([end == name for end in ends]) >= 0.9
    assert 11 <= np.mean(returns) / POCKETS[name].value <= 13.5


def test_the_default_demonstrations_are_far_from_the_best():
    returns, _ = zip(*episodes(PocketsDemonstrator(), 200), strict=True)
    assert np.mean(returns) < 0.6 * 11


@pytest.mark.parametrize("shares", [None, {"north": 0.3, "east": 0.7}])
def test_pockets_are_aimed_at_as_often_as_asked(shares):
    count = 4000
    demonstrator = PocketsDemonstrator(shares, seed=1)
    aimed = Counter()
    for _ in range(count):
        demonstrator.reset()
        aimed[demonstrator.pocket] += 1
    expected = DEFAULT_MODE_SHARES if shares is None else shares
    for name in POCKETS:
        share = expected.get(name, 0.0)
        assert abs(aimed[name] - count * share) <= 4 * np.sqrt(count * share * (1 - share))


def test_the_same_first_observation_is_answered_towards_each_of_the_pockets():
    demonstrator = PocketsDemonstrator(dict.fromkeys(POCKETS, 0.25))
    directions = {name: np.sign(pocket.centre) for name, pocket in POCKETS.items()}
    headed = Counter()
    agrees = []
    for _ in range(400):
        demonstrator.reset()
        action = demonstrator.act(AT_REST_IN_THE_CENTRE)
        direction = max(directions, key=lambda name: action @ directions[name])
        headed[direction] += 1
        agrees.append(direction == demonstrator.pocket)
    assert min(headed[name] for name in POCKETS) > 60
    assert np.mean(agrees) > 0.9


def test_commands_are_broad_rather_than_saturated():
    demonstrator = PocketsDemonstrator({"north": 1.0})
    actions = np.array([demonstrator.act(AT_REST_IN_THE_CENTRE) for _ in range(1000)])
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1.0
    assert actions.mean(axis=0) == pytest.approx([0.0, 0.7], abs=0.05)
    assert np.all(actions.std(axis=0) > 0.2)
    assert np.mean(actions[:, 1] == 1.0) < 0.2


def test_same_seed_gives_same_demonstrations():
    runs = [episodes(PocketsDemonstrator(seed=seed), 5) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"nort": 1.0}, "no pocket 'nort'.*Did you mean 'north'"),
        ({"west": 1.5, "east": -0.5}, "share of east is -0.5"),
        ({"west": float("nan")}, "share of west is nan"),
        ({"west": 0.5, "east": 0.4}, "sum to 0.9, expected 1"),
        ({}, "sum to 0, expected 1"),
    ],
)
def test_bad_shares_are_rejected(shares, message):
    with pytest.raises(ConfigError, match=message):
        PocketsDemonstrator(shares)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_bad_noise_is_rejected(noise):
    with pytest.raises(ConfigError, match="noise is"):
        PocketsDemonstrator(noise=noise)


def test_docstring_example_runs():
    assert doctest.testmod(pockets).failed == 0


@pytest.mark.slow
def test_importing_the_demonstrator_leaves_mujoco_alone():
    code = "import sys, meam_training.collection.demonstrators; assert 'mujoco' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
