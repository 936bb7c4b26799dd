"""Checks a policy folder on the machine it runs on: its files, its graphs' actions, their speed."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meam_policy.diagnosis.verify_report import GraphReport, VerifyReport
from meam_policy.errors import ActionError, ConfigError, FormatError, MeamError, NotFoundError, ParityError
from meam_policy.folder.golden import Golden
from meam_policy.folder.policy_folder import Config, locate_policy, read_config, read_graph, verify_files
from meam_policy.graph.graph_check import check_graph
from meam_policy.graph.graph_identity import SPEC_HASH
from meam_policy.inference.providers import Device
from meam_policy.inference.session import PolicySession
from meam_policy.spec import PolicySpec

__all__ = ["CALLS", "TOLERANCE", "verify_policy"]

TOLERANCE = 1e-4
"""Largest accepted difference from the golden actions, as a share of the action's half width.

Ten times what the export accepts on its own machine: another CPU, or a GPU, adds the same float32 products in another
order, and the integration amplifies that like any other rounding. Products rounded to TF32 lose thousands of times
more than float32 does, and show."""

CALLS = 200
"""Timed calls per graph."""

_WARM_UP, _PAUSE_S = 10, 0.002

_TIE = 1e-4
"""Values of two chunks that differ by less than this share of themselves may be ordered either way in float32."""

Rows = NDArray[np.float32]


def verify_policy(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    device: Device = "cpu",
    threads: int = 1,
    tolerance: float = TOLERANCE,
    calls: int = CALLS,
    strict: bool = True,
) -> VerifyReport:
    """Check a policy's files and graphs, and that they act here as they did where they were exported.

    The policy as trained, and variants in float32 that are integrated like it, must give the golden actions. Others
    act differently on purpose: their actions must be finite, within the bounds, and the same every time. A graph that
    fails does not keep the others from being checked, and neither does a missing file other than `config.json`.

    Args:
        path_or_repo_id: A policy folder, or a Hub repo id "owner/name".
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder that the policy is in, of a repository or a folder that holds several.
        variant: Check only this variant; None for the policy and all its variants.
        device: Where to run; "cuda" and "tensorrt" fail rather than fall back.
        threads: Threads per inference.
        tolerance: Largest accepted difference, as a share of the action's half width; above 0.
        calls: How often each graph is timed, with pauses as in a control loop; 1 or more.
        strict: Raise for a graph that fails; False only reports it, see `VerifyReport.check`.

    Raises:
        NotFoundError: config.json, a graph or the golden actions are missing.
        IntegrityError: a file has another hash than `config.json` records.
        FormatError: a file does not have the expected format; VersionError if a graph needs a newer onnxruntime.
        ParityError: a graph's actions differ from the golden actions, or from run to run.
        ActionError: a graph's actions are not finite, or out of bounds.
        DeviceError: the device is not usable here.
        ConfigError: there is no such variant, or an argument is out of range.
        HubError: the Hub could not deliver.
    """
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ConfigError(f"tolerance is {tolerance}; expected a number above 0.")
    if calls < 1:
        raise ConfigError(f"calls is {calls}; expected 1 or more.")
    wanted = None if variant is None else (variant,)
    folder = locate_policy(path_or_repo_id, revision=revision, subfolder=subfolder, variants=wanted)
    config = read_config(folder)
    spec = config.spec
    spec.select(variant)
    missing = verify_files(folder, spec)
    try:
        golden, uncompared = Golden.read(folder, spec), None
    except NotFoundError as error:
        golden, uncompared = Golden.draw(spec), error
    graphs = []
    for name in [None, *spec.variants] if variant is None else [variant]:
        selected, file = spec.select(name)
        try:
            graph, identity = read_graph(folder, spec, file), config.graph_identity(name)
            declared = config.declared(name)
            session = PolicySession(graph, selected, device, threads, name=file, identity=identity, declared=declared)
        except (NotFoundError, FormatError) as error:
            graphs.append(_unloaded_graph(folder, config, name, error))
        else:
            graphs.append(_measure_graph(spec, name, session, golden, tolerance, calls))
    report = VerifyReport(
        folder=folder,
        files=tuple(name for name in spec.files if name not in missing),
        missing=missing,
        inputs=len(golden.observation),
        tolerance=tolerance,
        graphs=tuple(graphs),
        acting=spec.acting.describe(spec.integration.best_of),
        uncompared=uncompared,
    )
    if strict:
        report.check()
    return report


def _unloaded_graph(folder: Path, config: Config, variant: str | None, failure: MeamError) -> GraphReport:
    """What is known of a graph that is missing, or cannot be loaded here."""
    spec = config.spec
    _, file = spec.select(variant)
    structure = None
    with contextlib.suppress(NotFoundError, FormatError):
        structure = check_graph(read_graph(folder, spec, file), file)
    exported_with = structure.metadata.get(SPEC_HASH) if structure else None
    return GraphReport(
        variant=variant,
        file=file,
        structure=structure,
        same_spec=None if exported_with is None else exported_with == config.graph_identity(variant),
        provider=None,
        precision=spec.variants[variant].precision if variant else "fp32",
        compared=False,
        max_difference=None,
        rms_difference=None,
        near_ties=0,
        batch_difference=None,
        repeat_difference=None,
        p50_ms=None,
        p99_ms=None,
        failure=failure,
    )


def _measure_graph(
    spec: PolicySpec,
    variant: str | None,
    session: PolicySession,
    golden: Golden,
    tolerance: float,
    calls: int,
) -> GraphReport:
    selected, file = spec.select(variant)
    structure = session.structure
    actions = _Actions(session, spec, selected, golden, tolerance)
    compared = golden.actions is not None and _acts_as_trained(spec, variant)
    precision = spec.variants[variant].precision if variant else "fp32"
    failure = (
        _refuse_values(actions, file, session.provider)
        or _refuse_repeats(actions, file, session.provider, tolerance)
        or (_refuse_difference(actions, file, session.provider, tolerance) if compared else None)
        or (_refuse_batches(actions, file, session.provider, tolerance) if precision == "fp32" else None)
        or (_refuse_prefix(actions, golden, file, tolerance) if session.takes_prefix else None)
    )
    p50, p99 = _answer_times_ms(session, actions, calls)
    errors = actions.errors
    return GraphReport(
        variant=variant,
        file=file,
        structure=structure,
        same_spec=True if SPEC_HASH in structure.metadata else None,  # otherwise it is not loaded
        provider=session.provider,
        precision=precision,
        compared=compared,
        max_difference=None if errors is None else _finite(errors.max()),
        rms_difference=None if errors is None else _finite(math.sqrt(np.square(errors).mean())),
        near_ties=int(np.count_nonzero(actions.near_ties)),
        batch_difference=_finite(actions.batch_errors.max()),
        repeat_difference=_finite(actions.repeat_difference),
        p50_ms=p50,
        p99_ms=p99,
        failure=failure,
    )


def _acts_as_trained(spec: PolicySpec, variant: str | None) -> bool:
    if variant is None:
        return True
    v = spec.variants[variant]
    same = v.integration == spec.integration
    return same and v.precision == "fp32" and not v.one_step


class _Actions:
    """The actions of one graph for the golden inputs: all at once and one by one, each twice.

    Attributes:
        found: Actions [2, n, chunk_size, action_dim] of all inputs at once, and of one by one.
        repeat_difference: Largest difference between the first and the second time.
        near_ties: [n], inputs at which the best two chunks have nearly the same value.
        batch_errors: [n], differences between all at once and one by one, 0 at near ties.
        errors: Differences [2, m, chunk_size, action_dim] from the golden actions but at near ties; None if all are,
            for a graph that takes other noise, and without golden actions.
    """

    def __init__(
        self, session: PolicySession, spec: PolicySpec, selected: PolicySpec, golden: Golden, tolerance: float
    ) -> None:
        self.session, self.spec = session, selected
        self.observation, self.noise = golden.observation, golden.noise
        same_noise = spec.integration.best_of == selected.integration.best_of
        comparable = same_noise and golden.actions is not None
        if not same_noise:
            shape = (len(golden.noise), selected.noise_dim)
            self.noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        # In turns: what one batch size leaves in the buffers must not show in another's actions.
        self.found, again = self._run(), self._run()
        scale = np.array(spec.action_scale)
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity are refused by name
            repeats = np.abs(self.found.astype(np.float64) - again) / scale
            expected = self.found[0] if golden.actions is None else golden.actions
            errors = np.abs(self.found.astype(np.float64) - expected) / scale
            batches = (np.abs(self.found[1].astype(np.float64) - self.found[0]) / scale).max(axis=(1, 2))
        self.repeat_difference = 0.0 if self.found.tobytes() == again.tobytes() else float(repeats.max())
        suspicious = batches.max() > tolerance or (comparable and errors.max() > tolerance)
        self.near_ties = self._find_near_ties() if suspicious else np.zeros(len(self.noise), dtype=bool)
        self.batch_errors = np.where(self.near_ties, 0.0, batches)
        self.errors = errors[:, ~self.near_ties] if comparable and not self.near_ties.all() else None

    def _run(self) -> Rows:
        rows = (slice(i, i + 1) for i in range(len(self.noise)))
        together = self.session.run(self.observation, self.noise)
        alone = [self.session.run(self.observation[row], self.noise[row]) for row in rows]
        return np.stack([together, np.concatenate(alone)])

    def _find_near_ties(self) -> NDArray[np.bool_]:
        samples = self.spec.integration.best_of
        if samples == 1:
            return np.zeros(len(self.noise), dtype=bool)
        draws = self.noise.reshape(len(self.noise), samples, -1)
        # Given one chunk's noise for all of them, the graph has to choose that chunk, and returns its value.
        each = (np.tile(draws[:, sample], (1, samples)) for sample in range(samples))
        values = np.stack([self.session.run_all(self.observation, noise)["value"] for noise in each]).astype(np.float64)
        second, first = np.sort(values, axis=0)[-2:]
        return first - second <= _TIE * np.abs(values).max(axis=0)


def _refuse_values(actions: _Actions, file: str, provider: str) -> ActionError | None:
    found, spec = actions.found, actions.spec
    finite = np.isfinite(found)
    if not finite.all():
        return ActionError(
            f"{file} gives NaN or infinity at the golden input {_row(~finite)} on {provider}; expected finite actions. "
            "Do not act with it: use another device, or export the policy again."
        )
    with np.errstate(over="ignore"):
        low, high = (np.array(bounds).astype(np.float32) for bounds in (spec.action.low, spec.action.high))
    outside = (found < low) | (found > high)
    if outside.any():
        return ActionError(
            f"{file} gives the action {found[outside][0]:g} at the golden input {_row(outside)} on {provider}; "
            "expected actions within the bounds. Export the policy again."
        )
    return None


def _refuse_prefix(actions: _Actions, golden: Golden, file: str, tolerance: float) -> ParityError | None:
    """A graph whose prefix is a whole chunk, with full weight, has to return that chunk, whatever it observes."""
    prefix = np.roll(actions.found[0] if golden.actions is None else golden.actions, 1, axis=0)
    weight = np.ones(prefix.shape[:2], np.float32)
    found = actions.session.run_all(actions.observation, actions.noise, prefix, weight)["actions"]
    with np.errstate(invalid="ignore", over="ignore"):
        error = float((np.abs(found.astype(np.float64) - prefix) / np.array(actions.spec.action_scale)).max())
    if error <= tolerance:
        return None
    return ParityError(
        f"{file} returns a chunk that is {error:.2g} of the action's half width from its prefix on "
        f"{actions.session.provider}; expected at most {tolerance:g}. Use another device, or export again."
    )


def _refuse_repeats(actions: _Actions, file: str, provider: str, tolerance: float) -> ParityError | None:
    # Some kernels of GPUs add in the order in which their threads happen to finish.
    allowed = 0.0 if provider == "CPUExecutionProvider" else tolerance
    if actions.repeat_difference <= allowed:
        return None
    return ParityError(
        f"{file} gives actions that differ by {actions.repeat_difference:.2g} of the action's half width for the same "
        f"inputs twice on {provider}; expected at most {allowed:g}. Check this machine's memory, or use another device."
    )


def _refuse_difference(actions: _Actions, file: str, provider: str, tolerance: float) -> ParityError | None:
    errors = actions.errors
    if errors is None:
        return ParityError(
            f"{file} cannot be compared with the golden actions: at every input the values of the best two of "
            f"{actions.spec.integration.best_of} chunks are nearly equal; expected a difference. Export with best_of=1."
        )
    if errors.max() <= tolerance:
        return None
    rows = np.flatnonzero(~actions.near_ties)
    row = rows[np.argmax(errors.max(axis=(0, 2, 3)))]
    return ParityError(
        f"{file} differs from the golden actions by {errors.max():.2g} of the action's half width at the golden input "
        f"{row} on {provider}; expected at most {tolerance:g}. Do not act with it here: use another device or version "
        "of onnxruntime, or export the policy again."
    )


def _refuse_batches(actions: _Actions, file: str, provider: str, tolerance: float) -> ParityError | None:
    errors = actions.batch_errors
    if errors.max() <= tolerance:
        return None
    return ParityError(
        f"{file} gives actions that differ by {errors.max():.2g} of the action's half width between inputs one by one "
        f"and all at once on {provider}; expected at most {tolerance:g}. Use another device or version of onnxruntime."
    )


def _answer_times_ms(session: PolicySession, actions: _Actions, calls: int) -> tuple[float, float]:
    """Median and 99th percentile of the time of a call for one observation, with pauses as in a control loop."""
    times = []
    for call in range(-_WARM_UP, calls):
        row = slice(call % len(actions.noise), call % len(actions.noise) + 1)
        time.sleep(_PAUSE_S)
        start = time.perf_counter()
        session.run(actions.observation[row], actions.noise[row])
        times.append(time.perf_counter() - start)
    p50, p99 = np.percentile(times[_WARM_UP:], (50, 99)) * 1e3
    return float(p50), float(p99)


def _row(mask: NDArray[np.bool_]) -> int:
    """The first golden input at which something of [2, n, chunk_size, action_dim] holds."""
    return int(np.argmax(mask.any(axis=(0, 2, 3))))


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
