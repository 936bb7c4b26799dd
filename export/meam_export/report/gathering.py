"""What a report is made of beyond the files of runs: data, returns, samples and films, as far as they can be had."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_export.report.acting import acting_policy
from meam_export.report.actions import ActionStudy, Choice, choose, study_actions
from meam_export.report.drawing import data_url
from meam_export.report.film import render_film
from meam_export.report.groups import Group
from meam_export.report.returns import Measured
from meam_export.report.subject import Subject
from meam_policy.environments.make import make_environment, named_failures
from meam_policy.errors import ConfigError, MeamError
from meam_policy.rollouts.episodes import rollout
from meam_policy.typed import typed_fields
from meam_training.data.dataset import OfflineDataset
from meam_training.data.opening import DataArguments, open_dataset, recorded_arguments

__all__ = ["Gathering", "ReportOptions"]

MAX_FILM_BYTES = 3 * 2**20
"""Largest film that goes into the page."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What of a report is asked for.

    Attributes:
        reference: TOML file of named returns; see `returns.read_references`.
        data: Sources of the data, in place of those that the runs record.
        episodes: Episodes of every run that are run in its environment; 0 for none.
        seed: Seed of the first of them, and of the film.
        film: Whether to film a rollout.
        compare: Whether to draw the runs in common figures.
        packages: Packages to import first, for their environments.
    """

    reference: Path | None = None
    data: tuple[str, ...] = ()
    episodes: int = 0
    seed: int = 0
    film: bool = False
    compare: bool = False
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ConfigError: one is of another type, or out of range.
        """
        typed_fields(self)
        if self.episodes < 0 or self.seed < 0:
            raise ConfigError(
                f"episodes is {self.episodes} and seed is {self.seed}; expected 0 or more of both, where 0 episodes "
                "run none."
            )


class Gathering:
    """Computes what a report is made of, and notes what could not be.

    Args:
        options: What is asked for.
        on_part: Called with the name of every part that begins.

    Attributes:
        notes: What could not be, in sentences.
    """

    def __init__(self, options: ReportOptions, on_part: Callable[[str], object]) -> None:
        self._options, self._on_part = options, on_part
        self._datasets: dict[str, OfflineDataset | None] = {}
        self.notes: list[str] = []

    def dataset(self, group: Group) -> OfflineDataset | None:
        """The data that a group was trained on; None, and a note, if they cannot be opened."""
        subject = group.shown
        origin = {"data": list(self._options.data)} if self._options.data else dict(subject.origin or {})
        if not origin.get("data"):
            self.notes.append(
                f"{subject.name}: it does not say where its data are, so their returns are not shown. Give --data."
            )
            return None
        key = repr(sorted(origin.items()))
        if key not in self._datasets:
            self._on_part("the data")
            self._datasets[key] = self._open(origin, subject)
        found = self._datasets[key]
        if found is not None and subject.data is not None and found.fingerprint != subject.data:
            self.notes.append(
                f"{subject.name}: the data at hand are not those it was trained on: their fingerprints differ. "
                "Their returns are not shown."
            )
            return None
        if found is not None and subject.spec is not None and found.observation_dim != subject.spec.observation_dim:
            self.notes.append(
                f"{subject.name}: observations of the data have {found.observation_dim} numbers; expected "
                f"{subject.spec.observation_dim}. Nothing of them is shown."
            )
            return None
        return found

    def _open(self, origin: Mapping[str, Any], subject: Subject) -> OfflineDataset | None:
        try:
            arguments = DataArguments(**recorded_arguments(origin))
            typed_fields(arguments)
            return open_dataset(arguments)
        except MeamError as error:
            if self._options.data:
                raise
            self.notes.append(f"{subject.name}: its data cannot be opened, so their returns are not shown: {error}")
            return None

    def measure(self, groups: Sequence[Group], returns: Mapping[Path, NDArray[np.float64]]) -> dict[Subject, Measured]:
        """The returns of every run that has some: of episodes run now or before, or from its files."""
        found: dict[Subject, Measured] = {}
        for subject in (subject for group in groups for subject in group.subjects):
            logged = Measured.logged(subject)
            if logged is not None:
                found[subject] = logged
            if subject.policy is not None and subject.policy in returns:
                found[subject] = Measured.of_episodes(returns[subject.policy])
            if self._options.episodes:
                found |= self._run_episodes(subject)
        return found

    def _run_episodes(self, subject: Subject) -> dict[Subject, Measured]:
        recorded = None if subject.spec is None else subject.spec.recorded_environment
        if recorded is None or subject.weights is None:
            self.notes.append(f"{subject.name}: no episodes were run, as it names no environment or has no networks.")
            return {}
        self._on_part(f"episodes of {subject.name}")
        try:
            env = make_environment(recorded.for_evaluation)
            try:
                with named_failures(recorded.for_evaluation):
                    policy = acting_policy(subject.policy or subject.weights)
                    result = rollout(policy, env, self._options.episodes, self._options.seed)
            finally:
                env.close()
        except MeamError as error:
            self.notes.append(f"{subject.name}: no episodes were run: {error}")
            return {}
        return {subject: Measured.of_episodes(result.returns)}

    def study(
        self, groups: Sequence[Group], datasets: Mapping[Group, OfflineDataset | None]
    ) -> dict[Group, ActionStudy | str]:
        """What the groups' policies do, or why that is not shown; compared ones at the states chosen for one of them.

        That is the first with critics.
        """
        found: dict[Group, ActionStudy | str] = {}
        choice: Choice | None = None
        for group in sorted(groups, key=lambda g: self._options.compare and not g.shown.config.trains_policy):
            subject = group.shown
            if subject.networks is None or subject.spec is None:
                found[group] = "Not shown: there are no networks here."
                continue
            if choice is None or not self._options.compare:
                observations = _observations(subject, datasets[group])
                if observations is None:
                    found[group] = "Not shown: no observations of the data are at hand. Give --data, or the run."
                    continue
                label = group.label if self._options.compare else ""
                choice = replace(choose(subject, observations), chosen_for=label)
            self._on_part(f"actions of {group.label}")
            same = subject.spec.observation_dim == choice.observations.shape[1]
            if not same or max(choice.numbers) >= subject.spec.action_dim:
                found[group] = (
                    "Not shown: its observations or actions are others than those of the policy it is compared with."
                )
                continue
            found[group] = study_actions(subject, choice)
        return found

    def film(self, group: Group) -> str:
        """A film as a data URL, or a sentence why there is none."""
        subject = group.shown
        shown = subject.policy or subject.weights
        if shown is None:
            return "No film: there are no networks here."
        self._on_part(f"a film of {group.label}")
        with tempfile.TemporaryDirectory(prefix="meam-report-") as folder:
            file = Path(folder) / "film.webp"
            why = render_film(shown, file, self._options.seed, self._options.packages)
            if why is not None:
                return why
            size = file.stat().st_size
            if size > MAX_FILM_BYTES:
                return f"No film: it has {size / 2**20:.1f} MiB, more than the {MAX_FILM_BYTES / 2**20:g} of a page."
            return data_url(file.read_bytes(), "webp")


def _observations(subject: Subject, dataset: OfflineDataset | None) -> NDArray[np.float32] | None:
    """Raw observations of the data, those that the run kept or else some of the data at hand."""
    kept = subject.observations
    if kept is not None or dataset is None:
        return kept
    rows = np.sort(np.random.default_rng(0).permutation(len(dataset))[:512])
    return np.ascontiguousarray(dataset.observations[rows], dtype=np.float32)
