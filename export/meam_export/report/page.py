"""The page of a report, from the files of runs and policies."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_export.report.acting import acting_policy
from meam_export.report.actions import ActionStudy, Choice, choose, study_actions
from meam_export.report.contents import Section, compared_sections, group_section
from meam_export.report.drawing import Picture, data_url
from meam_export.report.film import render_film
from meam_export.report.groups import Group, group_subjects
from meam_export.report.labels import NAMES
from meam_export.report.returns import (
    Measured,
    Return,
    data_returns,
    draw_returns,
    group_return,
    paired_gain,
    read_references,
)
from meam_export.report.subject import Subject, open_subjects
from meam_policy.atomic_files import write_atomically, write_failure
from meam_policy.environments.make import import_packages, make_environment, named_failures
from meam_policy.errors import ConfigError, MeamError, OutputError
from meam_policy.extras import needs
from meam_policy.given_files import given_path, open_regular
from meam_policy.rollouts.episodes import rollout
from meam_policy.terminal_text import printable
from meam_policy.typed import typed_fields
from meam_training.data.dataset import OfflineDataset
from meam_training.data.opening import DataArguments, open_dataset, recorded_arguments

__all__ = ["Report", "ReportOptions", "write_report"]

GENERATOR = "meam report"
"""By this a page is known as one that may be replaced."""

MAX_FILM_BYTES = 3 * 2**20
"""Largest film that goes into the page."""

_PACKAGES = ("meam-policy", "torch", "numpy", "matplotlib")
_HEAD_BYTES = 400


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


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        path: The page.
        groups: Figures of every group of runs, as JSON data.
        notes: What is not on the page and why, in sentences.
    """

    path: Path
    groups: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class _Page:
    title: str
    opening: list[str]
    verdicts: list[str]
    table: list[dict[str, Any]]
    returns: list[Picture]
    sources: str
    sections: list[Section]
    notes: list[str]
    colophon: str


def write_report(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: ReportOptions | None = None,
    on_part: Callable[[str], object] = lambda part: None,
    returns: Mapping[Path, NDArray[np.float64]] | None = None,
) -> Report:
    """Read runs and policies, draw them, and write one page that loads nothing.

    Args:
        paths: Folders of runs, of checkpoints, or of policies.
        output: HTML file to write. A file there is replaced if it is such a page.
        options: What is asked for; None for the defaults.
        on_part: Called with the name of every part that begins.
        returns: Returns of episodes [n] that were run already, by the policy's folder.

    Raises:
        NotFoundError: a folder or file does not exist, or is not what it is given as.
        FormatError: a file of a policy or a log is broken.
        CheckpointError: a checkpoint is broken.
        ConfigError: an option is out of range, or the runs cannot be compared.
        OutputError: the page cannot be written, or another file would be overwritten.
        MissingExtraError: matplotlib or jinja2 is not installed, or a package cannot be imported.
    """
    options = options or ReportOptions()
    path = _output(output)
    import_packages(options.packages)
    groups = group_subjects(open_subjects(paths))
    tasks = list(dict.fromkeys(group.task for group in groups))
    _check(groups, tasks, options)
    references = [] if options.reference is None else read_references(options.reference)
    work = _Work(options, on_part)
    datasets = {group: work.dataset(group) for group in groups}
    measured = work.measure(groups, returns or {})
    studies = work.study(groups, datasets)
    films = {group: work.film(group) for group in groups if options.film}
    on_part("the figures")
    known: dict[Group, Return] = {}
    for group in groups:
        found = group_return(group, measured)
        if found is not None:
            known[group] = found
    bars, sources, of_data = _returns(groups, tasks, known, datasets, references, work.notes)
    if options.compare:
        sections = compared_sections(groups, studies, films)
    else:
        sections = [group_section(group, studies[group], films.get(group, "")) for group in groups]
    verdicts = _verdicts(groups, known, of_data)
    if options.compare:
        best = _best(groups, known)
        verdicts += [paired_gain(best, other, measured) for other in known if other is not best]
    for group in groups:
        work.notes += [f"{s.name}: {note}" for s in group.subjects for note in s.notes]
    page = _Page(
        title=_title(groups, tasks),
        opening=_opening(groups, datasets),
        verdicts=verdicts,
        table=[_row(group, known.get(group)) for group in groups],
        returns=bars,
        sources=sources,
        sections=sections,
        notes=list(dict.fromkeys(work.notes)),
        colophon=f"{', '.join(f'{name} {version(name)}' for name in _PACKAGES)}; {platform.machine()}, Python "
        f"{platform.python_version()}. Return is the undiscounted sum of an episode's rewards.",
    )
    _write(path, _render(page))
    return Report(path, [_as_json(group, known.get(group)) for group in groups], page.notes)


def _output(output: str | os.PathLike[str]) -> Path:
    """The path to write, before anything is computed for it."""
    path = given_path("--output", output)
    if path.is_dir() or not str(output).strip():
        raise OutputError(f"{path} is a folder; expected a file, such as {path / 'report.html'}.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"There is no folder {path.absolute().parent} to write {path.name} into. Make it first.")
    if path.exists():
        try:
            with open_regular(path) as file:
                ours = f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(_HEAD_BYTES)
        except OSError as error:
            raise OutputError(f"{path} cannot be replaced: {error.strerror}. Choose another --output.") from error
        if not ours:
            raise OutputError(
                f"{path} is there already, and is no page that `meam report` wrote. Choose another --output, or delete "
                "it first."
            )
    return path


def _check(groups: Sequence[Group], tasks: Sequence[str], options: ReportOptions) -> None:
    if len(tasks) > 1 and (options.compare or options.reference is not None):
        what = "--compare draws runs of one task" if options.compare else "--reference names figures of one task"
        raise ConfigError(f"{what}; these are of {len(tasks)}: {'; '.join(tasks)}. Make a report for each of them.")
    if options.compare and len(groups) == 1:
        raise ConfigError(
            f"--compare has nothing to compare: the runs given are one method, {groups[0].label}, with "
            f"{len(groups[0].seeds)} seed{'s' * (len(groups[0].seeds) > 1)}. Leave it out, or give other runs too."
        )


class _Work:
    """What has to be computed, and what could not be."""

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


def _returns(
    groups: Sequence[Group],
    tasks: Sequence[str],
    known: Mapping[Group, Return],
    datasets: Mapping[Group, OfflineDataset | None],
    references: Sequence[Return],
    notes: list[str],
) -> tuple[list[Picture], str, dict[str, list[Return]]]:
    """The bars of every task, what they are means of, and the data's returns."""
    pictures, sources, of_data = [], [], {}
    for task in tasks:
        own = [group for group in groups if group.task == task]
        of_data[task] = _of_data(own, datasets)
        bars = [*of_data[task], *references, *(known[group] for group in own if group in known)]
        unknown = [group.label for group in own if group not in known]
        if unknown:
            notes.append(
                f"Returns of {', '.join(unknown)} were not measured: give --episodes, or train with --evaluate-every."
            )
        if bars:
            pictures.append(draw_returns(bars))
            named = "; ".join(f"{each.label}: {each.source}" for each in bars)
            sources.append(f"{task}. {named}." if len(tasks) > 1 else f"{named}.")
    if any(of_data.values()):
        sources.append("Recorded episodes may go on past a goal where a policy's episode ends.")
    return pictures, " ".join(sources), of_data


def _of_data(groups: Sequence[Group], datasets: Mapping[Group, OfflineDataset | None]) -> list[Return]:
    dataset = next((datasets[group] for group in groups if datasets[group] is not None), None)
    if dataset is None or not len(dataset.episode_returns):
        return []
    return data_returns(np.asarray(dataset.episode_returns))


def _title(groups: Sequence[Group], tasks: Sequence[str]) -> str:
    *methods, last = dict.fromkeys(NAMES.get(s.config.method, s.config.method) for g in groups for s in g.subjects)
    named = f"{', '.join(methods)} and {last}" if methods else last
    return f"{named}: {', '.join(tasks)}"


def _opening(groups: Sequence[Group], datasets: Mapping[Group, OfflineDataset | None]) -> list[str]:
    """What was trained on what, a sentence for each data set."""
    by_data: dict[str, list[Group]] = {}
    for group in groups:
        dataset, named = datasets[group], group.shown.training_data or "data that are not named"
        if dataset is not None:
            episodes = np.count_nonzero(dataset.episode_ends)
            named += f", {len(dataset):,} transitions in {episodes:,} episodes"
        by_data.setdefault(f"{named}, for {group.task}", []).append(group)
    found = []
    for data, trained in by_data.items():
        *firsts, shown = (f"{g.label} ({_seeds(g)})" for g in trained)
        shown = f"{', '.join(firsts)} and {shown}" if firsts else shown
        count = sum(len(g.subjects) for g in trained)
        found.append(f"{shown} {'was' if count == 1 else 'were'} trained on {data}.")
    return found


def _seeds(group: Group) -> str:
    return f"seed{'s' * (len(group.seeds) > 1)} {', '.join(map(str, group.seeds))}"


def _best(groups: Sequence[Group], known: Mapping[Group, Return]) -> Group:
    """The group that returns most; the first, if no returns are known."""
    return max((group for group in groups if group in known), key=lambda g: known[g].mean, default=groups[0])


def _verdicts(
    groups: Sequence[Group], known: Mapping[Group, Return], of_data: Mapping[str, Sequence[Return]]
) -> list[str]:
    """A sentence on each group, of several on one task that first which returns most."""
    best = _best(groups, known)
    others = [group for group in groups if group is not best]
    found = [_verdict(group, known.get(group), of_data[group.task]) for group in (best, *others)]
    rivals = [known[group] for group in others if group in known]
    if best not in known or not rivals or len({group.task for group in groups}) > 1:
        return found
    second, low = max(rivals, key=lambda each: each.mean), known[best].low
    if second.mean < known[best].mean:
        found[0] = found[0].replace(" returns ", " returns most, ", 1)
        if low is not None and second.high is not None and second.high >= low:
            found[0] = f"{found[0].removesuffix('.')}. Its interval overlaps that of {second.label}."
    return found


def _verdict(group: Group, found: Return | None, of_data: Sequence[Return]) -> str:
    """What it returns, beside the data, and what its runs warn about, in a sentence."""
    if found is None:
        text = f"What {group.label} returns was not measured"
    else:
        text = f"{group.label} returns {found.mean:.4g}" + _interval(found, " (95 %: ", ")")
        if of_data:
            mean, best = of_data
            beside = f"the data's mean of {mean.mean:.4g}"
            if found.mean < mean.mean:
                text += f", below {beside}"
            elif found.mean <= best.mean:
                text += f", above {beside} and not above its best tenth at {best.mean:.4g}"
            else:
                text += f", above {beside} and its best tenth at {best.mean:.4g}"
    names = list(dict.fromkeys(w.name for s in group.subjects for w in s.warnings))
    if names:
        return f"{text}; its runs warn of: {', '.join(names)}."
    logged = any(s.metrics for s in group.subjects)
    return f"{text}; {'no warnings' if logged else 'whether its runs had warnings is not known here'}."


def _interval(found: Return, before: str = "", after: str = "") -> str:
    return "" if found.low is None or found.high is None else f"{before}{found.low:.4g} … {found.high:.4g}{after}"


def _row(group: Group, found: Return | None) -> dict[str, Any]:
    steps = [s.step for s in group.subjects if s.step is not None]
    logged = any(s.metrics for s in group.subjects)
    return {
        "group": group,
        "seeds": _seeds(group),
        "updates": " … ".join(f"{n:,}" for n in sorted({min(steps), max(steps)})) if steps else "",
        "mean": "\N{EN DASH}" if found is None else f"{found.mean:.4g}",
        "interval": "" if found is None else _interval(found),
        "warnings": str(sum(len(s.warnings) for s in group.subjects)) if logged else "\N{EN DASH}",
    }


def _as_json(group: Group, found: Return | None) -> dict[str, Any]:
    return {
        "label": group.label,
        "task": group.task,
        "seeds": list(group.seeds),
        "runs": [subject.name for subject in group.subjects],
        "return_mean": None if found is None else found.mean,
        "return_low": None if found is None else found.low,
        "return_high": None if found is None else found.high,
        "warnings": list(dict.fromkeys(w.name for s in group.subjects for w in s.warnings)),
    }


def _render(page: _Page) -> str:
    with needs("The report", "jinja2", "export"):
        import jinja2
    environment = jinja2.Environment(autoescape=True, finalize=_plain, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("meam_export") / "report" / "page.html").read_text(encoding="utf-8"))
    return template.render(page=page, generator=GENERATOR)


def _plain(value: Any) -> Any:
    """Text of files in visible characters; what macros give is left alone."""
    return printable(value) if type(value) is str and not value.startswith("data:image/") else value


def _write(path: Path, html: str) -> None:
    data = html.encode("utf-8", "backslashreplace")
    try:
        write_atomically(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {write_failure(error, path.parent, len(data))}.") from error
