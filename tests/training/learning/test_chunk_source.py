from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import assume, given
from hypothesis import strategies as st

import meam_training.learning.chunk_source as chunk_source
from meam_policy.errors import DatasetError
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.learning.chunk_source import DeviceChunks, HostChunks, make_chunk_source
from meam_training.trainer import make_spec

CPU = torch.device("cpu")


def recording(lengths, seed=0):
    """Episodes of the given lengths, with terminations anywhere; actions up to 1.00005 in a box that ends at 1."""
    generator = np.random.default_rng(seed)
    rows = sum(lengths)
    actions = np.clip(generator.uniform(-2, 2, (rows, 2)), -1.00005, 1.00005)
    dataset = OfflineDataset.from_arrays(
        generator.normal(size=(rows, 3)),
        actions,
        generator.normal(size=rows),
        generator.normal(size=(rows, 3)),
        np.zeros(rows, bool),
        np.isin(np.arange(rows), np.cumsum(lengths) - 1),
    )
    return replace(dataset, terminations=generator.random(rows) < 0.2)


def both(dataset, chunk_size, method="me-am", **settings):
    config = TrainConfig.preset(method, chunk_size=chunk_size, discount=0.9, **settings)
    spec = make_spec(config, dataset)
    return [kind(config, dataset, spec, CPU) for kind in (DeviceChunks, HostChunks)]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    chunk_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    batch_size=st.integers(1, 40),
    pad=st.booleans(),
)
def test_chunks_on_the_device_and_on_the_host_are_the_same_to_the_bit(lengths, chunk_size, seed, batch_size, pad):
    dataset = recording(lengths, seed)
    assume(max(lengths) >= chunk_size)
    device, host = both(dataset, chunk_size, **({"pad_chunks": pad} if chunk_size > 1 else {}))
    assert len(device) == len(host) == len(dataset) - (0 if pad else chunk_size - 1)
    generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
    for _ in range(2):
        one, other = (s.sample(batch_size, g) for s, g in zip((device, host), generators, strict=True))
        for resident, gathered in zip(one, other, strict=True):
            assert (resident.dtype, resident.shape) == (gathered.dtype, gathered.shape)
            assert resident.numpy().tobytes() == gathered.numpy().tobytes()


@pytest.mark.parametrize("make", [0, 1], ids=["device", "host"])
def test_a_padded_chunk_marks_the_actions_of_its_episode_and_goes_on_with_the_recording(make):
    dataset = recording([2, 4])
    batch = both(dataset, 3)[make].sample(200, torch.Generator().manual_seed(0))
    row_of = {tuple(observation): row for row, observation in enumerate(dataset.observations)}
    rows = np.array([row_of[tuple(observation)] for observation in batch.observations.numpy()])
    assert set(rows) == set(range(6))
    counts = np.array([2, 1, 3, 3, 2, 1])[rows]
    np.testing.assert_array_equal(batch.within, np.repeat(np.arange(3) < counts[:, None], 2, axis=1))
    expected = np.clip(dataset.actions[(rows[:, None] + np.arange(3)) % 6], -1, 1).reshape(-1, 6)
    np.testing.assert_allclose(batch.actions, expected, atol=1e-6)
    last = dataset.terminations[np.array([1, 1, 4, 5, 5, 5])][rows]
    np.testing.assert_array_equal(batch.valid, (counts == 3) | last)


def test_data_of_many_blocks_are_put_on_the_device_whole(monkeypatch):
    dataset = recording([5, 1, 30, 7, 22])
    expected, _ = both(dataset, 3)
    monkeypatch.setattr(chunk_source, "rows_per_block", lambda numbers: 8)
    device, host = both(dataset, 3)
    for source in (device, host):
        batches = [s.sample(500, torch.Generator().manual_seed(0)) for s in (source, expected)]
        for drawn, whole in zip(*batches, strict=True):
            np.testing.assert_array_equal(drawn, whole)


def test_chunks_carry_the_returns_of_their_rows_for_critics_to_be_pretrained():
    dataset = recording([5, 9, 2])
    found = dataset.discounted_returns(0.9)
    returns = found.continued(dataset.rewards, 0.9)
    row_of = {tuple(observation): row for row, observation in enumerate(dataset.observations)}
    for source, plain in zip(both(dataset, 3), both(dataset, 3, "qam"), strict=True):
        batch = source.sample(50, torch.Generator().manual_seed(0))
        rows = [row_of[tuple(observation)] for observation in batch.observations.numpy()]
        np.testing.assert_allclose(batch.returns, returns[rows], rtol=1e-6)
        np.testing.assert_allclose(batch.known, 1 - found.tails[rows], rtol=1e-6)
        batch = plain.sample(50, torch.Generator().manual_seed(0))
        assert not batch.returns.any()
        assert not batch.known.any()


@pytest.mark.parametrize("kind", [DeviceChunks, HostChunks])
def test_an_episode_must_be_as_long_as_a_chunk(kind):
    dataset, config = recording([2, 3]), TrainConfig.preset("bc", chunk_size=4)
    spec = make_spec(config, dataset)
    with pytest.raises(DatasetError, match="No episode has chunk_size = 4"):
        kind(config, dataset, spec, CPU)


@pytest.mark.parametrize("make", [0, 1], ids=["device", "host"])
def test_actions_are_normalised_and_clipped_and_follow_each_other(make):
    space_low, space_high = np.array([0, -4], np.float32), np.array([10, -2], np.float32)
    rows = 20
    actions = np.linspace(space_low, space_high, rows)
    actions[-1] += 5e-5  # rounding that the checks let pass
    dataset = OfflineDataset.from_arrays(
        np.arange(rows),
        actions,
        np.zeros(rows),
        np.arange(rows) + 1,
        np.zeros(rows, bool),
        np.zeros(rows, bool),
        action_space=spaces.Box(space_low, space_high),
    )
    batch = both(dataset, 2, pad_chunks=False)[make].sample(64, torch.Generator().manual_seed(0))
    starts = batch.observations[:, 0]
    expected = torch.stack([starts, starts, starts + 1, starts + 1], dim=1) / (rows - 1) * 2 - 1
    torch.testing.assert_close(batch.actions, expected, atol=1e-6, rtol=0)
    assert batch.actions.abs().max() <= 1
    torch.testing.assert_close(batch.next_observations[:, 0], starts + 2)


@pytest.mark.parametrize(("free", "kind"), [(0, HostChunks), (2 * 3000, DeviceChunks), (2 * 3000 - 1, HostChunks)])
def test_data_are_put_on_the_device_if_they_take_at_most_half_of_what_is_free(monkeypatch, free, kind):
    dataset = recording([50])
    assert len(dataset) * ((3 + 3 + 2 + 3) * 4 + 16) == 3000
    monkeypatch.setattr(chunk_source, "_free_memory", lambda device: free)
    config = TrainConfig.preset("bc")
    assert type(make_chunk_source(config, dataset, make_spec(config, dataset), CPU)) is kind


def test_the_free_memory_is_a_plausible_number():
    free = chunk_source._free_memory(CPU)
    assert 2**20 < free < 2**60


def test_memory_mapped_data_that_may_not_be_written_can_be_put_on_the_device(tmp_path):
    dataset = recording([9, 9])
    columns = {}
    for name in ("observations", "actions", "rewards", "next_observations", "terminations", "episode_ends"):
        np.save(tmp_path / name, getattr(dataset, name))
        columns[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    mapped = OfflineDataset(**columns, observation_boxes=dataset.observation_boxes, action_box=dataset.action_box)
    batches = [
        source.sample(30, torch.Generator().manual_seed(0)) for data in (dataset, mapped) for source in both(data, 3)
    ]
    for batch in batches[1:]:
        for drawn, expected in zip(batch, batches[0], strict=True):
            assert torch.equal(drawn, expected)


def test_a_last_block_shorter_than_a_chunk_holds_no_starts(make_config, monkeypatch):
    monkeypatch.setattr("meam_training.learning.chunk_source.rows_per_block", lambda numbers: 8)
    for rows in range(14, 20):
        ends = np.arange(rows) == rows - 1
        observations = np.arange(rows, dtype=np.float32)[:, None]
        data = OfflineDataset.from_arrays(observations, 0 * observations, np.ones(rows), observations, ends, 0 * ends)
        config = make_config(chunk_size=5, pad_chunks=False)
        spec = make_spec(config, data)
        chunks = [kind(config, data, spec, torch.device("cpu")) for kind in (DeviceChunks, HostChunks)]
        assert len(chunks[0]) == len(chunks[1]) == rows - 4
        batches = [source.sample(64, torch.Generator().manual_seed(0)) for source in chunks]
        for ours, theirs in zip(*batches, strict=True):
            assert torch.equal(ours, theirs)
