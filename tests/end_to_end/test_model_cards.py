"""The policies of `model_cards/`: they load from a clone, and their cards say what was measured of them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from huggingface_hub import ModelCard

from meam_export.card.write import write_card
from meam_export.demo.tasks import TASKS
from meam_policy import EnvironmentSpec, MeamPolicy, PolicySpec
from meam_policy.cli import run
from meam_policy.diagnosis.verify import verify_policy
from meam_policy.folder.policy_folder import read_spec

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
    settings = json.loads(TASKS[name].config("me-am", seed=0).resolved().to_json())
    assert settings.pop("reward_offset") is None  # there was none when they were made
    assert dict(policy.spec.hyperparameters) == settings
    report = verify_policy(f"model_cards/{name}")
    assert report.failure is None
    assert len(report.graphs) > 1


@policies
def test_the_hub_reads_the_front_matter(name: str) -> None:
    found: Any = ModelCard(card(name)).data
    spec = MeamPolicy.from_pretrained(f"model_cards/{name}").spec
    assert (found.library_name, found.pipeline_tag, found.license) == ("meam-policy", "robotics", "apache-2.0")
    assert found.datasets is None  # they were made by the demo, here
    assert f"on `{spec.training_data}`" in card(name)
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


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], dict[str, Any]]:
    """Runs the recipe of a graph's identity, of docs/policy-folder.md, on a policy folder; what it defines."""
    page = (ROOT / "docs" / "policy-folder.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- test: identity -->\n```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)

    def run_recipe(folder: Path) -> dict[str, Any]:
        (tmp_path / "policies").mkdir()
        (tmp_path / "policies" / "arm").symlink_to(folder)
        monkeypatch.chdir(tmp_path)
        space: dict[str, Any] = {}
        exec(compile(code, "recipe", "exec"), space)
        return space

    return run_recipe


@policies
def test_the_recipe_of_the_page_gives_the_identity_that_every_graph_carries(
    name: str, recipe: Callable[[Path], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ROOT / "model_cards" / name
    recipe(folder)
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    spec = read_spec(folder)
    graphs = {"policy": "policy.onnx", **{variant: each.file for variant, each in spec.variants.items()}}
    carried = {
        graph: {entry.key: entry.value for entry in onnx.load(folder / file).metadata_props}["spec_sha256"]
        for graph, file in graphs.items()
    }
    assert told == carried
    assert len(set(told.values())) == len(set(graphs.values())) == 3


def test_the_recipe_of_the_page_holds_for_every_field_and_for_earlier_files(
    recipe: Callable[[Path], dict[str, Any]],
) -> None:
    space = recipe(ROOT / "model_cards" / "pockets")
    config = space["config"]
    grid = {"nfe": 2, "solver": "euler", "time_grid": [0, 0.25, 1], "best_of": 3}
    # An error against a policy of another best_of is none.
    unmeasured = {name: {**variant, "measured": {}} for name, variant in config["variants"].items()}
    changes: list[dict[str, Any]] = [
        {"control_rate_hz": 10, "observation_mean": [0, 1, 2, 3], "action_scale": [1, 2], "license": "Ünlicense"},
        {"action": {**config["action"], "low": [-1, -1], "high": [1, 1]}, "observation_offset": [10**6, 0, 0, 0.5]},
        {"environment": {**EnvironmentSpec("meam/Pockets-v0", {"north": 2}).to_json()}, "hyperparameters": {"a": 1}},
        {**grid, "variants": {**unmeasured, "grid": {**unmeasured["k1"], **grid}}},
    ]
    earlier = {name: value for name, value in config.items() if name not in ("license", "variants", "time_grid")}
    earlier["flow_steps"] = earlier.pop("nfe")
    for changed in (*({**config, **change} for change in changes), earlier):
        spec = PolicySpec.from_object(changed)
        for variant in (None, *changed.get("variants", ())):
            assert space["spec_sha256"](changed, variant) == spec.select(variant)[0].identity_in(changed)


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
