"""GELU and its slope, and the types in which products are taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from meam_training.config import Precision

__all__ = ["cast", "gelu", "gelu_slope"]


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU.

    In compiled code it is written with a sigmoid, the same function, (1 + tanh z) / 2 = sigmoid(2 z): the compiler's
    vectorised tanh takes three times as long.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return x * torch.sigmoid(2 * _gelu_argument(x))
    return F.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of `gelu`."""
    share = torch.sigmoid(2 * _gelu_argument(x))
    return share + x * share * (1 - share) * (2 * _GELU_SCALE) * (1 + 3 * _GELU_CUBIC * x * x)


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_argument(x: Tensor) -> Tensor:
    return _GELU_SCALE * x * (1 + _GELU_CUBIC * x * x)


def cast(x: Tensor, precision: Precision) -> Tensor:
    """The type in which a product of that precision is taken."""
    return x.bfloat16() if precision == "bf16" else x
