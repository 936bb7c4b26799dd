"""What stands on the page of a report: sections of blocks, with their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meam_export.card.export_record import ExportRecord
from meam_export.report.action_figures import draw_flow, draw_states
from meam_export.report.actions import PATHS, SAMPLES, ActionStudy
from meam_export.report.curves import DIAGNOSTICS, LEARNING, at_common_steps, draw_panels
from meam_export.report.drawing import Picture, svg
from meam_export.report.groups import Group
from meam_export.report.labels import COLOURS
from meam_export.variants.ladder_figure import PANELS, ladder_figure
from meam_training.runs.options import as_flag
from meam_training.runs.run_report import own_options, start_fact, summary

__all__ = ["Block", "Section", "compared_sections", "group_section", "warning_lines"]

Studies = Mapping[Group, ActionStudy | str]
"""What each group does; or why that is not shown."""

Films = Mapping[Group, str]
"""The film of each group as a data URL, or a sentence why there is none; empty if none was asked for."""

_NAMED = 6
"""Longest list of titles in a sentence."""

_DATA_URL = "data:"


@dataclass(frozen=True)
class Block:
    """A part of a section.

    Attributes:
        title: Its heading; empty for none.
        intro: How to read it, in a sentence or two.
        pictures: Its figures.
        missing: What is missing and why, in a sentence.
        facts: Further facts by name.
        dots: Legend of dots: name, colour, and whether they are filled.
        columns: Columns of its table.
        rows: Rows of its table.
        film: Data URL of an animated image; empty for none.
        group: Whose it is, where several stand side by side.
    """

    title: str
    intro: str = ""
    pictures: Sequence[Picture] = ()
    missing: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    dots: Sequence[tuple[str, str, bool]] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    film: str = ""
    group: Group | None = None


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: Its heading.
        group: The group whose it is; None if it is of several.
        intro: What all of its parts have in common, in a sentence or two.
        warnings: Warnings of its runs, in sentences.
        keys: Groups for the legend of lines.
        blocks: Its parts, one below the other.
        side: Parts that stand side by side.
    """

    title: str
    group: Group | None = None
    intro: str = ""
    warnings: Sequence[str] = ()
    keys: Sequence[Group] = ()
    blocks: Sequence[Block] = ()
    side: Sequence[Block] = ()


def group_section(group: Group, study: ActionStudy | str, film: str) -> Section:
    """All about one group.

    Args:
        group: The group.
        study: What its policy does, or why that is not shown.
        film: Data URL of a film, why there is none, or nothing if none was asked for.
    """
    blocks = [
        _learning([group]),
        _actions(group, study, values=_has_values(study)),
        _flow(group, study),
        _diagnostics([group]),
        _export(group),
    ]
    blocks += [_film(film)] if film else []
    return Section(group.label, group, warnings=warning_lines(group), blocks=[*blocks, _settings(group)])


def compared_sections(groups: Sequence[Group], studies: Studies, films: Films) -> list[Section]:
    """The same of several groups: curves in common panels, the rest side by side."""
    warnings = [f"{group.label}: {line[0].lower()}{line[1:]}" for group in groups for line in warning_lines(group)]
    values = any(_has_values(study) for study in studies.values())
    titled = {
        "What they do at states of the data": [_actions(g, studies[g], g.label, values=values) for g in groups],
        "From noise to action": [_flow(g, studies[g], g.label) for g in groups],
        "Exported": [_export(g, g.label) for g in groups],
        "Films": [_film(films[g], g) for g in groups if films.get(g)],
        "Settings": [_settings(g, g.label) for g in groups],
    }
    learning, diagnostics = (replace(block, title="") for block in (_learning(groups), _diagnostics(groups)))
    sections = [
        Section("Learning", warnings=warnings, keys=groups, blocks=[learning]),
        Section("Diagnostics", keys=groups, blocks=[diagnostics]),
    ]
    beside = [_side_by_side(title, blocks) for title, blocks in titled.items() if blocks]
    return [sections[0], *beside[:2], sections[1], *beside[2:]]


def _side_by_side(title: str, blocks: Sequence[Block]) -> Section:
    """Blocks side by side; what all of them say is said once."""
    intros = {block.intro for block in blocks}
    if len(intros) > 1:
        return Section(title, side=blocks)
    return Section(title, intro=intros.pop(), side=[replace(block, intro="") for block in blocks])


def warning_lines(group: Group) -> list[str]:
    """The warnings of a group's runs, in sentences."""
    several = len(group.subjects) > 1
    return [
        f"{f'Seed {s.config.seed}, at' if several else 'At'} step {w.step:,}, {w.text(as_flag)}"
        for s in group.subjects
        for w in s.warnings
    ]


def _learning(groups: Sequence[Group]) -> Block:
    pictures, absent = draw_panels(LEARNING, groups)
    sentences = []
    if any(len(group.subjects) > 1 for group in groups):
        sentences.append("Lines are means of the seeds, bands go from the lowest to the highest seed.")
    if not all(map(at_common_steps, groups)):
        sentences.append(
            "Some seeds have logged other steps than the rest: only those that all of them have are drawn."
        )
    if any(subject.config.pretraining for group in groups for subject in group.subjects):
        sentences.append("The dotted line is where pretraining ends.")
    if not pictures:
        return Block("Learning curves", missing="No curves: no run here has logged any.")
    return Block("Learning curves", " ".join(sentences), pictures, _absent(absent))


def _diagnostics(groups: Sequence[Group]) -> Block:
    pictures, absent = draw_panels(DIAGNOSTICS, groups)
    facts: dict[str, str] = {}
    if len(groups) == 1:
        shown = next((s for s in groups[0].subjects if s.metrics), None)
        if shown is not None:
            facts = summary(shown.config, shown.metrics, shown.evaluations)
    missing = _absent(absent) if pictures else "No diagnostics: the log has none of them."
    return Block("Diagnostics", "", pictures, missing, facts)


def _absent(titles: Sequence[str]) -> str:
    named = "; ".join(titles[:_NAMED]) + ("; …" if len(titles) > _NAMED else "")
    return f"Not in the log, and so not drawn: {named}." if titles else ""


def _actions(
    group: Group, study: ActionStudy | str, title: str = "What it does at states of the data", *, values: bool
) -> Block:
    """What it does at the states; `values` says whether the critics' are drawn there, or in a figure beside it."""
    if isinstance(study, str):
        return Block(title, missing=study, group=group)
    alone = study.states[0].prior is None
    policy = "the prior, which acts itself" if alone else "policy"
    dots = [] if alone else [("prior", COLOURS["prior"], False)]
    if study.spec.action_dim == len(study.choice.numbers):
        intro = (
            "An action is a single number."
            if len(study.choice.numbers) == 1
            else "Shown are both numbers of an action."
        )
    else:
        numbers = " and ".join(f"{number}" for number in study.choice.numbers)
        intro = f"Shown are the numbers {numbers} of {study.spec.action_dim} of an action: {study.choice.why}."
    if study.spec.chunk_size > 1:
        intro += (
            f" Of each of {SAMPLES} chunks that were drawn, the mean of its {study.spec.chunk_size} actions is shown."
        )
    else:
        intro += f" {SAMPLES} actions were drawn."
    if values:
        intro += " Darker is higher:" if len(study.choice.numbers) == 2 else " The grey line is"
        intro += " the value to the critics, of the policy's middle chunk shifted as a whole."
    whose = f", for {study.choice.chosen_for}" if study.choice.chosen_for else ""
    intro += f" States are chosen among {study.choice.among} of the data{whose}. {study.changed}"
    return Block(
        title, intro.strip(), draw_states(group, study), dots=[*dots, (policy, group.colour, True)], group=group
    )


def _has_values(study: ActionStudy | str) -> bool:
    return not isinstance(study, str) and study.states[0].landscape is not None


def _flow(group: Group, study: ActionStudy | str, title: str = "From noise to action") -> Block:
    if isinstance(study, str):
        return Block(title, missing=study, group=group)
    alone = study.flow.prior is None
    intro = f"{PATHS} draws of noise, followed through the steps of the solver at the first of the states above."
    dots = [] if alone else [("prior", COLOURS["prior"], True)]
    named = "the prior, which acts itself" if alone else "policy"
    return Block(title, intro, draw_flow(group, study), dots=[*dots, (named, group.colour, True)], group=group)


def _export(group: Group, title: str = "The exported policy") -> Block:
    subject = next((s for s in group.subjects if s.policy is not None), None)
    if subject is None or subject.spec is None or subject.policy is None:
        return Block(title, missing="No policy folder of it is given: meam export writes one.", group=group)
    measured = {name: v for name, v in subject.spec.variants.items() if v.measured}
    facts = {"policy.onnx": f"{subject.spec.integration.nfe} evaluations, {subject.spec.integration.solver}"}
    facts["acts by"] = subject.spec.acting.describe(subject.spec.integration.best_of)
    if not measured:
        missing = "It has no measured variants, so no ladder and no latency: meam export --ladder measures them."
        return Block(title, missing=missing, facts=facts, group=group)
    record = ExportRecord.read(subject.policy, subject.spec)
    where = "the exporting machine" if record is None else record.machine
    captions = {
        "action_error": "Lower is closer to the policy as it was trained; fewer evaluations are faster.",
        "return_mean": "The return should not fall with fewer evaluations; bars are 95 % intervals.",
        "latency_p50_ms": f"Lower is faster; one inference, batch 1, one CPU thread, on {where}.",
    }
    drawn = [name for name in PANELS if any(name in v.measured for v in measured.values())]
    pictures = [
        Picture(svg(ladder_figure(measured, (name,))), f"{PANELS[name]} of every variant, by NFE.", captions[name])
        for name in drawn
    ]
    rows = []
    for name, variant in measured.items():
        shown = [variant.measured.get(figure) for figure in drawn]
        rows.append([name, f"{variant.integration.nfe}", *("\N{EN DASH}" if n is None else f"{n:.3g}" for n in shown)])
    columns = ["variant", "NFE", *(PANELS[name].split("\n")[0].split(" (")[0] for name in drawn)]
    return Block(title, "", pictures, facts=facts, columns=columns, rows=rows, group=group)


def _film(film: str, group: Group | None = None) -> Block:
    title = "A rollout" if group is None else group.label
    if film.startswith(_DATA_URL):
        return Block(title, film=film, group=group)
    return Block(title, missing=film, group=group)


def _settings(group: Group, title: str = "Settings") -> Block:
    subject = group.shown
    facts = {"method": own_options(subject.config)}
    if subject.training_data:
        facts["data"] = subject.training_data
    if subject.spec is not None:
        facts |= start_fact(subject.spec.started_from)
        spec = subject.spec
        facts["policy"] = (
            f"observations of {spec.observation_dim} numbers, actions of {spec.action_dim}, chunks of "
            f"{spec.chunk_size}, {spec.execute_steps} executed"
        )
    facts["folder" if len(group.subjects) == 1 else "folders"] = ", ".join(s.name for s in group.subjects)
    return Block(title, facts=facts, group=group)
