"""The figures that a policy folder records as measured: their names, and what they can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from meam_policy.errors import FormatError
from meam_policy.spec.json_reader import require

__all__ = ["DIFFERENCES", "RULE_FIGURES", "VARIANT_FIGURES", "check_figures"]

DIFFERENCES = ("action_error", "ode_error", "sliced_w1")
"""Figures that compare a variant with the policy as trained, which those that act differently on purpose have not."""

_RETURNS = ("return_mean", "return_low", "return_high", "success")

VARIANT_FIGURES = ("parity_error", *DIFFERENCES, *_RETURNS, "latency_p50_ms", "latency_p99_ms")
"""What `measured` of a variant may hold."""

RULE_FIGURES = (*_RETURNS, "gain_low", "gain_high")
"""What is measured of an acting rule."""

_HIGHEST: Mapping[str, float] = MappingProxyType(
    {"parity_error": math.inf, **dict.fromkeys(DIFFERENCES, math.inf), "success": 1.0}
    | dict.fromkeys(("latency_p50_ms", "latency_p99_ms"), math.inf)
)
"""Of figures that are not below 0; the others are returns, of any size."""

_ORDERED = (
    ("return_low", "return_mean"),
    ("return_mean", "return_high"),
    ("gain_low", "gain_high"),
    ("latency_p50_ms", "latency_p99_ms"),
)
"""Pairs of which the first is not above the second."""


def check_figures(name: str, figures: Mapping[str, float], known: Collection[str]) -> None:
    """Check that figures are known, finite, in range and in order.

    Args:
        name: Name of the field that holds them.
        figures: The figures.
        known: Names that they may have.

    Raises:
        FormatError: one is not.
    """
    for key, number in figures.items():
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f' Did you mean {name}["{close[0]}"]?' if close else ""
            raise FormatError(f'config.json: {name}["{key}"] is not a figure of this format version.{hint}')
        require(math.isfinite(number), f'{name}["{key}"]', number, "a finite number")
        highest = _HIGHEST.get(key)
        if highest is not None:
            expected = "0 or more" if math.isinf(highest) else f"0 to {highest:g}"
            require(0 <= number <= highest, f'{name}["{key}"]', number, expected)
    for low, high in _ORDERED:
        if low in figures and high in figures:
            expected = f"at most {high}, {figures[high]}"
            require(figures[low] <= figures[high], f'{name}["{low}"]', figures[low], expected)
