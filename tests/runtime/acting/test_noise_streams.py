import numpy as np
import pytest

from meam_policy.acting.noise_streams import NoiseStreams

SLOTS = np.arange(3)


def seeded(seeds, mask=None, size=4):
    streams = NoiseStreams(size)
    streams.reseed(seeds, mask)
    return streams


def test_draws_have_a_row_for_each_slot():
    draws = seeded(0).draw(SLOTS)
    assert (draws.shape, draws.dtype) == ((3, 4), np.float32)
    assert len(np.unique(draws)) == 12


def test_a_slot_draws_the_same_whatever_the_others_draw():
    alone, among = seeded(3), seeded(3)
    expected = [alone.draw(np.array([1])) for _ in range(3)]
    among.draw(SLOTS)
    among.draw(np.array([0, 2]))
    found = [among.draw(np.array([1])) for _ in range(2)]
    np.testing.assert_array_equal(found, expected[1:])


def test_a_seed_for_each_slot_gives_what_a_single_slot_with_it_draws():
    found = seeded([5, 6, 7]).draw(SLOTS)
    for row, seed in zip(found, (5, 6, 7), strict=True):
        np.testing.assert_array_equal(seeded(seed).draw(np.array([0]))[0], row)


@pytest.mark.parametrize("seeds", [8, [8, 9, 10]])
def test_slots_outside_the_mask_keep_their_streams(seeds):
    plain, masked = seeded(1), seeded(1)
    for streams in (plain, masked):
        streams.draw(SLOTS)
    masked.reseed(seeds, np.array([False, True, False]))
    one, other = plain.draw(SLOTS), masked.draw(SLOTS)
    np.testing.assert_array_equal(one[[0, 2]], other[[0, 2]])
    assert not np.array_equal(one[1], other[1])


def test_no_seed_leaves_the_streams_as_they_are():
    plain, other = seeded(2), seeded(2)
    other.reseed(None)
    other.reseed(None, np.array([True]))
    np.testing.assert_array_equal(plain.draw(SLOTS), other.draw(SLOTS))


def test_rows_continue_the_stream_of_the_first_slot():
    rows = seeded(4).draw_rows(2)
    first = seeded(4)
    np.testing.assert_array_equal(rows, [first.draw(np.array([0]))[0] for _ in range(2)])


def test_streams_without_a_seed_differ():
    assert not np.array_equal(NoiseStreams(4).draw(SLOTS), NoiseStreams(4).draw(SLOTS))
