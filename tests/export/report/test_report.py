"""`meam report`: the page says what the files say, loads nothing, and nothing in a file becomes part of its markup."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import meam_export.report.gathering as gathering_module
import meam_export.report.page as page_module
from meam_export import export_policy
from meam_export.report.actions import GRID, Choice, choose, study_actions
from meam_export.report.contents import Section
from meam_export.report.curves import DIAGNOSTICS, LEARNING, at_common_steps, draw_panels, seed_curve
from meam_export.report.gathering import ReportOptions
from meam_export.report.groups import group_subjects
from meam_export.report.page import Report, write_report
from meam_export.report.returns import Measured, paired_gain, read_references
from meam_export.report.subject import Subject, open_subjects
from meam_policy import CheckpointError, ConfigError, FormatError, MeamPolicy, NotFoundError, OutputError
from meam_policy.cli import run
from meam_policy.spec import Integration
from meam_training import Checkpoint, OfflineDataset, TrainConfig, collect, train
from meam_training.flow.solvers import solve
from meam_training.runs.options import as_flag
from meam_training.runs.watch import RunWarning

TINY: dict[str, Any] = {
    "steps": 6,
    "hidden_dims": (8,),
    "critic_hidden_dims": (8,),
    "num_critics": 2,
    "batch_size": 8,
    "chunk_size": 2,
    "log_every": 2,
    "evaluate_every": 2,
    "evaluate_episodes": 2,
    "device": "cpu",
}
NAMES = ("me-am-0", "me-am-1", "qam-1", "bc-0")


class Parsed(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._parts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != [("style", {})]:
            self._parts.append(data)

    def images(self) -> list[tuple[str, bytes]]:
        """Media type and content of every image."""
        urls = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(url.startswith("data:image/") for url in urls)
        return [(url[5 : url.index(";")], base64.b64decode(url.split("base64,")[1])) for url in urls]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three methods, a policy of one of them, and their data."""
    root = tmp_path_factory.mktemp("runs")
    data = collect("meam/Pockets-v0", transitions=400, root=root / "data")
    dataset = OfflineDataset.from_minari(data)
    for name in NAMES:
        method, _, seed = name.rpartition("-")
        own = {"mixture_weight": 0.1} if method == "me-am" else {}
        small = TINY if method != "bc" else {n: v for n, v in TINY.items() if "critic" not in n}
        config = TrainConfig.preset(method, **small, **own, seed=int(seed))
        train(config, dataset, root / name, origin={"data": str(data)})
    export_policy(Checkpoint.load(root / "me-am-0"), root / "policy", variants=("k2", "k4"))
    return root


@pytest.fixture(scope="module")
def one(runs: Path) -> Path:
    paths = [runs / "me-am-0", runs / "me-am-1", runs / "policy"]
    return write_report(paths, runs / "one.html").path


@pytest.fixture(scope="module")
def compared(runs: Path) -> Path:
    return write_report([runs / name for name in NAMES], runs / "all.html", ReportOptions(compare=True)).path


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(runs / name, tmp_path / name))

    return copy


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the figures of their groups, which take most of the time."""
    monkeypatch.setattr(page_module, "group_section", lambda group, study, film: Section(group.label))


def subject(path: Path) -> Subject:
    return open_subjects([path])[0]


def last_return(run_folder: Path) -> float:
    with (run_folder / "evaluations.csv").open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["return_mean"])


def test_the_page_says_what_was_trained_and_what_it_returns(one: Path, runs: Path) -> None:
    text = Parsed(one).text
    returns = OfflineDataset.from_minari(runs / "data" / "meam" / "pockets-v0").episode_returns
    mean = np.mean([last_return(runs / "me-am-0"), last_return(runs / "me-am-1")])
    assert f"ME-AM returns {mean:.4g}" in text
    assert f"the data's mean of {returns.mean():.4g}" in text
    assert (
        "ME-AM (seeds 0, 1) were trained on meam/pockets-v0, 400 transitions in 20 episodes, for meam/Pockets" in text
    )
    alts = " ".join(attrs.get("alt") or "" for _, attrs in Parsed(one).tags)
    assert f"data, best tenth {np.sort(returns)[-2:].mean():.4g}" in alts
    assert f"ME-AM {mean:.4g}." in alts


def test_the_page_shows_the_ladder_of_the_exported_policy(one: Path, runs: Path) -> None:
    text, measured = Parsed(one).text, MeamPolicy.from_pretrained(runs / "policy").spec.variants["k2"].measured
    shown = [f"{measured[name]:.3g}" for name in ("action_error", "latency_p50_ms")]
    assert " ".join(["k2", "2", *shown]) in text


def test_every_caption_and_every_alternative_text_says_something(one: Path, compared: Path) -> None:
    for page in (one, compared):
        content, parsed = page.read_text(encoding="utf-8"), Parsed(page)
        images = [attrs for tag, attrs in parsed.tags if tag == "img"]
        assert len(images) > 12
        assert all(len(attrs["alt"] or "") > 20 for attrs in images)
        assert all(caption.strip().endswith(".") for caption in re.findall(r"<figcaption>(.*?)</figcaption>", content))


def test_the_page_loads_nothing(one: Path, compared: Path) -> None:
    for page in (one, compared):
        parsed, content = Parsed(page), page.read_text(encoding="utf-8")
        assert {"script", "link", "iframe", "object", "embed", "base"}.isdisjoint(tag for tag, _ in parsed.tags)
        assert not any("href" in attrs or "srcset" in attrs for _, attrs in parsed.tags)
        assert all((attrs["src"] or "").startswith("data:image/") for _, attrs in parsed.tags if "src" in attrs)
        assert "http" not in re.sub(r'src="data:[^"]*"|http-equiv', "", content)
        assert "url(" not in content
        assert "default-src 'none'; img-src data:" in content
        for kind, image in parsed.images():
            assert kind == "image/svg+xml"
            for loaded in re.findall(rb'(?:href|src)="([^"]*)"', image):
                assert loaded.startswith((b"#", b"data:image/png;base64,"))
            assert b"<script" not in image


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(one: Path, runs: Path) -> None:
    before = one.read_bytes()
    write_report([runs / "me-am-0", runs / "me-am-1", runs / "policy"], one)
    assert one.read_bytes() == before


NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)>$\\frac{{{7*7}}'


def test_no_text_of_a_file_becomes_markup(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("me-am-0")
    checkpoint = Checkpoint.load(folder).path
    (checkpoint / "hashes.json").unlink()
    spec = json.loads((checkpoint / "policy_spec.json").read_text())
    spec |= {"environment_id": NASTY, "training_data": NASTY, "action_names": [NASTY, "$x$ 関節 [<b>m/s</b>]"]}
    (checkpoint / "policy_spec.json").write_text(json.dumps(spec))
    (folder / "run.json").write_text(json.dumps({"meam_run": 1, "origin": {"data": NASTY}, "run_id": NASTY}))
    renamed = folder.rename(tmp_path / "<b onclick=x>&quot;")
    reference = tmp_path / "<i>.toml"
    reference.write_text(f"{json.dumps(NASTY)} = 1.5\n")
    written = write_report([renamed], tmp_path / "page.html", ReportOptions(reference=reference))
    parsed, clean = Parsed(written.path), unescape(NASTY)
    known = "html meta title style h1 h2 h3 p div table thead tbody tr th td small span figure figcaption img ul li"
    assert {tag for tag, _ in parsed.tags} <= {*known.split(), "dl", "dt", "dd"}
    allowed = {"lang", "charset", "name", "content", "http-equiv", "style", "class", "src", "alt"}
    assert {name for _, attrs in parsed.tags for name in attrs} <= allowed
    assert clean in parsed.text
    assert "{{7*7}}" in parsed.text
    assert "<b onclick=x>&quot;" in parsed.text
    assert all(b"onerror=alert(2)>" not in image for _, image in parsed.images())


def test_control_characters_are_shown_not_obeyed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    renamed = copied("bc-0").rename(tmp_path / "run\x1b[2J\u202e")
    written = write_report([renamed], tmp_path / "page.html")
    assert "run\\x1b[2J\\u202e" in Parsed(written.path).text


def test_a_curve_is_the_mean_of_the_seeds_with_a_band_from_the_lowest_to_the_highest(runs: Path) -> None:
    group = group_subjects(open_subjects([runs / "me-am-0", runs / "me-am-1"]))[0]
    panel = next(panel for panel in LEARNING if panel.column == "prior_loss")
    curve = seed_curve(panel, group.subjects)
    assert curve is not None
    columns = []
    for name in ("me-am-0", "me-am-1"):
        with (runs / name / "metrics.csv").open(newline="") as file:
            columns.append([float(row["prior_loss"]) for row in csv.DictReader(file)])
    np.testing.assert_allclose(curve.mean, np.mean(columns, axis=0))
    np.testing.assert_allclose(curve.low, np.min(columns, axis=0))
    np.testing.assert_allclose(curve.high, np.max(columns, axis=0))
    assert curve.steps.tolist() == [2, 4, 6]
    assert curve.seeds == 2


def test_seeds_that_have_logged_other_steps_are_drawn_where_they_agree(
    runs: Path, copied: Callable[[str], Path]
) -> None:
    folder, panel = copied("me-am-1"), next(panel for panel in LEARNING if panel.column == "prior_loss")
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:3]))
    group = group_subjects(open_subjects([runs / "me-am-0", folder]))[0]
    curve = seed_curve(panel, group.subjects)
    assert curve is not None
    assert curve.steps.tolist() == [2, 4]
    assert not at_common_steps(group)
    (folder / "metrics.csv").write_text(lines[0] + lines[1].replace("2,", "3,", 1))
    group = group_subjects(open_subjects([runs / "me-am-0", folder]))[0]
    assert seed_curve(panel, group.subjects) is None
    assert draw_panels([panel], [group]) == ([], [f"{panel.title} (logged by the seeds at no common step)"])


def test_a_checkpoint_is_shown_with_its_own_evaluation(runs: Path) -> None:
    (run_,) = open_subjects([runs / "me-am-0" / "checkpoints" / "latest"])
    assert run_.run == (runs / "me-am-0").absolute()
    found = Measured.logged(replace(run_, step=4))
    assert found is not None
    assert found.mean == run_.evaluations[1]["return_mean"]
    assert "2 evaluation episodes after step 4" in found.source


def test_the_band_of_one_runs_return_is_the_interval_over_its_episodes(runs: Path) -> None:
    panel, run_ = LEARNING[0], subject(runs / "qam-1")
    curve = seed_curve(panel, [run_])
    assert curve is not None
    row = run_.evaluations[-1]
    half = 1.96 * row["return_std"] / np.sqrt(2)
    assert curve.low[-1] == pytest.approx(row["return_mean"] - half)
    assert curve.high[-1] == pytest.approx(row["return_mean"] + half)


def test_the_used_budget_is_a_share_and_that_of_a_run_without_one_is_not_drawn(runs: Path) -> None:
    panel, run_ = next(panel for panel in DIAGNOSTICS if panel.column == "kl_average"), subject(runs / "me-am-0")
    curve = seed_curve(panel, [run_])
    assert curve is not None
    assert run_.config.kl_budget is not None
    assert curve.mean[-1] == pytest.approx(run_.metrics[-1]["kl_average"] / run_.config.kl_budget)
    assert seed_curve(panel, [subject(runs / "qam-1")]) is None


def test_every_drawn_column_is_one_that_runs_log() -> None:
    from meam_training.learning.evaluation import EVALUATION_METRICS
    from meam_training.runs.run_folder import UPDATE_COLUMNS

    logged = {"metrics": UPDATE_COLUMNS, "evaluations": EVALUATION_METRICS}
    assert all(panel.column in logged[panel.file] for panel in (*LEARNING, *DIAGNOSTICS))


def test_a_policy_is_shown_with_its_run_and_alone_it_says_what_is_missing(runs: Path, tmp_path: Path) -> None:
    (joined,) = open_subjects([runs / "policy", runs / "me-am-0"])
    assert (joined.run, joined.policy) == (runs / "me-am-0", runs / "policy")
    assert len(open_subjects([runs / "policy", runs / "me-am-1"])) == 2
    written = write_report([runs / "policy"], tmp_path / "page.html")
    text = Parsed(written.path).text
    assert "Only the policy folder is given, which has no log: give its run beside it" in text
    assert "No curves: no run here has logged any." in text
    assert "no observations of the data are at hand. Give --data" in text
    with_data = ReportOptions(data=(str(runs / "data" / "meam" / "pockets-v0"),))
    text = Parsed(write_report([runs / "policy"], tmp_path / "page.html", with_data).path).text
    assert "no observations" not in text
    assert "States are chosen among 128 of the data." in text


def test_warnings_are_those_of_the_watch(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warning = RunWarning("tau does nothing", 4, "it varies by 0.01 nats", "above 0.1", "Raise {inverse_temperature}", 2)
    monkeypatch.setattr("meam_export.report.subject.warnings_of", lambda config, rows: [warning])
    text = Parsed(write_report([runs / "qam-1"], tmp_path / "page.html").path).text
    assert f"At step 4, {warning.text(as_flag)}" in text
    assert "its runs warn of: tau does nothing." in text


@pytest.mark.usefixtures("undrawn")
def test_data_that_are_gone_or_others_are_named(runs: Path, copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("bc-0")
    record = json.loads((folder / "run.json").read_text())
    record["origin"]["data"] = "nowhere/pockets-v9"
    (folder / "run.json").write_text(json.dumps(record))
    assert "its data cannot be opened" in write_report([folder], tmp_path / "page.html").notes[0]
    other = collect("meam/Pockets-v0", transitions=100, seed=5, root=tmp_path / "data")
    notes = write_report([folder], tmp_path / "page.html", ReportOptions(data=(str(other),))).notes
    assert "are not those it was trained on: their fingerprints differ" in notes[0]
    record["origin"]["data"] = 5
    (folder / "run.json").write_text(json.dumps(record))
    assert "its data cannot be opened" in write_report([folder], tmp_path / "page.html").notes[0]
    with pytest.raises(NotFoundError):
        write_report([folder], tmp_path / "page.html", ReportOptions(data=("nowhere/pockets-v9",)))


def test_a_log_that_is_cut_off_is_named_and_a_broken_one_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("qam-1")
    log = folder / "metrics.csv"
    content = log.read_bytes()
    lines = content.splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    notes = " ".join(subject(folder).notes)
    assert "The last line of metrics.csv is only partly there, and left out." in notes
    assert "metrics.csv ends at step 2, and the checkpoint is of step 6" in notes
    log.write_bytes(content[len(content) // 2 :])
    with pytest.raises(FormatError, match=r"expected a table whose first column is step"):
        subject(folder)
    for broken in (b"step,prior_loss\n2,many\n", b"step,prior_loss\n2,\xff\xfe\n"):
        log.write_bytes(broken)
        with pytest.raises(FormatError, match=r"metrics.csv is broken"):
            subject(folder)
    log.write_bytes(b"step,prior_loss\n2,nan\n4,0.5\n")
    assert subject(folder).metrics == [{"step": 2.0}, {"step": 4.0, "prior_loss": 0.5}]
    assert "Of the numbers in metrics.csv, 1 are infinite or none" in " ".join(subject(folder).notes)
    log.unlink()
    assert "There is no metrics.csv" in " ".join(subject(folder).notes)


def test_what_is_no_run_is_refused(runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    with pytest.raises(ConfigError, match="No run is given"):
        write_report([], output)
    with pytest.raises(NotFoundError, match="There is no folder"):
        write_report([tmp_path / "nowhere"], output)
    with pytest.raises(NotFoundError, match=r"is no run and no policy: .* It holds bc-0, me-am-0"):
        write_report([runs], output)
    with pytest.raises(NotFoundError, match="`meam train` writes runs"):
        write_report([tmp_path], output)
    with pytest.raises(NotFoundError, match="is a file"):
        write_report([runs / "one.py", runs / "qam-1" / "metrics.csv"][1:], output)
    with pytest.raises(ConfigError, match="is given twice"):
        write_report([runs / "qam-1", runs / "." / "qam-1"], output)
    assert not output.exists()


def test_two_runs_of_one_seed_are_refused(runs: Path, copied: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both QAM with seed 1, which an interval over seeds would count twice"):
        write_report([runs / "qam-1", copied("qam-1")], tmp_path / "page.html")


def test_a_broken_checkpoint_is_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("qam-1")
    (Checkpoint.load(folder).path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        write_report([folder], tmp_path / "page.html")


@pytest.mark.usefixtures("undrawn")
def test_only_a_page_of_its_own_is_replaced(runs: Path, one: Path, tmp_path: Path) -> None:
    output = tmp_path / "page.html"
    output.write_text("mine")
    with pytest.raises(OutputError, match="is there already, and is no page that `meam report` wrote"):
        write_report([runs / "bc-0"], output)
    assert output.read_text() == "mine"
    with pytest.raises(OutputError, match="is a folder"):
        write_report([runs / "bc-0"], tmp_path)
    with pytest.raises(OutputError, match="There is no folder"):
        write_report([runs / "bc-0"], tmp_path / "nowhere" / "page.html")
    shutil.copy(one, output)
    write_report([runs / "bc-0"], output)
    assert "BC flow" in Parsed(output).text


def test_comparisons_that_make_no_sense_are_refused(runs: Path, tmp_path: Path, copied: Callable[[str], Path]) -> None:
    output, compare = tmp_path / "page.html", ReportOptions(compare=True)
    with pytest.raises(ConfigError, match="nothing to compare"):
        write_report([runs / "me-am-0", runs / "me-am-1"], output, compare)
    folder = copied("qam-1")
    checkpoint = Checkpoint.load(folder).path
    (checkpoint / "hashes.json").unlink()
    spec = (checkpoint / "policy_spec.json").read_text()
    (checkpoint / "policy_spec.json").write_text(spec.replace("meam/Pockets-v0", "Pendulum-v1"))
    with pytest.raises(ConfigError, match=r"--compare draws runs of one task; these are of 2"):
        write_report([folder, runs / "me-am-0"], output, compare)
    with pytest.raises(ConfigError, match="episodes is -1"):
        ReportOptions(episodes=-1)


def test_methods_are_compared_on_the_seeds_that_they_share(runs: Path, compared: Path) -> None:
    groups = group_subjects(open_subjects([runs / name for name in NAMES]))
    assert [group.label for group in groups] == ["ME-AM", "QAM", "BC flow"]
    measured = {s: Measured(float(s.config.seed), None, None, "") for group in groups for s in group.subjects}
    measured[groups[1].subjects[0]] = Measured(0.25, None, None, "")
    assert paired_gain(groups[0], groups[1], measured) == (
        "ME-AM returns 0.75 more than QAM, on the one seed that both have."
    )
    assert "(seed 1) and BC flow (seed 0) have no seed in common" in paired_gain(groups[1], groups[2], measured)
    text = Parsed(compared).text
    assert "ME-AM, QAM and BC flow: meam/Pockets-v0" in text
    assert "ME-AM (seeds 0, 1), QAM (seed 1) and BC flow (seed 0) were trained on" in text


def test_references_are_named_figures(tmp_path: Path) -> None:
    file = tmp_path / "reference.toml"
    file.write_text('"random policy" = 1\nexpert = [3.0, 2.5, 3.5]\n')
    random, expert = read_references(file)
    assert (random.label, random.mean, random.low) == ("random policy", 1.0, None)
    assert (expert.mean, expert.low, expert.high) == (3.0, 2.5, 3.5)
    for wrong in ("a = 'x'", "a = [1, 2]", "a = [1.0, 2.0, 3.0]", "a = nan", "a = true", "[a]\nb = 1", ""):
        file.write_text(wrong)
        with pytest.raises(ConfigError):
            read_references(file)
    with pytest.raises(NotFoundError):
        read_references(tmp_path / "nowhere.toml")


def test_the_two_numbers_are_those_that_the_critics_values_depend_on(runs: Path) -> None:
    run_ = subject(runs / "me-am-0")
    observations = run_.observations
    assert run_.networks is not None
    assert observations is not None
    size = run_.networks.policy.layers[-1].out_features  # pyright: ignore[reportOptionalMemberAccess]
    assert size == 4  # two actions of two numbers
    run_.networks.known_value = lambda observation, chunk: chunk.unflatten(-1, (2, 2))[..., 1].mean(dim=-1)
    choice = choose(run_, observations)
    assert choice.numbers == (0, 1)
    study = study_actions(run_, replace(choice, numbers=(1,)))
    # The value is the mean of the number that is moved, so the landscape is the axis.
    for state in study.states:
        assert state.landscape is not None
        np.testing.assert_allclose(state.landscape, np.linspace(-1, 1, GRID), atol=1e-5)


@pytest.mark.parametrize("integration", [Integration(8, "rk4"), Integration(6, "heun"), Integration(3, "ab2")])
def test_the_paths_of_the_flow_are_its_solvers_states(runs: Path, integration: Integration) -> None:
    run_ = subject(runs / "me-am-0")
    networks, observations = run_.networks, run_.observations
    assert networks is not None
    assert observations is not None
    networks.integration, networks.confine = integration, False
    choice = Choice(torch.from_numpy(observations[:1]), (("", ""),), (0, 1), "", 1)
    flow = study_actions(run_, choice).flow
    field = networks.deployed.condition(networks.encoder(choice.observations).expand(flow.policy.shape[1], -1))
    assert flow.times.tolist() == list(integration.times)
    scale, offset = (np.array(values) for values in (run_.spec.action_scale, run_.spec.action_offset))  # pyright: ignore[reportOptionalMemberAccess]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        torch.randn(300, 4, generator=generator)  # the samples of the policy and of the prior
        torch.randn(300, 4, generator=generator)
        noise = torch.randn(flow.policy.shape[1], 4, generator=generator)
        for k in range(1, len(flow.times) + 1):
            velocity = lambda x, t: field(x, torch.full((len(x), 1), t))  # noqa: E731
            x = solve(velocity, noise, integration.times[:k], integration.solver)
            expected = offset + scale * x.unflatten(-1, (2, 2)).mean(dim=1).numpy()
            np.testing.assert_allclose(flow.policy[k - 1], expected, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_the_command_writes_the_page_and_says_what_is_missing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    assert run(["report", str(runs / "qam-1"), "--output", str(output), "--episodes", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (group,) = printed["groups"]
    assert (group["label"], group["task"], group["seeds"]) == ("QAM", "meam/Pockets-v0", [1])
    assert group["return_low"] <= group["return_mean"] <= group["return_high"]
    assert "2 episodes run for this report" in Parsed(output).text
    assert run(["report", str(tmp_path), "--output", str(output)]) == 2
    assert run(["report", "--output", str(output)]) == 2


@pytest.mark.slow
def test_what_cannot_be_filmed_says_why(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def films(size: int | None) -> str:
        def render(policy: Path, file: Path, seed: int, packages: tuple[str, ...]) -> str | None:
            if size is not None:
                file.write_bytes(b"x" * size)
            return "No film: no GL." if size is None else None

        monkeypatch.setattr(gathering_module, "render_film", render)
        written: Report = write_report([runs / "bc-0"], tmp_path / "page.html", ReportOptions(film=True))
        return written.path.read_text(encoding="utf-8")

    assert "No film: no GL." in films(None)
    assert "No film: it has 4.0 MiB, more than the 3 of a page." in films(2**22)
    assert 'src="data:image/webp;base64,eHh4' in films(9)


@pytest.mark.slow
def test_a_rollout_of_a_run_and_of_a_policy_is_filmed(runs: Path, tmp_path: Path) -> None:
    for folder in ("policy", "bc-0"):
        options = ReportOptions(film=True, data=(str(runs / "data" / "meam" / "pockets-v0"),))
        written = write_report([runs / folder], tmp_path / "page.html", options)
        films = [image for kind, image in Parsed(written.path).images() if kind == "image/webp"]
        assert [film[:4] + film[8:12] for film in films] == [b"RIFFWEBP"]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [360, 900])
@pytest.mark.parametrize("which", ["one", "compared"])
def test_a_browser_shows_all_figures_within_its_width(
    which: str, width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page: Path = request.getfixturevalue(which)
    assert CHROMIUM is not None
    # Windows are never narrower than 500 pixels; frames are. The page forbids scripts of its own, so this one measures.
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(
        f"""<iframe src="{page.as_uri()}" style="width: {width}px; height: 900px; border: 0"></iframe>
        <pre></pre><script>
        addEventListener("load", () => {{
          const seen = document.querySelector("iframe").contentDocument;
          const images = [...seen.images].map(image => [image.complete && image.naturalWidth > 0,
            image.getBoundingClientRect().width, image.getBoundingClientRect().right]);
          const over = [...seen.querySelectorAll("p, h1, h2, h3, figcaption, dd, li")].filter(
            part => part.getBoundingClientRect().right > {width} + 1).length;
          document.querySelector("pre").textContent = JSON.stringify(
            [seen.documentElement.scrollWidth, over, images]);
        }});</script>"""
    )
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1000"]
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    scroll_width, over, images = json.loads(found[1])
    assert scroll_width <= width
    assert over == 0
    assert len(images) > 12
    for loaded, drawn, right in images:
        assert loaded
        assert right <= width
        assert drawn > 200
