"""Parity: the check that an ONNX graph computes what its checkpoint computes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from meam_policy.errors import ParityError
from meam_policy.inference.session import Optimization, PolicySession
from meam_policy.spec import GRAPH_FILE, PolicySpec, Precision
from meam_training.networks.action_normaliser import ActionNormaliser
from meam_training.networks.policy_module import PolicyModule

__all__ = ["TOLERANCES", "ParityReport", "ParityRow", "check_parity", "draw_noise", "random_observations", "reference"]

TOLERANCES: Mapping[Precision, float] = MappingProxyType({"fp32": 1e-5, "int8": 0.05, "fp16": 0.005})
"""Largest accepted error by precision, as a share of the action's half width.

For fp32 the largest error over all inputs counts, and the limit rises to four times the error of PyTorch in float32 if
that is larger. For the others the root mean square over the policy's own observations counts: near the boundary between
two modes a rounded weight may choose the other mode, so that the largest error would only show that this happened."""

INPUTS = 1000
"""Number of random inputs."""

_BATCH = 250
_FLOAT32 = 2e-7
"""Relative error of a few operations in float32."""

_NEAR_TIE = 4
"""Two chunks tie if their values differ by less than this multiple of the values' error in PyTorch's float32."""

Rows = NDArray[np.float32]
Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ParityRow:
    """Errors on one kind of inputs: of actions as shares of their half width, of values as shares of the largest value.

    Attributes:
        kind: Origin of the inputs: "random" or "recorded".
        inputs: Number of inputs.
        max_error: Largest error of any output, at any optimisation level.
        rms_error: Root mean square error of all outputs, at the worst optimisation level.
        torch_error: Largest error of PyTorch in float32.
        near_ties: Inputs left out because the best two chunks have nearly the same value.
    """

    kind: str
    inputs: int
    max_error: float
    rms_error: float
    torch_error: float
    near_ties: int = 0


@dataclass(frozen=True)
class ParityReport:
    """Differences between a graph in onnxruntime and the checkpoint in PyTorch with float64.

    Attributes:
        precision: Precision of the graph's weights.
        tolerance: Accepted error.
        rows: Errors by kind of inputs.
    """

    precision: Precision
    tolerance: float
    rows: tuple[ParityRow, ...]

    @property
    def inputs(self) -> int:
        """Number of inputs compared."""
        return sum(row.inputs for row in self.rows)

    @property
    def max_error(self) -> float:
        """Largest error over all inputs."""
        return max(row.max_error for row in self.rows)

    @property
    def rms_error(self) -> float:
        """Root mean square error on the recorded observations, or on random ones if there are no others."""
        return self.rows[-1].rms_error


def random_observations(spec: PolicySpec, count: int, seed: int) -> Rows:
    """Normal raw observations [count, obs] with three times the standard deviation of the training data."""
    spread = 3 * np.random.default_rng(seed).standard_normal((count, spec.observation_dim))
    return (np.array(spec.observation_mean) + np.array(spec.observation_std) * spread).astype(np.float32)


def draw_noise(spec: PolicySpec, count: int, seed: int) -> Rows:
    """Standard normal noise [count, noise_dim]."""
    return np.random.default_rng((seed, 1)).standard_normal((count, spec.noise_dim), dtype=np.float32)


def reference(module: PolicyModule) -> PolicyModule:
    """A copy of the policy in float64."""
    return copy.deepcopy(module).double()


def check_parity(
    graph: bytes,
    module: PolicyModule,
    spec: PolicySpec,
    observations: Rows | None = None,
    *,
    precision: Precision = "fp32",
    tolerance: float | None = None,
    name: str = GRAPH_FILE,
    count: int = INPUTS,
) -> ParityReport:
    """Compare the graph in onnxruntime with PyTorch in float64: at every optimisation level, singly and in batches.

    Args:
        graph: Contents of the ONNX file.
        module: The policy in PyTorch.
        spec: Spec that the graph must match.
        observations: Raw observations [n, obs] from the data or the policy; random ones are compared in any case.
        precision: Precision of the graph's weights.
        tolerance: Accepted error; None takes `TOLERANCES`.
        name: Name of the graph's file in error messages.
        count: Number of random inputs.

    Raises:
        ParityError: the error is above the tolerance, an output is not finite, or the best two chunks tie at more than
            nine tenths of the inputs.
        FormatError: onnxruntime cannot load the graph, or its inputs or outputs do not match the spec.
    """
    accepted = TOLERANCES[precision] if tolerance is None else tolerance
    kinds = {"random": random_observations(spec, count, seed=0)}
    if observations is not None:
        kinds["recorded"] = observations
    # Integer products are exact at every level, and rewriting their graph takes minutes at large batches.
    levels: tuple[Optimization, ...] = ("basic", "all") if precision == "int8" else get_args(Optimization)
    sessions: dict[Optimization, PolicySession] = {
        level: PolicySession(graph, spec, optimization=level, name=name) for level in levels
    }
    exact = reference(module)
    rows = tuple(_compare(kind, rows, sessions, module, exact, spec) for kind, rows in kinds.items())
    report = ParityReport(precision, accepted, rows)
    if any(row.inputs - row.near_ties < row.inputs / 10 for row in rows):
        raise ParityError(
            f"{name} cannot be compared with the checkpoint: at more than nine tenths of the inputs, the values of the "
            f"best two of {spec.integration.best_of} chunks are equal in float32; expected a difference. It was not "
            "written. Export with best_of=1."
        )
    for row in rows:
        if precision == "fp32":
            seen, limit = row.max_error, max(accepted, 4 * row.torch_error if tolerance is None else 0)
        elif row is rows[-1]:
            seen, limit = row.rms_error, accepted
        else:
            seen, limit = (0.0 if np.isfinite(row.max_error) else row.max_error), accepted
        if not seen <= limit:  # also catches NaN
            raise ParityError(
                f"{name} differs from the checkpoint by {seen:.2g} of the action's half width on {row.kind} "
                f"observations; expected at most {limit:.2g} for {precision}. It was not written. {_remedy(precision)}"
            )
    return report


def _compare(
    kind: str,
    observations: Rows,
    sessions: Mapping[Optimization, PolicySession],
    module: PolicyModule,
    exact: PolicyModule,
    spec: PolicySpec,
) -> ParityRow:
    noise = draw_noise(spec, len(observations), seed=0)
    inputs = [observations, noise, *(_random_prefixes(spec, len(observations)) if module.takes_prefix else ())]
    expected, in_float32 = (_in_torch(m, inputs, dtype) for m, dtype in ((exact, "f8"), (module, "f4")))
    clear = ~_near_ties(exact, module, observations, noise, spec)
    worst, rms = [], []
    for session in sessions.values():
        errors = _errors(_in_session(session, inputs, _BATCH), expected, spec)[clear]
        few = slice(0, min(16, len(observations)))
        alone = {name: array[few] for name, array in expected.items()}
        singles = _errors(_in_session(session, [rows[few] for rows in inputs], 1), alone, spec)[clear[few]]
        worst += [errors.max(initial=0.0), singles.max(initial=0.0)]
        rms.append(np.sqrt(np.square(errors).mean()) if errors.size else 0.0)
    own = _errors(in_float32, expected, spec)[clear]
    return ParityRow(
        kind,
        len(observations),
        float(np.max(worst)),
        float(np.max(rms)),
        float(own.max(initial=0.0)),
        int(np.count_nonzero(~clear)),
    )


def _errors(found: Outputs, expected: Outputs, spec: PolicySpec) -> NDArray[np.float64]:
    """Errors [n, numbers] of all outputs: actions as shares of their half width, values of the largest value."""
    largest = max(float(np.abs(expected["value"]).max()), 1e-6) if "value" in expected else 1.0
    scales = {"actions": np.array(spec.action_scale), "value": largest, "disagreement": largest}
    parts = [np.abs(found[name] - array) / scales[name] for name, array in expected.items()]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _random_prefixes(spec: PolicySpec, count: int) -> tuple[Rows, Rows]:
    """Prefixes [count, chunk_size, action_dim] in the bounds, and weights [count, chunk_size], half of them 0 or 1."""
    generator = np.random.default_rng(6)
    u = generator.uniform(-1, 1, (count, spec.chunk_size, spec.action_dim))
    weights = np.clip(generator.uniform(-0.5, 1.5, (count, spec.chunk_size)), 0, 1)
    prefix = ActionNormaliser.of(spec).to_environment(u)
    return prefix.astype(np.float32), weights.astype(np.float32)


def _in_session(session: PolicySession, inputs: Sequence[Rows], size: int) -> Outputs:
    starts = range(0, len(inputs[0]), size)
    parts = [session.run_all(*(rows[start : start + size] for rows in inputs)) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def _in_torch(module: PolicyModule, inputs: Sequence[Rows], dtype: str) -> Outputs:
    outputs = module.decide(*(torch.from_numpy(array.astype(dtype)) for array in inputs))
    return {
        n: output.double().numpy() for n, output in zip(("actions", "value", "disagreement"), outputs, strict=False)
    }


@torch.no_grad()
def _near_ties(
    exact: PolicyModule, module: PolicyModule, observations: Rows, noise: Rows, spec: PolicySpec
) -> NDArray[np.bool_]:
    """Inputs whose best two chunks have values too close to tell apart in float32."""
    if spec.integration.best_of == 1:
        return np.zeros(len(observations), dtype=bool)
    rows, draws = torch.from_numpy(observations), torch.from_numpy(noise)
    values = exact.all_values(rows.double(), draws.double())
    lost = (values - module.all_values(rows, draws)).abs().amax(dim=0)
    lost = lost.maximum(_FLOAT32 * values.abs().amax(dim=0))  # by chance the error seen may be smaller
    best = values.topk(2, dim=0).values
    return (best[0] - best[1] < _NEAR_TIE * lost).numpy()


def _remedy(precision: Precision) -> str:
    if precision == "fp32":
        return "Please report this with the versions of torch and onnxruntime."
    return "Keep fp32 for this policy, or accept a larger error with `tolerance`."
