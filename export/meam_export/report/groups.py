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
    configs = {str(i): replace(group[0].config, seed=0) for i, group in enumerate(found.values())}
    labels, methods, groups = _labels(configs, list(found.values())), [], []
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


def _labels(configs: dict[str, object], groups: Sequence[Sequence[Subject]]) -> list[str]:
    """The labels, with task or folder where several would be called the same."""
    labels = list(method_labels(configs).values())  # pyright: ignore[reportArgumentType]
    tasks = [group[0].environment or group[0].training_data for group in groups]
    if len(set(tasks)) > 1:
        labels = [f"{label}, {task or 'unknown task'}" for label, task in zip(labels, tasks, strict=True)]
    return [f"{label}, {groups[i][0].name}" if labels.count(label) > 1 else label for i, label in enumerate(labels)]


def shared_seeds(groups: Sequence[Group]) -> tuple[int, ...]:
    """Seeds that every group has."""
    common = set(groups[0].seeds).intersection(*(group.seeds for group in groups))
    return tuple(sorted(common))
