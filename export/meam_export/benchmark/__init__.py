"""How fast an exported policy acts: contestants take turns on one machine, and are compared with its floor."""

from meam_export.benchmark.contestants import Conditions, check_device, entrants, environment, prepare
from meam_export.benchmark.floor import weight_bytes
from meam_export.benchmark.problem import Problem, checkpoint_problem, random_problem
from meam_export.benchmark.race import Outcome, race
from meam_export.benchmark.settings import ENTRANTS, GPU_ENTRANTS, Entrant, InferenceSetting, make_setting

__all__ = [
    "ENTRANTS",
    "GPU_ENTRANTS",
    "Conditions",
    "Entrant",
    "InferenceSetting",
    "Outcome",
    "Problem",
    "check_device",
    "checkpoint_problem",
    "entrants",
    "environment",
    "make_setting",
    "prepare",
    "race",
    "random_problem",
    "weight_bytes",
]
