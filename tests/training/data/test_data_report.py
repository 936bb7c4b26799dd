import json
from dataclasses import replace

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

import meam_training.data.data_report as data_report_module
from meam_training import data_report
from meam_training.data.data_figure import draw_report
from meam_training.data.data_report import ChunkCoverage, Clipping
from meam_training.data.dataset import OfflineDataset
from meam_training.data.observation_scale import observation_scale


def recording(lengths, **changes):
    """Episodes of the given lengths; every other one terminates and is rewarded at its end."""
    generator = np.random.default_rng(0)
    rows = sum(lengths)
    ends = np.isin(np.arange(rows), np.cumsum(lengths) - 1)
    number = np.repeat(np.arange(len(lengths)), lengths)
    ended = ends & (number % 2 == 0)
    columns = {
        "observations": generator.normal(size=(rows, 3)),
        "actions": generator.uniform(-0.9, 0.9, size=(rows, 2)),
        "rewards": ended.astype(float),
        "next_observations": generator.normal(size=(rows, 3)),
        "terminations": ended,
        "truncations": ends & ~ended,
    }
    return OfflineDataset.from_arrays(**{**columns, **changes})


def warned(report, words):
    (found,) = [warning for warning in report.warnings if words in warning]
    return found


def test_a_sound_data_set_is_counted_and_nothing_is_wrong_with_it():
    report = data_report(recording([30, 20, 50]), chunk_size=4)
    assert report.warnings == ()
    assert (report.rows, report.episodes, report.terminated, report.rewarded) == (100, 3, 2, 2)
    assert report.lengths.tolist() == [30, 20, 50]
    assert report.returns.tolist() == [1, 0, 1]
    assert (report.reward_least, report.reward_mean, report.reward_greatest) == (0, pytest.approx(0.02), 1)
    assert report.chunks == ChunkCoverage(4, True, whole=91, cut=9, short_episodes=0, short_rows=0)
    assert (report.repeated_rows, report.repeated_episodes) == (0, 0)
    assert report.facts["rows"] == "100 in 3 episodes of 20 to 50 (median 30) steps"
    assert "a whole chunk of 4 starts at 91 rows; the other 9 (9.0%) are too near" in report.facts["chunks"]
    assert report.facts["rate"] == "not recorded"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6))
def test_the_rows_of_whole_chunks_are_those_that_the_sampler_holds_for_valid(lengths, chunk_size):
    data = recording(lengths)
    found = ChunkCoverage.of(data, chunk_size, padded=False)
    assert (found.short_episodes, found.short_rows) == (
        sum(length < chunk_size for length in lengths),
        sum(length for length in lengths if length < chunk_size),
    )
    assert found.whole + found.cut == len(data)
    if max(lengths) >= chunk_size:
        sampler = data.chunk_sampler(chunk_size, 1.0)
        assert found.whole == sampler.targets(np.arange(len(sampler))).valid.sum()
    else:
        assert found.whole == 0
        assert "training will refuse" in str(found.warning)


def test_the_loss_of_short_episodes_is_named_with_its_share():
    data = recording([6] * 20 + [40] * 2)
    warning = warned(data_report(data, 8, pad_chunks=False), "chunk")
    assert "67% of the rows are within 7 steps" in warning
    assert "120 of them in 20 episodes shorter than a chunk" in warning
    assert "nothing is learned from them. Set pad_chunks=True" in warning
    assert "learned from the others alone" in warned(data_report(data, 8), "chunk")
    assert data_report(data, 4, pad_chunks=False).warnings == ()


@pytest.mark.parametrize(("reward", "shown"), [(0.0, "0"), (-0.0, "0"), (-1.0, "-1"), (2.5, "2.5")])
def test_rewards_that_are_all_equal_leave_nothing_to_improve_on(reward, shown):
    cut = np.arange(50) == 29
    endless = recording([30, 20], rewards=np.full(50, reward), terminations=np.zeros(50), truncations=cut)
    report = data_report(endless)
    warning = warned(report, "reward")
    assert warning.startswith(f"Every reward in the data is {shown}: no action is better than another, and there is")
    assert 'imitate: method="bc" needs none' in warning
    assert report.rewarded is None
    assert report.facts["rewards"] == f"from {shown} to {shown}, mean {shown}"
    if not reward:
        assert report.facts["returns"] == "0 an episode"


def test_where_episodes_end_equal_rewards_tell_the_long_ones_from_the_short_ones():
    assert data_report(recording([30, 20], rewards=np.full(50, -1.0))).warnings == ()
    assert warned(data_report(recording([30, 20], rewards=np.zeros(50))), "reward")


def test_data_in_which_no_episode_ends_say_what_that_means():
    endless = recording([30], terminations=np.zeros(30), rewards=np.arange(30))
    warning = warned(data_report(endless), "episode")
    assert "No episode ends in the data: all 30 rows are one" in warning
    assert "as discount weighs them" in warning
    assert "An evaluation needs an environment with a time limit" in warning
    for ended in (recording([30]), recording([30, 20], terminations=np.zeros(50), truncations=np.arange(50) == 29)):
        assert not [each for each in data_report(ended).warnings if "No episode ends" in each]


def test_the_numbers_of_an_action_are_compared_with_their_box():
    rows, generator = 1000, np.random.default_rng(0)
    actions = generator.uniform([-1, -0.5, 2], [1, 0.5, 2], size=(rows, 3))
    actions[: rows // 2, 0] = 1.0
    actions[-1, 0] = -1.00005  # rounding that the checks let pass
    space = spaces.Box(np.array([-1, -50, 0], np.float32), np.array([1, 50, 4], np.float32))
    report = data_report(recording([rows], actions=actions, action_space=space))
    first, second, third = report.actions
    assert (first.low, first.high, first.greatest) == (-1, 1, 1)
    assert first.at_high == pytest.approx(np.mean(actions[:, 0] >= 1 - 2e-3))
    assert first.outside == 1
    assert second.used == pytest.approx(np.ptp(actions[:, 1]) / 100)
    assert (first.still, second.still, third.still) == (False, False, True)
    expected, _ = np.histogram(np.clip(actions[:, 1].astype(np.float32), -50, 50), 40, (-50, 50))
    assert second.counts == tuple(expected)
    assert "Action 0 is at a bound in more than 20%" in warned(report, "at a bound")
    assert "Action 1 uses less than 10% of its box" in warned(report, "less than")
    assert warned(report, "still") == "Action 2 stands still: the policy will hold it there."
    assert "values beyond it by rounding, clipped to the box: 1" in report.facts["actions"]


def test_numbers_of_an_observation_that_never_change_are_named_by_their_key():
    rows, generator = 30, np.random.default_rng(0)
    parts = {"arm": np.tile([[0.5, 0.0]], (rows, 1)), "goal": generator.normal(size=(rows, 1))}
    parts["arm"][:, 1] = generator.normal(size=rows)
    report = data_report(recording([rows], observations=parts, next_observations=parts))
    assert report.observations is not None
    assert [number.name for number in report.observations] == ["arm[0]", "arm[1]", "goal"]
    assert all(number.low is number.high is number.used is None for number in report.observations)
    assert warned(report, "still") == "Observation arm[0] stands still: nothing is learned from it."


def test_a_number_stands_still_for_the_report_where_it_does_for_the_normalisation():
    rows, generator = 500, np.random.default_rng(0)
    scales = np.array([2e-5, 9e-5, 3e-4, 0.0])
    observations = 1.57 + scales * generator.normal(size=(rows, 4))
    data = recording([rows], observations=observations, next_observations=observations)
    report, (_, scale) = data_report(data), observation_scale(data)
    assert report.observations is not None
    assert [number.still for number in report.observations] == [True, True, False, True]
    assert (scale == 1).tolist() == [True, True, False, True]


def test_the_report_shows_map_coordinates_as_they_were_recorded():
    observations = np.random.default_rng(0).normal([4.5e6, 0, 0], [5, 1, 1], (60, 3))
    space = spaces.Box(np.array([4e6, -9, -9]), np.array([5e6, 9, 9]), dtype=np.float64)
    data = recording([60], observations=observations, next_observations=observations, observation_space=space)
    report = data_report(data)
    assert report.observations is not None
    position = report.observations[0]
    assert (position.least, position.greatest) == pytest.approx((observations.min(axis=0)[0], observations[:, 0].max()))
    assert (position.low, position.high, position.outside, position.still) == (4e6, 5e6, 0, False)


def test_clipped_actions_are_told_with_their_share_and_largest_excess():
    actions = np.random.default_rng(0).uniform(-0.9, 0.9, size=(200, 2))
    actions[3], actions[4, 0] = (1.5, -1.25), -1.1
    report = data_report(recording([200], actions=actions, clip_actions=True))
    assert report.clipped == Clipping(2, 0.5, 0)
    assert report.facts["clipped"] == "actions of 2 rows (1.0%) by up to 0.5 (number 0) to the box when read"
    assert "1.0% of the rows lay beyond the box, by up to 0.5, and were clipped" in warned(report, "clipped")
    assert report.to_dict()["clipped"] == {"rows": 2, "excess": 0.5, "number": 0}
    sound = data_report(recording([200]))
    assert (sound.clipped, sound.outlying, "clipped" in sound.facts) == (None, None, False)


def test_actions_far_from_all_others_are_told_where_training_clips_them():
    actions = np.random.default_rng(0).uniform(-0.9, 0.9, size=(3000, 2))
    actions[7, 1] = 40
    data = recording([3000], actions=actions, action_space=spaces.Box(-50, 50, (2,)))
    report = data_report(data)
    assert report.outlying is not None
    assert (report.outlying.rows, report.outlying.number) == (1, 1)
    assert report.outlying.excess == pytest.approx(40 - 0.9 - 0.18, abs=0.01)
    assert "to the range of the others in training" in report.facts["clipped"]
    assert data_report(data, action_scaling="box").outlying is None


def test_rows_and_episodes_that_repeat_earlier_ones_are_found():
    data = recording([5, 7, 5, 9, 5])
    first, third, last = slice(0, 5), slice(12, 17), slice(26, 31)
    for column in (data.observations, data.actions):
        column[third] = column[first]  # a copy
        column[last] = column[first][::-1]  # the same rows in another order
    report = data_report(data)
    assert (report.repeated_rows, report.repeated_episodes) == (10, 1)
    assert "Copies of earlier episodes: 1" in warned(report, "Copies")
    still = recording([100])
    still.observations[50:60] = still.observations[50]
    still.actions[50:60] = still.actions[50]
    assert "9 rows (9.0%) repeat an earlier observation and action" in warned(data_report(still), "repeat")


def test_zeros_of_either_sign_repeat_each_other_and_swapped_numbers_do_not():
    data = recording([4])
    data.actions[:] = 0
    data.observations[:] = [[0.0, 1, 2], [-0.0, 1, 2], [1, 0, 2], [2, 1, 0]]
    assert data_report(data).repeated_rows == 1


def test_data_of_many_blocks_give_the_report_of_a_single_one(monkeypatch):
    data = recording([5, 17, 30, 8, 3])
    data.observations[40:44] = data.observations[2]
    whole = data_report(data, 4).to_dict()
    monkeypatch.setattr(data_report_module, "rows_per_block", lambda numbers: 8)
    assert data_report(data, 4).to_dict() == whole


def test_a_quick_report_leaves_the_observations_alone():
    data = recording([30, 20])
    quick, whole = (data_report(data, 4, quick=kind) for kind in (True, False))
    assert (quick.observations, quick.repeated_rows, quick.repeated_episodes) == (None, None, None)
    assert quick.facts.items() <= whole.facts.items()
    unread = replace(data, observations=np.broadcast_to(np.float32(np.nan), (50, 3)))
    assert data_report(unread, 4, quick=True).facts == quick.facts


def test_the_report_is_json():
    report = data_report(recording([30, 20]), 4)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["lengths"] == {"least": 20, "median": 25, "greatest": 30}
    assert found["chunks"]["whole"] == report.chunks.whole
    assert found["warnings"] == []


@pytest.mark.parametrize("quick", [False, True])
def test_a_picture_is_drawn_of_any_report(quick):
    data = recording([1, 30])
    data.observations[:, 1] = 0
    picture = draw_report(data_report(data, 4, quick=quick))
    assert picture.startswith(b"\x89PNG")
