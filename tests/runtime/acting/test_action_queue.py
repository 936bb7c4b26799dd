import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_policy.acting.action_queue import ActionChunkQueue


@st.composite
def histories(draw):
    """Chunk sizes; and for every step which slots are cleared before it, and which of them act."""
    slots, chunk_size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    some = st.lists(st.booleans(), min_size=slots, max_size=slots)
    steps = draw(st.lists(st.tuples(some, st.none() | some), max_size=15))
    return slots, chunk_size, draw(st.integers(1, chunk_size)), steps


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(histories())
def test_every_slot_behaves_like_a_list_of_its_own(history):
    slots, chunk_size, execute_steps, steps = history
    queue = ActionChunkQueue(slots, chunk_size, execute_steps, action_dim=2)
    lists = [[] for _ in range(slots)]
    for number, (cleared, acting) in enumerate(steps):
        queue.clear(np.array(cleared))
        for slot in np.flatnonzero(cleared):
            lists[slot] = []
        empty = [slot for slot in range(slots) if not lists[slot]]
        assert queue.empty_slots().tolist() == empty
        chunks = np.full((len(empty), chunk_size, 2), 0, np.float32)
        for row, slot in enumerate(empty):
            chunks[row] = [[1000 * number + slot, action] for action in range(chunk_size)]
            lists[slot] = chunks[row, :execute_steps].tolist()
        queue.put(np.array(empty, dtype=np.intp), chunks)
        taken = list(range(slots)) if acting is None else np.flatnonzero(acting).tolist()
        popped = queue.pop(None if acting is None else np.array(taken, dtype=np.intp))
        assert popped.tolist() == [lists[slot].pop(0) for slot in taken]


def test_new_queue_is_empty_in_every_slot():
    queue = ActionChunkQueue(3, 4, 2, action_dim=1)
    assert queue.slots == 3
    assert queue.empty_slots().tolist() == [0, 1, 2]


def test_popped_actions_and_put_chunks_are_not_aliased():
    queue = ActionChunkQueue(1, 2, 2, action_dim=1)
    chunk = np.array([[[1], [2]]], np.float32)
    queue.put(np.array([0]), chunk)
    chunk[:] = 9
    first = queue.pop()
    assert first.tolist() == [[1]]
    first[:] = 9
    assert queue.pop().tolist() == [[2]]
