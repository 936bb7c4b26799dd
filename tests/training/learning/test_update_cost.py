import pytest
import torch

from meam_training.learning.chunk_source import make_chunk_source
from meam_training.learning.update_cost import UpdateCost, measure_update_cost
from meam_training.trainer import make_spec

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("method", "settings", "parts"),
    [
        ("bc", {}, set()),
        ("me-am", {"pretrain_steps": 3}, {"data", "critic", "prior", "policy", "optimiser"}),
        ("qam-edit", {}, {"data", "critic", "prior", "policy", "heads", "optimiser"}),
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
