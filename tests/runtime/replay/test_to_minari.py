from dataclasses import replace

import numpy as np
import pytest

from meam_policy import BoxSpec, ConfigError, ControlLoop, DatasetError, FormatError, SafetySettings
from meam_policy.cli import run
from meam_policy.flight import read_flight
from meam_policy.replay.training_steps import stretches
from meam_training import OfflineDataset, TrainConfig, train
from meam_training.collection.record_flights import record_flights


@pytest.fixture
def flown(make_policy, tmp_path):
    """A loop's flight: 40 ticks, of which the 20th refuses its observation."""
    rows = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    actions = []
    path = tmp_path / "flight.mcap"
    policy = make_policy(chunk_size=4).load(seed=0, safety=SafetySettings(on_bad_observation="hold"))
    with ControlLoop(policy, 10, chunking="naive", simulated_delay=1, record=path) as loop:
        for tick, row in enumerate(rows):
            actions.append(loop.step(np.full(3, np.nan, np.float32) if tick == 20 else row))
    return path, rows, np.array(actions)


def test_a_flight_becomes_a_data_set_of_what_was_done_and_bc_learns_from_it(flown, tmp_path):
    path, rows, actions = flown
    folder, episodes, steps = record_flights([read_flight(path)], "arm/flight-v0", root=tmp_path / "data", reward=0.0)
    assert (episodes, steps) == (2, 19 + 18)
    data = OfflineDataset.from_minari(folder)
    np.testing.assert_array_equal(data.observations, np.concatenate([rows[:19], rows[21:39]]))
    np.testing.assert_array_equal(data.actions, np.concatenate([actions[:19], actions[21:39]]))
    assert not data.rewards.any()
    config = TrainConfig.preset("bc", steps=3, chunk_size=2, batch_size=8, hidden_dims=(8,), device="cpu")
    assert train(config, data, tmp_path / "run").step == 3


def test_rewards_are_never_made_up(flown, tmp_path):
    with pytest.raises(ConfigError, match="--reward 0"):
        record_flights([read_flight(flown[0])], "arm/flight-v0", root=tmp_path / "data")
    with pytest.raises(ConfigError, match="finite"):
        record_flights([read_flight(flown[0])], "arm/flight-v0", root=tmp_path / "data", reward=np.inf)
    with pytest.raises(DatasetError, match="no flight"):
        record_flights([], "arm/flight-v0", root=tmp_path / "data")
    assert not (tmp_path / "data" / "arm" / "flight-v0").exists()


def test_the_rate_is_the_loops_and_a_robots_data_is_of_no_environment(make_policy, tmp_path):
    policy = make_policy(chunk_size=4, environment_id="Pendulum-v1", control_rate_hz=10.0).load(seed=0)
    assert policy.spec.control_rate_hz == 10
    for rate in (50, 20):
        record = tmp_path / f"{rate}.mcap"
        with ControlLoop(policy, rate, any_rate=True, chunking="naive", simulated_delay=1, record=record) as loop:
            for row in np.zeros((5, 3)):
                loop.step(row)
    flights = [read_flight(tmp_path / f"{rate}.mcap") for rate in (50, 20)]
    folder, *_ = record_flights(flights[:1], "arm/flight-v0", root=tmp_path / "data", reward=0.0)
    data = OfflineDataset.from_minari(folder)
    assert (data.control_rate_hz, data.environment_id) == (50.0, None)
    with pytest.raises(DatasetError, match=r"20\.mcap was flown at 20 Hz, and .*50\.mcap at 50 Hz"):
        record_flights(flights, "arm/flights-v0", root=tmp_path / "data", reward=0.0)


@pytest.mark.parametrize(
    "field",
    [{"reward": "abc"}, {"action": [0.0] * 5}, {"action": "abc"}, {"observation": {"values": [1.0], "shape": [7]}}],
)
def test_a_field_that_does_not_fit_is_said(flown, tmp_path, field):
    flight = read_flight(flown[0])
    record = next(record for record in flight.records if record.topic == "tick")
    record.message.update(field)
    with pytest.raises(FormatError, match=f"Record {record.number} of the flight, a message of tick"):
        record_flights([flight], "arm/flight-v0", root=tmp_path / "data", reward=0.0)
    flight.about.pop("settings")
    with pytest.raises(FormatError, match="rate_hz"):
        record_flights([flight], "arm/flight-v0", root=tmp_path / "data", reward=0.0)


def test_numbers_of_records_go_round_without_a_gap(flown):
    flight = read_flight(flown[0])
    start = 2**32 - len(flight.records) // 2
    later = [record._replace(number=(record.number + start) % 2**32) for record in flight.records]
    steps, again = (
        [len(found.steps) for found in stretches(each)] for each in (flight, replace(flight, records=later))
    )
    assert steps == again == [19, 18]


def test_an_evaluation_is_recorded_replayed_and_made_a_data_set(make_policy, tmp_path, capsys):
    box = BoxSpec(shape=(1,), dtype="float32", low=(-2.0,), high=(2.0,))
    seen = BoxSpec(shape=(3,), dtype="float32", low=(-1.0, -1.0, -8.0), high=(1.0, 1.0, 8.0))
    folder = str(make_policy(observation=(seen,), action=box, environment_id="Pendulum-v1").folder)
    flights, data = tmp_path / "flights", tmp_path / "data"
    evaluation = ["eval", folder, "--episodes", "2", "--max-episode-steps", "30", "--json"]
    assert run([*evaluation, "--flight", str(flights)]) == 0
    assert sorted(path.name for path in flights.iterdir()) == ["episode-00000.mcap", "episode-00001.mcap"]
    assert (
        run(["replay", str(flights), "--policy", folder, "--to-minari", "pendulum/flights-v0", "--root", str(data)])
        == 0
    )
    out = capsys.readouterr().out
    assert "the same" in out
    found = OfflineDataset.from_minari(data / "pendulum" / "flights-v0")
    assert run([*evaluation, "--record", "pendulum/rollouts-v0", "--root", str(data)]) == 0
    recorded = OfflineDataset.from_minari(data / "pendulum" / "rollouts-v0")
    for name in ("observations", "actions", "rewards", "terminations", "episode_ends"):
        np.testing.assert_array_equal(getattr(found, name), getattr(recorded, name))
    assert run([*evaluation, "--flight", str(flights)]) == 2
    assert "already holds something" in capsys.readouterr().err
    assert run([*evaluation, "--flight", str(tmp_path / "more"), "--num-envs", "2"]) == 2
    assert "one environment at a time" in capsys.readouterr().err
