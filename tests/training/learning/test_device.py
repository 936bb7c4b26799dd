import pytest
import torch

from meam_policy.errors import ConfigError, DeviceError
from meam_training.learning.device import cpu_threads, training_device


@pytest.mark.parametrize("name", ["gpu", "", "mps", "meta", "cpu:x"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ConfigError, match=f'device is "{name}"; expected "auto", "cpu", "cuda"'):
        training_device(name)


def test_a_device_that_is_not_here_is_refused():
    name = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(DeviceError, match=f'device is "{name}", but torch sees'):
        training_device(name)


def test_auto_is_a_gpu_where_there_is_one():
    assert training_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert training_device("cpu") == torch.device("cpu")


def test_the_number_of_threads_is_as_before_afterwards():
    before = torch.get_num_threads()
    with cpu_threads(None):
        assert torch.get_num_threads() == before
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
