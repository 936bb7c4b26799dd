import pytest
import torch

from meam_policy.errors import ConfigError
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.known_value import check_known_value
from meam_training.trainer import make_spec

CPU = torch.device("cpu")


def check(value, config, dataset):
    check_known_value(value, DeviceChunks(config, dataset, make_spec(config, dataset), CPU), config, CPU)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda s, a: a, r"value returned \(2, 4\) for two rows; expected a tensor of shape \(2,\)"),
        (lambda s, a: a.sum(), r"value returned \(\) for two rows"),
        (lambda s, a: a.sum(dim=-1).tolist(), "value returned list for two rows"),
        (lambda s, a: a.sum(dim=-1) / 0, r"value returned \[.*inf.*\]; expected finite numbers"),
        (lambda s, a: a.detach().sum(dim=-1), "value is not differentiable in the actions"),
    ],
)
def test_a_value_that_is_not_one_differentiable_number_a_row_is_refused(dataset, make_config, value, message):
    with pytest.raises(ConfigError, match=message):
        check(value, make_config(), dataset)


def test_a_value_gets_raw_observations_and_flattened_chunks(dataset, make_config):
    seen = []

    def value(observations, actions):
        seen.append((observations, actions))
        return actions.sum(dim=-1)

    check(value, make_config(chunk_size=2), dataset)
    ((observations, actions),) = seen
    assert all(any(torch.equal(row, torch.tensor(known)) for known in dataset.observations) for row in observations)
    assert actions.shape == (2, 4)
    assert actions.abs().max() <= 1


def test_without_a_policy_to_train_a_value_needs_no_gradient(dataset, make_config):
    check(lambda s, a: a.detach().sum(dim=-1), make_config("bc"), dataset)
