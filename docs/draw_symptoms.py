"""Draw runs of wrong choices beside a right one, what they log above what they return, for `docs/choosing.md`.

The page has the commands that make the runs: `python docs/draw_symptoms.py runs`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from meam_export.report.drawing import FAINT, INK, RULE, new_figure, png, titled
from meam_training import TrainConfig
from meam_training.runs.csv_file import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ASSETS = Path(__file__).parent / "assets"
RIGHT = "default"
"""Folder of the run with the defaults, which stands beside every other."""

RIGHT_COLOUR, WRONG_COLOUR = FAINT, "#b91c1c"
BEFORE = 100
"""Updates of pretraining that are drawn, at most."""

Row = Mapping[str, float]


class Signal(NamedTuple):
    """A number that a run logs.

    Attributes:
        title: What it is.
        value: Reads it off a row of metrics; KeyError where the row lacks it.
        level: From where on `meam train` warns, or what is right; None for neither.
        log: Whether the axis is logarithmic.
        beside: A second number of the same unit, drawn with dashes; None for none.
    """

    title: str
    value: Callable[[Row], float]
    level: float | None = None
    log: bool = False
    beside: Callable[[Row], float] | None = None


class Symptom(NamedTuple):
    """A wrong choice, and where it shows.

    Attributes:
        run: Folder of the run.
        title: The choice.
        signals: Where it shows before the return does.
    """

    run: str
    title: str
    signals: tuple[Signal, Signal]


def column(name: str) -> Callable[[Row], float]:
    """Reads a column."""
    return lambda row: row[name]


GAIN = Signal("policy's values above the data's", column("value_gain"), 0.0)
SAMPLES = Signal("effective samples, share", column("effective_samples"), 1.5 / 8)
TILT = Signal(
    "τQ over the prior's chunks, nats", lambda row: row["inverse_temperature"] * row["value_spread"], 0.1, log=True
)
BIAS = Signal("critics' bias", column("calibration_bias"), 0.0)
SLOPE = Signal("slope of returns on values", column("calibration_slope"), 1.0)
USED = Signal("KL divergence used, nats an action", column("kl_average"))

PICTURES: Mapping[str, Sequence[Symptom]] = {
    "symptoms-1.png": (
        Symptom("hot", "temperature of 1700", (SAMPLES, BIAS)),
        Symptom("timid", "budget of 0.01", (GAIN, TILT)),
        Symptom("unpretrained", "50 updates of pretraining", (Signal("prior's loss", column("prior_loss")), GAIN)),
    ),
    "symptoms-2.png": (
        Symptom(
            "unlearned",
            "critics from 0, slow targets",
            (
                Signal(
                    "value at the data (dots: the least)", column("calibration_value"), beside=column("return_floor")
                ),
                Signal("TD error, share of the reward", lambda row: abs(row["td_bias"]) / row["td_reward"], 0.5),
            ),
        ),
        Symptom(
            "mixture",
            "mixture of 0.5",
            (
                Signal("gain (dots: disagreement)", column("mixture_gain"), beside=column("mixture_disagreement")),
                GAIN,
            ),
        ),
        Symptom("short-sighted", "discount of 0.5", (SLOPE, USED)),
    ),
}


def draw(runs: Path, symptoms: Sequence[Symptom]) -> bytes:
    """The picture of some wrong choices, one a column, as a PNG."""
    figure = new_figure(9.6, 6.6)
    axes: Any = figure.subplots(3, len(symptoms), sharex="col")
    for panels, symptom in zip(axes.T, symptoms, strict=True):
        for name, colour in ((RIGHT, RIGHT_COLOUR), (symptom.run, WRONG_COLOUR)):
            folder = runs / name
            start = TrainConfig.from_json((folder / "config.json").read_bytes()).pretraining
            metrics = read_rows(folder / "metrics.csv")
            for panel, signal in zip(panels, symptom.signals, strict=False):
                _line(panel, metrics, start, signal.value, colour)
                if signal.beside is not None:
                    _line(panel, metrics, start, signal.beside, colour, linestyle=":")
            _line(panels[2], read_rows(folder / "evaluations.csv"), start, column("return_mean"), colour)
        for panel, signal in zip(panels, symptom.signals, strict=False):
            titled(panel, signal.title)
            if signal.level is not None:
                panel.axhline(signal.level, color=INK, linewidth=0.8, linestyle="--")
            if signal.log:
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter("")
        panels[0].annotate(
            symptom.title, (0, 1.2), xycoords="axes fraction", fontsize=11, color=WRONG_COLOUR, weight="bold"
        )
        titled(panels[2], "return", x="updates after pretraining")
        panels[2].set_ylim(0, 14)
    for panel in axes.flat:
        _sober(panel)
    lines = axes[2, 0].get_lines()[:2]
    figure.legend(lines, ("defaults", "this choice"), loc="outside lower right", ncols=2, fontsize=8, frameon=False)
    return png(figure)


def _line(
    panel: Axes, rows: Sequence[Row], start: int, value: Callable[[Row], float], colour: str, linestyle: str = "-"
) -> None:
    points: list[tuple[float, float]] = []
    for row in rows:
        step = row["step"] - start
        try:
            if step >= -BEFORE and math.isfinite(number := value(row)):
                points.append((step, number))
        except KeyError:
            continue
    if points:
        panel.plot(
            *zip(*points, strict=True), color=colour, linestyle=linestyle, linewidth=1.6, marker=".", markersize=4
        )


def _sober(panel: Axes) -> None:
    panel.tick_params(labelsize=8, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
    panel.grid(axis="y", color=RULE, linewidth=0.6)
    panel.axvline(0, color=RULE, linewidth=1.2)
    panel.set_axisbelow(True)


def main(runs: Path) -> None:
    """Draw all pictures from the runs in a folder."""
    for name, symptoms in PICTURES.items():
        (ASSETS / name).write_bytes(draw(runs, symptoms))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
