"""Repeated steps against the recursion written out, also as loops of a compiled graph."""

import pytest
import torch

from meam_training.flow.stepping import repeat_step

NUMBERS = [(0.5, 1.0), (2.0, -1.0), (3.0, 0.25)]


def affine(x, total, factor, shift):
    return factor * x + shift, total + shift * x


def repeated(x):
    with torch.no_grad():
        return torch.stack(repeat_step(affine, (x, torch.zeros_like(x)), NUMBERS, looped=True))


def expected(x):
    total = torch.zeros_like(x)
    for factor, shift in NUMBERS:
        x, total = factor * x + shift, total + shift * x
    return torch.stack([x, total])


def test_every_step_starts_from_the_state_that_the_last_one_left():
    x = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(repeated(x), expected(x))


@pytest.mark.compiled
def test_a_compiled_loop_returns_what_the_steps_do_one_by_one():
    x = torch.tensor([1.0, -2.0])
    compiled = torch.compile(repeated, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected(x))
