"""Tables of the benchmark's measurements."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from meam_training.benchmark.contestants import PRODUCTS, REFERENCES
from meam_training.benchmark.race import Contestant, Outcome
from meam_training.benchmark.settings import PROGRAMS, Setting
from meam_training.benchmark.tables import Section, markdown_report, three_digits

__all__ = [
    "COLUMNS",
    "Limit",
    "Row",
    "cells",
    "limits",
    "machine",
    "markdown",
    "notes",
    "processor",
    "sizes",
    "summarise",
    "to_json",
]

COLUMNS = ("", "updates/s", "quartiles", "ratio", "of limit", "first, s", "GB")


@dataclass(frozen=True)
class Limit:
    """Update rate that would be reached if an update consisted only of its matrix products.

    Attributes:
        method: Method of the update.
        precision: Precision of the products.
        flops: Floating-point operations in the matrix products of one update.
        flops_per_second: Measured rate of the dominant product alone, median of the rounds.
        updates_per_second: `flops_per_second` / `flops`.
    """

    method: str
    precision: str
    flops: int
    flops_per_second: float
    updates_per_second: float


@dataclass(frozen=True)
class Row:
    """Result of a contestant; what was not measured is None.

    Attributes:
        name: Name of the contestant.
        median: Updates per second, median of the rounds.
        quartiles: First and third quartile of the updates per second.
        ratio: Rate relative to the faster form of the reference in the same round, median of the rounds.
        share: Rate as a fraction of the limit measured in the same round, median of the rounds.
        first_seconds: Duration of the first 8 updates, including compilation, in seconds.
        peak_memory: Peak resident memory of its process, bytes.
        failure: Why there is no result.
    """

    name: str
    median: float | None = None
    quartiles: tuple[float, float] | None = None
    ratio: float | None = None
    share: float | None = None
    first_seconds: float | None = None
    peak_memory: int | None = None
    failure: str | None = None


def summarise(outcome: Outcome) -> list[Row]:
    """Make one row for each contestant that performs updates."""
    opponent = _faster([name for name in outcome.rates if name in REFERENCES], outcome)
    return [_row(c, opponent, outcome) for c in outcome.contestants if c.name not in PRODUCTS.values()]


def limits(outcome: Outcome) -> list[Limit]:
    """Compute the limit of each method and precision whose products were measured."""
    found = []
    for precision, name in PRODUCTS.items():
        rates = outcome.rates.get(name)
        if not rates or name in outcome.failures:
            continue
        per_second = float(np.median(rates)) * _product_flops(outcome.setting)
        for method, flops in outcome.about[name]["flops"].items():
            found.append(Limit(method, precision, flops, per_second, per_second / flops))
    return found


def cells(row: Row) -> list[str]:
    """Format a row's cells in the order of `COLUMNS`."""
    if row.failure is not None:
        return [row.name, "failed", *[""] * (len(COLUMNS) - 2)]
    return [
        row.name,
        "" if row.median is None else three_digits(row.median),
        "" if row.quartiles is None else " to ".join(map(three_digits, row.quartiles)),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.first_seconds is None else f"{row.first_seconds:.1f}",
        "" if row.peak_memory is None else f"{row.peak_memory / 1e9:.2f}",
    ]


def notes(outcome: Outcome) -> list[str]:
    """Lines below the table: the limits, and why contestants failed."""
    failures = [f"Failed, {name}: {reason}" for name, reason in outcome.failures.items()]
    return [*map(_describe, limits(outcome)), *failures]


def _describe(limit: Limit) -> str:
    return (
        f"Limit, {limit.method} in {limit.precision}: {limit.flops / 1e9:.3g} GFLOP an update at "
        f"{three_digits(limit.flops_per_second / 1e9)} GFLOP/s is {three_digits(limit.updates_per_second)} updates/s."
    )


def machine(outcomes: Sequence[Outcome], threads: int, *, tf32: bool) -> dict[str, Any]:
    """Describe the conditions of the measurements: processor, threads, device, versions, arithmetic and date."""
    seen: dict[str, Any] = {"processor": processor(), "threads": threads}
    for outcome in outcomes:
        for name, about in outcome.about.items():
            device = {"reference_device" if name in REFERENCES else "device": about.get("device")}
            versions = {library: about[library] for library in ("torch", "jax") if library in about}
            seen |= {**device, **versions} if about else {}
    return {**seen, "tf32": tf32, "date": date.today().isoformat()}


def markdown(outcomes: Sequence[Outcome], about: dict[str, Any]) -> str:
    """Format the tables and the conditions of the measurements as Markdown."""
    return markdown_report(
        about,
        [
            Section(outcome.setting.name, sizes(outcome), COLUMNS, list(map(cells, summarise(outcome))), notes(outcome))
            for outcome in outcomes
        ],
    )


def to_json(outcomes: Sequence[Outcome], about: dict[str, Any]) -> dict[str, Any]:
    """Machine-readable form of all measurements, including those of each round."""
    return {
        "machine": about,
        "settings": [
            {
                **asdict(outcome.setting),
                "contestants": [asdict(row) for row in summarise(outcome)],
                "limits": [asdict(limit) for limit in limits(outcome)],
                "rates": outcome.rates,
            }
            for outcome in outcomes
        ],
    }


def sizes(outcome: Outcome) -> str:
    """Describe the setting and how it was measured, in one line."""
    setting = outcome.setting
    rounds = max(map(len, outcome.rates.values()), default=0)
    return (
        f"Observation {setting.observation_dim}, action {setting.action_dim}, chunk {setting.chunk_size}; hidden "
        f"layers {' '.join(map(str, setting.hidden_dims))}, critics {setting.num_critics}, batch {setting.batch_size}, "
        f"NFE {setting.nfe}; rounds {rounds}, updates a round {setting.updates}."
    )


def _row(contestant: Contestant, opponent: str | None, outcome: Outcome) -> Row:
    name = contestant.name
    memory = outcome.peak_memory.get(name)
    first = outcome.about.get(name, {}).get("first_seconds", {}).get(contestant.form)
    if name in outcome.failures:
        return Row(name, peak_memory=memory, failure=outcome.failures[name])
    rates = outcome.rates.get(name, [])
    if not rates:
        return Row(name, first_seconds=first, peak_memory=memory)
    low, middle, high = np.quantile(rates, (0.25, 0.5, 0.75)).tolist()
    return Row(
        name=name,
        median=middle,
        quartiles=(low, high),
        ratio=None if opponent is None else _median_ratio(rates, outcome.rates[opponent]),
        share=_share(name, rates, outcome),
        first_seconds=first,
        peak_memory=memory,
    )


def _faster(names: Sequence[str], outcome: Outcome) -> str | None:
    running = [name for name in names if name not in outcome.failures]
    return max(running, key=lambda name: np.median(outcome.rates[name]), default=None)


def _share(name: str, rates: Sequence[float], outcome: Outcome) -> float | None:
    program = PROGRAMS.get(name)
    products = None if program is None else PRODUCTS[program.precision]
    if program is None or products in outcome.failures or not outcome.rates.get(products or ""):
        return None
    assert products is not None
    flops = outcome.about[products]["flops"][program.label]
    return _median_ratio(rates, outcome.rates[products]) * flops / _product_flops(outcome.setting)


def _median_ratio(rates: Sequence[float], others: Sequence[float]) -> float:
    """Median ratio over the rounds that both completed; an interrupted round may lack one of them."""
    return float(np.median([one / other for one, other in zip(rates, others, strict=False)]))


def _product_flops(setting: Setting) -> int:
    rows, inner, columns = setting.product
    return 2 * rows * inner * columns


def processor() -> str:
    """Name of this machine's processor."""
    try:
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine()
