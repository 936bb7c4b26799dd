"""GELU and its derivative, and the element types of matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from meam_training.config import Precision

__all__ = ["cast", "gelu", "gelu_slope"]


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation.

    Compiled code uses the identity (1 + tanh z) / 2 = sigmoid(2 z): the compiler's vectorised tanh takes three times
    as long as its sigmoid.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return x * torch.sigmoid(2 * _gelu_argument(x))
    return F.gelu(x, approximate="tanh")


def gelu_slope(x: Tensor) -> Tensor:
    """Derivative of `gelu`."""
    gate = torch.sigmoid(2 * _gelu_argument(x))
    return gate + x * gate * (1 - gate) * (2 * _GELU_SCALE) * (1 + 3 * _GELU_CUBIC * x * x)


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_argument(x: Tensor) -> Tensor:
    return _GELU_SCALE * x * (1 + _GELU_CUBIC * x * x)


def cast(x: Tensor, precision: Precision) -> Tensor:
    """Cast a factor to the element type in which products of the given precision are computed."""
    return x.bfloat16() if precision == "bf16" else x
