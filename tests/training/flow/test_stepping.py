"""Repeated steps against the recursion written out, also as loops of a compiled graph."""

import pytest
import torch

from meam_training.flow.stepping import at, repeat_step, trace_steps

NUMBERS = [(0.5, 1.0), (2.0, -1.0), (3.0, 0.25)]
GIVEN = torch.tensor([[1.0, 2.0], [3.0, 5.0], [8.0, 13.0]])
HELD = -GIVEN


def affine(x, drawn, index, factor, shift):
    return factor * x + shift * drawn + at(HELD, index)


def traced(x):
    with torch.no_grad():
        return trace_steps(affine, x, NUMBERS, [GIVEN, [2, 0, 1]], looped=True)


def repeated(x):
    with torch.no_grad():
        step = lambda x, y, factor, shift: (factor * x, y + shift * x)  # noqa: E731
        return torch.stack(repeat_step(step, (x, torch.zeros_like(x)), NUMBERS, looped=True))


def expected(x):
    states = [x]
    for (factor, shift), drawn, index in zip(NUMBERS, GIVEN, (2, 0, 1), strict=True):
        states.append(factor * states[-1] + shift * drawn + HELD[index])
    return torch.stack(states)


def test_a_trace_has_the_initial_state_and_those_after_each_step():
    x = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(traced(x), expected(x))
    torch.testing.assert_close(trace_steps(affine, x, [], [], looped=True), x[None])


def test_at_takes_an_index_that_is_a_number_or_a_tensor_without_axes():
    for index in (0, 2):
        assert torch.equal(at(GIVEN, index), at(GIVEN, torch.tensor(index)))
    assert torch.equal(at(GIVEN, slice(1, 3)), GIVEN[1:])


@pytest.mark.compiled
def test_compiled_loops_return_what_the_steps_do_one_by_one():
    x = torch.tensor([1.0, -2.0])
    for function in (traced, repeated):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x))
