"""Results of `meam verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meam_policy.errors import MeamError, NotFoundError
from meam_policy.graph.graph_check import GraphSummary
from meam_policy.spec import Precision

__all__ = ["GraphReport", "VerifyReport"]


@dataclass(frozen=True)
class GraphReport:
    """What one graph of a policy does on this machine. Differences are shares of the action's half width.

    Attributes:
        variant: Its name; None for the policy as trained.
        file: Its file.
        structure: Summary of the graph; None if it is missing or broken.
        same_spec: Whether it was exported with this very `config.json`, without which it is not run; None if it does
            not record that, or is missing or broken.
        provider: The execution provider that ran it; None if it cannot be loaded, and then nothing below is known.
        precision: Precision of its weights.
        compared: Whether it must return the golden actions: it is integrated like the policy as trained, in float32.
        max_difference: Largest difference from the golden actions; None where it takes other noise, and where there are
            none.
        rms_difference: Root mean square of it.
        near_ties: Inputs left out, since two chunks have nearly the same value.
        batch_difference: Largest difference between inputs one by one and all at once.
        repeat_difference: Largest difference between the same inputs twice; 0 if and only if the bits are equal.
        p50_ms: Median time of a call for one observation, milliseconds.
        p99_ms: 99th percentile of it.
        failure: Why it must not act here; None if it may.
    """

    variant: str | None
    file: str
    structure: GraphSummary | None
    same_spec: bool | None
    provider: str | None
    precision: Precision
    compared: bool
    max_difference: float | None
    rms_difference: float | None
    near_ties: int
    batch_difference: float | None
    repeat_difference: float | None
    p50_ms: float | None
    p99_ms: float | None
    failure: MeamError | None


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_policy` found.

    Attributes:
        folder: The policy folder on this machine.
        files: Files whose hashes are those of `config.json`.
        missing: Files that a whole policy folder has, or that `config.json` names, and that are not there.
        inputs: Golden inputs; without golden actions, inputs that were drawn here.
        tolerance: Accepted difference.
        graphs: What each graph does.
        acting: How the policy as trained acts, in words; the differences above are for the golden noise, as it is.
        uncompared: Why there are no golden actions to compare with; None if there are.
    """

    folder: Path
    files: tuple[str, ...]
    missing: tuple[str, ...]
    inputs: int
    tolerance: float
    graphs: tuple[GraphReport, ...]
    acting: str
    uncompared: NotFoundError | None = None

    @property
    def failure(self) -> MeamError | None:
        """What is wrong with the first graph that fails, or that there are no golden actions; None if all is well."""
        failures = (graph.failure for graph in self.graphs if graph.failure is not None)
        return next(failures, self.uncompared)

    def check(self) -> None:
        """Raise what is wrong.

        Raises:
            ParityError: a graph's actions differ from the golden actions, or from run to run.
            ActionError: a graph's actions are not finite, or out of bounds.
            FormatError: a graph cannot be loaded; VersionError if only here.
            NotFoundError: a graph, or the golden actions, are missing.
        """
        if self.failure is not None:
            raise self.failure
