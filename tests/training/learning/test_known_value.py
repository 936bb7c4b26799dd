import pytest
import torch

from meam_policy.errors import ConfigError
from meam_training.learning.chunk_source import DeviceChunks
from meam_training.learning.known_value import check_known_prior, check_known_value
from meam_training.trainer import make_spec

CPU = torch.device("cpu")


def check(value, config, dataset):
    check_known_value(value, DeviceChunks(config, dataset, make_spec(config, dataset), CPU), config, CPU)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda s, a: a, r"value returned \(2, 4\) for two rows; expected a tensor of shape \(2,\)"),
        (lambda s, a: a.sum(), r"value returned \(\) for two rows; expected a tensor"),
        (lambda s, a: a.sum(dim=-1).tolist(), "value returned list for two rows; expected a tensor"),
        (
            lambda s, a: a.sum(dim=-1) / 0,
            r"value returned infinite or undefined numbers \(.*inf.*\)",
        ),
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


def check_prior(prior, config, dataset):
    check_known_prior(prior, DeviceChunks(config, dataset, make_spec(config, dataset), CPU), config, CPU)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (lambda s, x, t: x[0], r"prior returned \(2, 4\) for two rows; expected a tensor of shape \(3, 2, 4\)"),
        (lambda s, x, t: None, r"prior returned NoneType for two rows; expected a tensor of shape \(3, 2, 4\)"),
        (lambda s, x, t: x / 0, "prior returned infinite or undefined numbers"),
        (lambda s, x, t: x.detach(), "prior is not differentiable in the states"),
    ],
)
def test_a_prior_that_is_not_a_differentiable_velocity_is_refused(dataset, make_config, prior, message):
    with pytest.raises(ConfigError, match=message):
        check_prior(prior, make_config(chunk_size=2), dataset)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("bc", {}, "method is bc, with which the policy does not tilt a known prior"),
        ("me-am", {"mixture_weight": 0.5}, r"mixture_weight is 0\.5, with which"),
        ("me-am", {"mirror_stages": 2}, "mirror_stages is 2, with which"),
    ],
)
def test_a_known_prior_is_refused_where_it_would_not_be_tilted(dataset, make_config, method, settings, message):
    with pytest.raises(ConfigError, match=message):
        check_prior(lambda s, x, t: -x, make_config(method, **settings), dataset)


def test_a_prior_gets_raw_observations_and_states_with_leading_axes(dataset, make_config):
    seen = []

    def prior(observations, x, t):
        seen.append((observations, x, t))
        return t * observations.sum(dim=-1, keepdim=True) - x

    check_prior(prior, make_config(chunk_size=2), dataset)
    ((observations, x, t),) = seen
    assert all(any(torch.equal(row, torch.tensor(known)) for known in dataset.observations) for row in observations)
    assert (x.shape, t.shape) == ((3, 2, 4), (3, 2, 1))
