"""Runs that differ in their seeds alone, and how they are called and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from meam_export.report.labels import COLOURS, method_labels
from meam_export.report.subject import Subject
from meam_policy.errors import ConfigError

__all__ = ["Group", "group_subjects", "shared_seeds"]

LINES = ("solid", "dashed", "dotted", "dashdot")
"""Lines of several groups of one method, which have its colour."""


@dataclass(frozen=True, eq=False)
class Group:
    """Runs of one method on one task, with one seed each.

    Attributes:
        label: What it is called.
        colour: Its method's colour.
        line: Its lines in curves.
        subjects: The runs, by seed.
    """

    label: str
    colour: str
    line: str
    subjects: tuple[Subject, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the runs."""
        return tuple(subject.config.seed for subject in self.subjects)

    @property
    def shown(self) -> Subject:
        """The run whose networks are shown: the first that has some, with an exported policy if there is one."""
        return min(self.subjects, key=lambda s: (s.weights is None, s.policy is None, s.config.seed))

    @property
    def task(self) -> str:
        """The environment, or else the data."""
        return self.shown.environment or self.shown.training_data or "an unknown environment"


def group_subjects(subjects: Sequence[Subject]) -> list[Group]:
    """Group runs of the same task and settings, in the order in which they were given.

    Raises:
        ConfigError: two of a group have the same seed, and would count twice.
    """
    found: dict[tuple[object, ...], list[Subject]] = {}
    for subject in subjects:
        deciding = {**subject.config.deciding(), "steps": subject.config.steps, "seed": None}
        key = (subject.environment, subject.training_data, repr(sorted(deciding.items())))
        found.setdefault(key, []).append(subject)
    labels, methods, groups = _labels([group[0] for group in found.values()]), [], []
    for label, group in zip(labels, found.values(), strict=True):
        ordered = sorted(group, key=lambda s: s.config.seed)
        for one, other in pairwise(ordered):
            if one.config.seed == other.config.seed:
                raise ConfigError(
                    f"{one.name} and {other.name} are both {label} with seed {one.config.seed}, which an interval over "
                    "seeds would count twice. Leave one of them out."
                )
        method = group[0].config.method
        line = LINES[methods.count(method) % len(LINES)]
        methods.append(method)
        groups.append(Group(label, COLOURS.get(method, COLOURS["data"]), line, tuple(ordered)))
    return groups


def _labels(firsts: Sequence[Subject]) -> list[str]:
    """Method, and the settings that set it apart on its task; with task or folder where several would be the same."""
    tasks = [first.environment or first.training_data or "unknown task" for first in firsts]
    labels = [""] * len(firsts)
    for task in dict.fromkeys(tasks):
        configs = {str(i): replace(f.config, seed=0) for i, f in enumerate(firsts) if tasks[i] == task}
        for key, label in method_labels(configs).items():
            labels[int(key)] = label if len(set(tasks)) == 1 else f"{label}, {task}"
    return [f"{label}, {firsts[i].name}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def shared_seeds(groups: Sequence[Group]) -> tuple[int, ...]:
    """Seeds that every group has."""
    common = set(groups[0].seeds).intersection(*(group.seeds for group in groups))
    return tuple(sorted(common))
