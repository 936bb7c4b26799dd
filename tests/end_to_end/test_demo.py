"""The demo at toy size: its stages, its report, its refusals."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from meam_export.commands.demo import COLUMNS, cells, demo
from meam_export.demo.figures import curves, direction_shares, rewarding_directions
from meam_export.demo.report import write_report, write_runs
from meam_export.demo.run import DemoResult, run_demo
from meam_export.demo.tasks import METHODS, TASKS, DemoTask
from meam_export.report.film import render_film
from meam_export.report.labels import method_labels
from meam_policy import ConfigError, MeamPolicy, OutputError
from meam_policy.console import print_table

SMALL = {"hidden_dims": (16,), "critic_hidden_dims": (16,), "num_critics": 2, "batch_size": 16, "log_every": 2}


def toy(name: str) -> DemoTask:
    task = TASKS[name]
    steps = {method: {"steps": 6} for method in METHODS}
    settings = {**SMALL, "chunk_size": task.settings["chunk_size"]}
    return replace(task, transitions=1000, settings=settings, method_settings=steps, episodes=2)


def silent(description: str, total: int) -> nullcontext[Callable[..., None]]:
    return nullcontext(lambda *args: None)


def words(report: Path) -> str:
    """The text that a reader of the report sees, in one line."""
    html = report.read_text(encoding="utf-8").split("</style>")[1]
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def legend(result: DemoResult) -> list[str]:
    """Labels of the policies' losses in the figure of the training curves."""
    axes = curves(result).axes[2]
    return [str(line.get_label()) for line in axes.get_lines()]


@pytest.fixture(scope="module")
def pockets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DemoResult]:
    folder = tmp_path_factory.mktemp("demo") / "pockets"
    return folder, run_demo(toy("pockets"), folder, seed=3, episodes=None, progress=silent)


@pytest.fixture(scope="module")
def report(pockets: tuple[Path, DemoResult], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(pockets[1], tmp_path_factory.mktemp("report") / "report.html", video=False)


def test_the_table_has_the_data_and_every_method_with_its_figures(pockets: tuple[Path, DemoResult]) -> None:
    found = pockets[1].to_json()
    assert [row["method"] for row in found["table"]] == ["data", "bc", "qam", "me-am"]
    assert MeamPolicy.from_pretrained(found["policy"]).spec.method == "me-am"
    assert found["env_id"] == "meam/Pockets-v0"
    columns = {"method", "acting", "return_mean", "ci_low", "ci_high", "success", "latency_p50_ms", "latency_p99_ms"}
    for row in found["table"]:
        assert set(row) == columns
        assert row["acting"] == (None if row["method"] == "data" else "sample")
        assert row["ci_low"] <= row["return_mean"] <= row["ci_high"]
    assert all(row["latency_p99_ms"] >= row["latency_p50_ms"] > 0 for row in found["table"][1:])


def test_the_data_row_is_computed_from_the_recorded_rewards(pockets: tuple[Path, DemoResult]) -> None:
    row, dataset = pockets[1].table[0], pockets[1].dataset
    returns = dataset.rewards.reshape(-1, 20)
    assert row["return_mean"] == pytest.approx(returns.sum(axis=1).mean())
    assert row["success"] == pytest.approx((returns.max(axis=1) == 1.0).mean())


@pytest.mark.slow
def test_a_finished_demo_is_not_done_twice(pockets: tuple[Path, DemoResult]) -> None:
    folder, first = pockets
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    again = run_demo(toy("pockets"), folder, seed=3, episodes=None, progress=silent)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert [row["return_mean"] for row in again.table] == [row["return_mean"] for row in first.table]


def test_a_folder_with_another_demo_or_anything_else_is_refused(
    pockets: tuple[Path, DemoResult], tmp_path: Path
) -> None:
    folder, result = pockets
    with pytest.raises(OutputError, match="other settings"):
        run_demo(toy("pockets"), folder, seed=4, episodes=None, progress=silent)
    with pytest.raises(OutputError, match="already holds a policy"):
        run_demo(toy("pockets"), result.policy, seed=3, episodes=None, progress=silent)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else"):
        run_demo(toy("pockets"), tmp_path, seed=3, episodes=None, progress=silent)
    with pytest.raises(OutputError, match="cannot be written"):
        run_demo(toy("pockets"), tmp_path / "notes.txt" / "demo", seed=3, episodes=None, progress=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="episodes is 0"):
        run_demo(toy("pockets"), tmp_path / "new", seed=3, episodes=0, progress=silent)


@pytest.mark.slow
def test_the_report_is_one_file_that_needs_no_network(pockets: tuple[Path, DemoResult], report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", html)
    for row in pockets[1].table:
        assert f"{row['return_mean']:.2f}" in html


@pytest.mark.slow
def test_the_page_about_the_runs_has_the_returns_of_the_table(pockets: tuple[Path, DemoResult], tmp_path: Path) -> None:
    page = write_runs(pockets[1], tmp_path / "runs.html")
    text = unescape(words(page))
    for row in pockets[1].table[1:]:
        figures = f"{row['return_mean']:.4g} (95 %: {row['ci_low']:.4g} … {row['ci_high']:.4g})"
        assert f"{pockets[1].labels[row['method']]} returns {figures}" in text.replace("returns most,", "returns")
    assert f"the data's mean of {pockets[1].table[0]['return_mean']:.4g}" in text
    assert "2 episodes run for this report" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', page.read_text(encoding="utf-8"))
    assert all(source.startswith("data:image/") for source in sources)


@pytest.mark.slow
@pytest.mark.parametrize("episodes", [1, 2])
def test_the_report_says_how_many_episodes_were_run_and_drawn(
    pockets: tuple[Path, DemoResult], report: Path, tmp_path: Path, episodes: int
) -> None:
    if episodes == 1:
        result = run_demo(toy("pockets"), pockets[0], seed=3, episodes=1, progress=silent)
        report = write_report(result, tmp_path / "report.html", video=False)
    text = words(report)
    noun = "episode" if episodes == 1 else "episodes"
    assert f"means over {episodes} {noun} of every policy, and over the 50 recorded episodes of the data." in text
    assert "Every policy acted by its rule: sample." in text
    assert f"20 of the data, {episodes} of BC flow, {episodes} of QAM, {episodes} of ME-AM. Dots" in text
    asked = " --episodes 1" if episodes == 1 else ""
    assert f"meam demo --task pockets --seed 3{asked} 3 flow policies were trained on 1,000 recorded" in text
    assert not re.search(r"(?i)twenty|three|goal", text)


@pytest.mark.slow
def test_the_report_names_methods_and_losses_after_their_settings(
    pockets: tuple[Path, DemoResult], report: Path, tmp_path: Path
) -> None:
    task = toy("pockets")
    steps = {**task.method_settings, "me-am": {**task.method_settings["me-am"], "objective": "adjoint"}}
    result = run_demo(replace(task, method_settings=steps), tmp_path / "demo", seed=3, episodes=1, progress=silent)
    text = words(write_report(result, tmp_path / "report.html", video=False))
    assert "ME-AM (objective adjoint)" in text
    assert "ME-AM (" not in words(report)
    assert legend(result) == ["QAM: adjoint matching", "ME-AM: adjoint matching"]
    assert legend(pockets[1]) == ["QAM: adjoint matching", "ME-AM: weights early, adjoint late"]


@pytest.mark.slow
def test_the_report_lists_the_settings_that_leave_the_presets(report: Path) -> None:
    text = words(report)
    everyone = text.split("all methods ")[1]
    assert "chunk size 5" in everyone
    assert "hidden dims 16" in everyone
    assert "batch size 16" in everyone


def test_the_printed_table_fits_a_terminal_and_says_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    task = TASKS["pointmaze"]
    configs = {method: task.config(method, 0) for method in METHODS}
    configs["me-am"] = configs["me-am"].changed(objective="adjoint")
    labels = method_labels(configs)
    row = dict.fromkeys(("return_mean", "ci_low", "ci_high"), -1000.0) | {"success": 1.0}
    row |= {"latency_p50_ms": 12.345, "latency_p99_ms": 12.345}
    print_table("", COLUMNS, [cells(label, row) for label in labels.values()])
    printed = capsys.readouterr().out
    assert "(objective adjoint)" in printed
    assert printed.count("-1000.00 … -1000.00") == len(METHODS)


def test_the_tables_of_the_benchmark_name_the_methods_as_the_demo_does() -> None:
    readme = (Path(__file__).parents[2] / "benchmarks" / "demo" / "README.md").read_text(encoding="utf-8")
    for task in TASKS.values():
        section = readme.split(f"## {task.environment_id}")[1].split("\n## ")[0]
        rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")][2:]
        labels = method_labels({method: task.config(method, 0) for method in METHODS})
        assert rows == ["data", *labels.values()]


def test_the_help_names_the_default_episodes_of_every_task() -> None:
    counts = ", ".join(f"{task.episodes} in {name}" for name, task in TASKS.items())
    assert f"by default {counts}." in (demo.__doc__ or "")


@pytest.mark.slow
def test_a_video_that_is_not_made_says_why(tmp_path: Path) -> None:
    why = render_film(tmp_path / "nowhere", tmp_path / "rollout.webp", seed=0)
    assert why is not None
    assert f"{tmp_path / 'nowhere'} does not exist" in why


def test_directions_are_counted_by_the_largest_component() -> None:
    actions = np.array([[-1.0, 0.1], [0.9, 0.2], [0.1, 0.8], [0.2, -0.3]])
    assert direction_shares(actions) == {"west": 0.25, "east": 0.25, "north": 0.25, "south": 0.25}


def test_the_goal_of_the_maze_lies_north_of_the_state_that_is_drawn() -> None:
    task = TASKS["pointmaze"]
    assert rewarding_directions(task.environment_id, task.state) == {"north": "★ goal"}


@pytest.mark.slow
# So few steps are of one episode, and never reach the goal.
@pytest.mark.filterwarnings("ignore:Every reward in the data is", "ignore:No episode ends in the data")
def test_the_maze_task_goes_the_whole_way(tmp_path: Path) -> None:
    result = run_demo(toy("pointmaze"), tmp_path / "demo", seed=0, episodes=1, progress=silent)
    assert len(result.table) == 4
    assert result.table[1]["return_mean"] >= -1000
    write_report(result, tmp_path / "report.html", video=True)


@pytest.mark.slow
def test_ctrl_c_leaves_no_traceback_and_a_demo_that_goes_on(tmp_path: Path) -> None:
    import signal
    import time

    # Networks of the toy's size, in a demo as long as any.
    small = """
import sys
from dataclasses import replace
from meam_export.commands import demo
from meam_policy.cli import run
task = demo.TASKS["pockets"]
settings = {**task.settings, "hidden_dims": (16,), "batch_size": 16, "checkpoint_every": 10}
demo.TASKS = {"pockets": replace(task, transitions=1000, settings=settings)}
sys.exit(run(["demo", "--task", "pockets", "--output-dir", sys.argv[1]]))
"""
    command = [sys.executable, "-c", small, str(tmp_path / "demo")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "demo" / "runs" / "bc" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step_*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    *stages, last = stderr.splitlines()
    assert last == "meam: interrupted; what was finished is kept."
    assert stages[9] == "Recording meam/Pockets-v0: 1000 of 1000"
    assert all(line.startswith("Training bc: ") for line in stages[10:])
    assert not list((tmp_path / "demo").rglob("*.tmp"))
