"""Chooses the variant of a policy that is fast enough on this machine."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from meam_policy.errors import ConfigError, DeviceError, VersionError
from meam_policy.inference.session import Session
from meam_policy.spec import GRAPH_FILE, PolicySpec

__all__ = ["TimedPolicy", "answer_time_ms", "load_within"]

_RUNS, _PAUSE_S, _PERCENTILE = 60, 0.005, 95


class TimedPolicy(Protocol):
    """What can be timed."""

    @property
    def spec(self) -> PolicySpec:
        """What it is."""
        ...

    @property
    def session(self) -> Session:
        """What runs its graph."""
        ...


P = TypeVar("P", bound=TimedPolicy)


def load_within(budget_ms: float, spec: PolicySpec, load: Callable[[str | None], P]) -> P:
    """Load the graph closest to policy.onnx that answers within a time on this machine.

    Variants are tried in the order of their `action_error`. One without that figure acts differently on purpose, e.g.
    with another best-of-N, and is never taken. One that needs a newer onnxruntime is skipped with a warning.

    Args:
        budget_ms: Longest accepted latency, milliseconds.
        spec: The policy as it was recorded.
        load: Loads a variant by name; None is the policy itself.

    Raises:
        ConfigError: the budget is not a time.
        DeviceError: no graph is fast enough.
        VersionError: every graph needs a newer onnxruntime.
    """
    if not (budget_ms > 0 and math.isfinite(budget_ms)):
        raise ConfigError(f"latency_budget_ms is {budget_ms}; expected milliseconds above 0.")
    errors: dict[str | None, float] = {None: 0.0}
    others = {name: v for name, v in spec.variants.items() if v.file != GRAPH_FILE}
    errors |= {name: v.measured["action_error"] for name, v in others.items() if "action_error" in v.measured}
    seen: dict[str, float] = {}
    too_new: VersionError | None = None
    for name in sorted(errors, key=lambda name: errors[name]):
        try:
            policy = load(name)
        except DeviceError:
            if name is None:
                raise
            continue  # this device cannot run the variant's operators
        except VersionError as error:
            too_new = too_new or error
            warnings.warn(f"{error} It is left out.", RuntimeWarning, stacklevel=4)
            continue
        seen[name or "policy.onnx"] = answer_time_ms(policy)
        if seen[name or "policy.onnx"] <= budget_ms:
            return policy
    if too_new is not None and not seen:
        raise too_new
    fastest = sorted(seen, key=lambda name: seen[name])[:3]
    times = ", ".join(f"{name} {seen[name]:.3g} ms" for name in fastest)
    raise DeviceError(
        f"No graph of the policy answers within {budget_ms:g} ms here; the fastest: {times}. Export variants with "
        "fewer steps (`meam export --ladder`), or allow more time."
    )


def answer_time_ms(policy: TimedPolicy) -> float:
    """Milliseconds that a policy takes for one observation: the 95th percentile of runs with pauses between them."""
    spec = policy.spec
    observation = np.array([spec.observation_mean], dtype=np.float32)
    noise = np.zeros((1, spec.noise_dim), dtype=np.float32)
    seconds = []
    for _ in range(_RUNS):
        time.sleep(_PAUSE_S)
        start = time.perf_counter()
        policy.session.run_all(observation, noise)
        seconds.append(time.perf_counter() - start)
    return float(np.percentile(seconds[_RUNS // 10 :], _PERCENTILE) * 1e3)
