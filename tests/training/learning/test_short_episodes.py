"""What is learned from episodes shorter than a chunk."""

import numpy as np
import pytest
import torch

from meam_training.data.dataset import OfflineDataset
from meam_training.trainer import train

SHORT = 0.8
"""Size of the actions in short episodes."""


@pytest.fixture(scope="module")
def mostly_short() -> OfflineDataset:
    """Episodes of six steps that act and succeed, and two long ones that do nothing."""
    generator = np.random.default_rng(0)
    lengths = [6] * 190 + [40] * 2
    observations = generator.uniform(-1, 1, (sum(lengths), 2))
    short = np.repeat([length == 6 for length in lengths], lengths)
    ends = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    actions = np.where(short[:, None], SHORT * np.sign(observations), 0.0)
    rewards = (short & ends).astype(float)
    return OfflineDataset.from_arrays(observations, actions, rewards, observations, short & ends, ends)


@pytest.mark.filterwarnings("ignore:.*rows are within 7 steps")
@pytest.mark.parametrize(("pad", "least", "most"), [(True, 0.5, 1.0), (False, 0.0, 0.35)])
def test_the_policy_acts_like_the_short_episodes_if_chunks_are_padded(
    make_config, mostly_short, tmp_path, pad, least, most
):
    sizes = {"chunk_size": 8, "hidden_dims": (64, 64), "batch_size": 64, "learning_rate": 1e-3, "threads": 1}
    config = make_config("bc", {"steps": 800, **sizes}, pad_chunks=pad)
    networks = train(config, mostly_short, tmp_path).load_networks()
    generator = torch.Generator().manual_seed(0)
    observations = 2 * torch.rand(400, 2, generator=generator) - 1
    with torch.no_grad():
        chunks = networks.act(networks.encoder(observations), torch.randn(400, 16, generator=generator))
    assert least < chunks[:, :2].abs().mean() < most


@pytest.mark.filterwarnings("ignore:.*rows are within 7 steps")
def test_the_critics_learn_what_success_earns_in_episodes_shorter_than_a_chunk(make_config, mostly_short, tmp_path):
    settings = {"chunk_size": 8, "steps": 300, "pretrain_steps": 299, "learning_rate": 1e-3}
    values = {}
    for pad in (True, False):
        networks = train(
            make_config("me-am", settings, pad_chunks=pad), mostly_short, tmp_path / str(pad)
        ).load_networks()
        with torch.no_grad():
            actions = torch.from_numpy(mostly_short.actions[:48]).view(6, 16)
            features = networks.encoder(torch.from_numpy(mostly_short.observations[:48:8]))
            values[pad] = networks.values(features, actions).mean().item()
    success = 0.99**2.5  # five steps from its end, or fewer
    assert abs(values[True] - success) < 0.3  # 0.86 to 1.25 with seeds 0 to 4
    assert abs(values[False] - success) > 1  # the long episodes earn nothing for ever, and that is all it knows


def test_training_without_padding_warns_of_the_share_that_is_left_out(make_config, mostly_short, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"9\d% of the rows are within 7 steps .* nothing is learned from them"):
        train(make_config("qam", steps=1, chunk_size=8), mostly_short, tmp_path)
