"""Finished jobs of an accuracy suite, and what its tables and pictures share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from run import ALL_RUNS, CRITICS, METHODS

__all__ = ["BASELINE", "COLOURS", "INK", "PRIOR", "TARGET", "Result", "grouped", "number", "read_results", "table"]

BASELINE = "reweighted"
"""The method that the others are compared with."""
PALETTE = ("#6d28d9", "#2563eb", "#c2410c", "#be123c", "#0f766e", "#a16207", "#4d7c0f", "#0891b2")
COLOURS = dict(zip(METHODS, PALETTE, strict=True))
INK, PRIOR, TARGET = "#1f2937", "#6b7280", "#d5dce5"


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        data: Its JSON file, as `run.run_job` returns it.
        samples: Some of the policy's actions by context [samples, dim]; empty if the run diverged.
    """

    data: Mapping[str, Any]
    samples: Mapping[str, NDArray[np.float16]]

    def cell(self, context: str) -> Mapping[str, Any] | None:
        """Measurements in a context, or None if the run diverged."""
        return next((cell for cell in self.data["cells"] if cell["context"] == context), None)

    def error(self, context: str) -> float:
        """Normalised W1 in a context; infinite if the run diverged."""
        cell = self.cell(context)
        return math.inf if cell is None else cell["normalised_w1"]

    @property
    def errors(self) -> list[float]:
        """Normalised W1 in every context."""
        return [self.error(name) for name in ALL_RUNS[self.data["run"]].cells]


def read_results(folder: Path) -> list[Result]:
    """All finished jobs of a suite, in the order of critics, methods, runs and seeds."""
    results = []
    for path in (folder / "jobs").glob("[!.]*.json"):
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            samples = {name: arrays[name] for name in arrays.files}
        results.append(Result(json.loads(path.read_text(encoding="utf-8")), samples))
    orders = {"critic": list(CRITICS), "method": list(METHODS), "run": list(ALL_RUNS)}

    def position(result: Result) -> tuple[int, ...]:
        return *(order.index(result.data[key]) for key, order in orders.items()), result.data["seed"]

    return sorted(results, key=position)


def grouped(results: Sequence[Result], key: str) -> dict[Any, list[Result]]:
    """Results by a key of their files, in the order of their first appearance."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(result.data[key], []).append(result)
    return groups


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def number(value: float) -> str:
    """A distance to three decimals, or "diverged"."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"
