"""The page of a report, from the files of runs and policies."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meam_export.report.contents import Section, compared_sections, group_section
from meam_export.report.drawing import Picture
from meam_export.report.gathering import Gathering, ReportOptions
from meam_export.report.groups import Group, group_subjects
from meam_export.report.labels import NAMES
from meam_export.report.returns import (
    Return,
    data_returns,
    draw_returns,
    group_return,
    paired_gain,
    read_references,
)
from meam_export.report.subject import open_subjects
from meam_policy.atomic_files import write_atomically, write_failure
from meam_policy.environments.make import import_packages
from meam_policy.errors import ConfigError, OutputError
from meam_policy.extras import needs
from meam_policy.given_files import given_path, open_regular
from meam_policy.terminal_text import printable
from meam_training.data.dataset import OfflineDataset

__all__ = ["Report", "write_report"]

GENERATOR = "meam report"
"""By this a page is known as one that may be replaced."""

_PACKAGES = ("meam-policy", "torch", "numpy", "matplotlib")
_HEAD_BYTES = 400


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
    work = Gathering(options, on_part)
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
