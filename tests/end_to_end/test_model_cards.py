"""The policies of `model_cards/`: they load from a clone, and their cards say what was measured of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from meam_export.card.write import write_card
from meam_export.demo.tasks import TASKS
from meam_policy import MeamPolicy
from meam_policy.cli import run
from meam_policy.diagnosis.verify import verify_policy

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1_000_000

policies = pytest.mark.parametrize("name", sorted(TASKS))


@pytest.fixture(autouse=True)
def in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def card(name: str) -> str:
    return Path("model_cards", name, "README.md").read_text(encoding="utf-8")


def test_every_demo_task_has_one_small_policy() -> None:
    folders = sorted(path.name for path in Path("model_cards").iterdir() if path.is_dir() and path.name != "results")
    assert folders == sorted(TASKS)
    for name in folders:
        assert sum(path.stat().st_size for path in Path("model_cards", name).iterdir()) <= MOST_BYTES
        assert f"]({name}/README.md)" in Path("model_cards/README.md").read_text(encoding="utf-8")


@policies
def test_the_policy_loads_and_acts_as_it_was_exported(name: str) -> None:
    policy = MeamPolicy.from_pretrained(f"model_cards/{name}")
    assert policy.spec.environment_id == TASKS[name].environment_id
    settings = json.loads(TASKS[name].config("me-am", seed=0).to_json())
    assert dict(policy.spec.hyperparameters) == settings
    report = verify_policy(f"model_cards/{name}")
    assert report.failure is None
    assert len(report.graphs) > 1


@policies
def test_the_hub_reads_the_front_matter(name: str) -> None:
    found: Any = ModelCard(card(name)).data
    spec = MeamPolicy.from_pretrained(f"model_cards/{name}").spec
    assert (found.library_name, found.pipeline_tag, found.license) == ("meam-policy", "robotics", "apache-2.0")
    assert found.datasets == [spec.training_data]
    assert {"onnx", "me-am", spec.environment_id} <= set(found.tags or ())
    results = found.eval_results
    assert {result.metric_type for result in results} == {"mean_reward", "success_rate"}
    assert {result.dataset_type for result in results} == {spec.environment_id}
    assert all((result.metric_args or {})["episodes"] == 100 for result in results)
    assert ModelCard(str(ModelCard(card(name)))).data.to_dict() == found.to_dict()


@policies
def test_the_card_is_what_the_command_writes_of_the_results(name: str, tmp_path: Path) -> None:
    copy = tmp_path / name
    shutil.copytree(ROOT / "model_cards" / name, copy)
    write_card(copy, [f"model_cards/results/{name}.json"])
    assert (copy / "README.md").read_text(encoding="utf-8") == card(name)


@policies
def test_what_the_card_shows_is_there(name: str) -> None:
    text = card(name)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert Path("model_cards", name, target).is_file()
    assert "![" in text
    for heading in (
        "Act",
        "Inputs and outputs",
        "How it acts",
        "Results",
        "Variants",
        "Training",
        "Intended use",
        "Limits",
    ):
        assert f"\n## {heading}\n" in text


@policies
def test_the_snippet_of_the_card_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", card(name), re.DOTALL | re.MULTILINE)
    exec(compile(snippet.replace("episodes=20", "episodes=1"), "card", "exec"), {})
    assert "return_mean" in capsys.readouterr().out


@pytest.mark.slow
@policies
def test_the_command_of_the_card_measures_what_it_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco")
    lines = re.findall(r"^meam (eval .*)$", card(name), re.MULTILINE)
    assert lines
    told = json.loads(Path(f"model_cards/results/{name}.json").read_bytes())
    for line in lines:
        assert run([*shlex.split(line, comments=True), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["config_sha256"] == told["config_sha256"]
        for again, row in zip(found["rules"], told["rules"], strict=True):
            # The same bits on the same machine; on another one they may part within an episode.
            assert row["ci_low"] <= again["return_mean"] <= row["ci_high"]
