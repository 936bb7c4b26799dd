import pytest
import torch

from meam_training.config import TrainConfig
from meam_training.learning import update_cost
from meam_training.learning.chunk_source import make_chunk_source
from meam_training.learning.update_cost import RunStart, UpdateCost, measure_smaller, measure_update_cost
from meam_training.runs.run_report import opening
from meam_training.trainer import make_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("method", "settings", "parts"),
    [
        ("bc", {}, set()),
        ("me-am", {"pretrain_steps": 3}, {"data", "samples", "critic", "prior", "policy", "optimiser"}),
        ("qam-edit", {}, {"data", "samples", "critic", "prior", "policy", "heads", "optimiser"}),
    ],
)
def test_an_update_is_divided_into_the_parts_that_the_method_has(dataset, make_config, method, settings, parts):
    config = make_config(method, **settings)
    spec = make_spec(config, dataset)
    cost = measure_update_cost(config, spec, make_chunk_source(config, dataset, spec, CPU), CPU)
    assert set(cost.parts) == parts
    assert (cost.pretraining > 0) == (method == "bc" or config.pretrain_steps > 0)
    assert (cost.joint > 0) == (method != "bc")


def test_a_known_value_leaves_nothing_to_the_critics(dataset, make_config):
    config = make_config()
    spec = make_spec(config, dataset)
    chunks = make_chunk_source(config, dataset, spec, CPU)
    cost = measure_update_cost(config, spec, chunks, CPU, lambda observations, actions: actions.sum(dim=1))
    assert "critic" not in cost.parts


def test_what_is_left_of_a_run_is_that_of_its_two_kinds_of_updates(make_config):
    config, cost = make_config(steps=100, pretrain_steps=60), UpdateCost(0.5, 2.0)
    assert [cost.left(config, step) for step in (0, 60, 80, 100)] == [60 * 0.5 + 40 * 2, 40 * 2, 20 * 2, 0]
    assert UpdateCost(0.5, 0.0).left(make_config("bc", steps=100), 20) == 80 * 0.5


HOUR = 3600.0


def smaller_of(dataset, config, left=HOUR, device=CPU):
    spec = make_spec(config, dataset)
    return measure_smaller(config, spec, make_chunk_source(config, dataset, spec, CPU), device, left)


@pytest.mark.parametrize("method", ["bc", "me-am"])
def test_a_long_run_on_few_data_is_told_of_sizes_that_do(dataset, method, monkeypatch):
    # As long as updates of this size take, whatever else the machine does.
    monkeypatch.setattr(update_cost, "_median_seconds", lambda work, device: 0.01)
    config = TrainConfig.preset(method, threads=1).resolved()
    smaller = smaller_of(dataset, config)
    assert smaller is not None
    small = TrainConfig.preset(method, threads=1, **smaller.changes)
    assert (small.steps, small.hidden_dims) == (10_000, (128, 128, 128))
    assert small.num_critics == (2 if method == "me-am" else config.num_critics)
    assert 0 < smaller.seconds < HOUR / 2
    facts = opening(config, dataset, RunStart(CPU, 1, 1, True, 0, UpdateCost(1, 1), smaller))
    assert facts["smaller"].endswith("which do for so few data")
    assert "--steps 10000 --batch-size 128 --learning-rate 0.001 --hidden-dims 128 128 128" in facts["smaller"]


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, 600.0),
        ({"hidden_dims": (64, 64), "critic_hidden_dims": (64, 64)}, HOUR),
        ({"steps": 5000}, HOUR),
        ({"pretrain_steps": 2000}, HOUR),
        ({"candidates": 200}, HOUR),
        ({"online_steps": 5000}, HOUR),
    ],
)
def test_nothing_smaller_is_suggested_to_short_runs_or_where_it_does_not_fit(dataset, settings, left):
    assert smaller_of(dataset, TrainConfig.preset("me-am", threads=1, **settings), left) is None


def test_nothing_smaller_is_suggested_on_other_devices_and_for_more_data(dataset, monkeypatch):
    config = TrainConfig.preset("me-am", threads=1)
    assert smaller_of(dataset, config, device=torch.device("meta")) is None
    monkeypatch.setattr(update_cost, "_SMALL_DATA", len(dataset) - 1)
    assert smaller_of(dataset, config) is None
