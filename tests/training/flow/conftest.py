"""Velocity fields, in PyTorch and in NumPy."""

import math

import numpy as np
import pytest
import torch


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


class Curved:
    """A smooth field, nonlinear in x and t, in PyTorch and NumPy."""

    def __init__(self, seed, act=3):
        generator = np.random.default_rng(seed)
        self.inner, self.outer = generator.normal(size=(2, act, act)) / math.sqrt(act)
        self.offset, self.drift = generator.normal(size=(2, act))

    def __call__(self, x, t):
        return torch.tanh(x @ tensor(self.inner) + tensor(self.offset) + t * tensor(self.drift)) @ tensor(self.outer)

    def numpy(self, x, t):
        return np.tanh(x @ self.inner + self.offset + t * self.drift) @ self.outer

    def midpoint(self, x, steps, backwards=False):
        """Midpoint steps written from their definition."""
        h = 1 / steps
        for k in range(steps):
            t, signed = (1 - k * h, -h) if backwards else (k * h, h)
            x = x + signed * self.numpy(x + signed / 2 * self.numpy(x, t), t + signed / 2)
        return x


def affine_field(seed):
    """A velocity field that is affine in x and in t, and its matrix, offset and drift."""
    generator = np.random.default_rng(seed)
    matrix, offset, drift = (generator.normal(size=s) for s in ((3, 3), 3, 3))
    return (
        lambda x, t: x @ tensor(matrix).T + tensor(offset) + t * tensor(drift),
        lambda x, t: x @ matrix.T + offset + t * drift,
        matrix,
    )


@pytest.fixture(scope="session")
def curved():
    return Curved


@pytest.fixture(scope="session")
def affine():
    return affine_field
