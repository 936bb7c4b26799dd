"""Gradient of a function with respect to its input, in updates that may be compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["input_gradient"]


def input_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of the sum of a function's values; neither it nor the input carries gradients further.

    Args:
        function: Maps the input to a tensor of any shape.
        x: Where to differentiate.

    Returns:
        The gradient, of the input's shape.
    """
    if torch.compiler.is_compiling():
        # The only form that torch 2.11 can trace; uncompiled, it takes half as long again as the one below.
        with torch.no_grad():
            return torch.func.grad(lambda x: function(x).sum())(x.detach())
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient
