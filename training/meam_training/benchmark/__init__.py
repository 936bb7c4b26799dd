"""Training benchmark: contestants timed in turn on one machine, and compared with its limit."""

from meam_training.benchmark.contestants import check_reference, make_contestants, worker_environment
from meam_training.benchmark.race import Contestant, Outcome, race
from meam_training.benchmark.report import Limit, Row, limits, machine, markdown, processor, summarise, to_json
from meam_training.benchmark.settings import PROGRAMS, SCALES, SHAPES, Setting, make_setting

__all__ = [
    "PROGRAMS",
    "SCALES",
    "SHAPES",
    "Contestant",
    "Limit",
    "Outcome",
    "Row",
    "Setting",
    "check_reference",
    "limits",
    "machine",
    "make_contestants",
    "make_setting",
    "markdown",
    "processor",
    "race",
    "summarise",
    "to_json",
    "worker_environment",
]
