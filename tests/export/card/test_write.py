"""`meam card`: what `meam eval --json` measured of a policy, on the policy's card."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file, save

import meam_export.card.write as write_module
from meam_export import export_policy
from meam_export.card.export_record import ExportRecord
from meam_export.card.render import render_card
from meam_export.card.write import write_card
from meam_policy import ConfigError, FormatError, IntegrityError, MeamPolicy, NotFoundError, OutputError, __version__
from meam_policy.cli import run
from meam_policy.diagnosis.machine import cpu_model
from meam_policy.folder.policy_folder import read_config, sha256
from meam_training import OfflineDataset, TrainConfig, train

TINY = {"steps": 2, "hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "chunk_size": 2}

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A barely trained policy for Pendulum-v1, with two variants."""
    generator, folder = np.random.default_rng(0), tmp_path_factory.mktemp("exported")
    observations = generator.uniform(-1, 1, (60, 3)).astype(np.float32)
    dataset = OfflineDataset.from_arrays(
        observations=observations,
        actions=generator.uniform(-2, 2, (60, 1)),
        rewards=generator.normal(size=60),
        next_observations=observations,
        terminations=np.zeros(60),
        truncations=np.arange(60) % 20 == 19,
        dataset_id="tests/pendulum-v0",
        environment_id="Pendulum-v1",
        action_space=gymnasium.spaces.Box(-2.0, 2.0, (1,)),
        observation_space=gymnasium.make("Pendulum-v1").observation_space,
    )
    checkpoint = train(TrainConfig.preset("me-am", **TINY), dataset, folder / "run")
    return export_policy(checkpoint, folder / "policy", variants=("k2", "best-of-2"), license="MIT").folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, "pendulum")
    return Path("pendulum")


@pytest.fixture
def evaluated(folder: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `meam eval --json`, keeps what it prints in a file, and returns that."""

    def evaluate(name: str = "r.json", *arguments: str, policy: Path = folder) -> dict[str, Any]:
        assert run(["eval", str(policy), "--episodes", "2", *arguments, "--json"]) == 0
        text = capfd.readouterr().out
        Path(name).write_text(text)
        return json.loads(text)

    return evaluate


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_card_holds_what_was_measured_and_nothing_else_changes(folder: Path, evaluated: Run) -> None:
    before, found = contents(folder), evaluated("r.json", "--seed", "7")
    assert run(["card", str(folder), "--results", "r.json"]) == 0
    after = contents(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"README.md"}
    card = ModelCard.load(folder / "README.md")
    front: Any = card.data
    interval = f"{found['return_mean']:.4g} ({found['ci_low']:.4g} … {found['ci_high']:.4g})"
    assert f"| Pendulum-v1 | sample | policy | 2 (seeds 7 … 8) | {interval} |" in card.text
    how = f"meam-policy {__version__}, CPUExecutionProvider on {cpu_model()}"
    assert f"\n# {how}\nmeam eval pendulum --episodes 2 --seed 7\n" in card.text
    (result,) = front.eval_results
    assert (result.task_type, result.dataset_type, result.metric_type) == (
        "reinforcement-learning",
        "Pendulum-v1",
        "mean_reward",
    )
    assert result.metric_value == found["return_mean"]
    ends = {"confidence": 0.95, "low": found["ci_low"], "high": found["ci_high"]}
    assert result.metric_args == {"acting": "sample", "episodes": 2, "seed": 7, "version": __version__, **ends}
    assert (front.datasets, front.license) == (None, "mit")
    assert MeamPolicy.from_pretrained(folder).config_sha256 == sha256(after["config.json"]) == found["config_sha256"]


def test_data_sets_of_the_hub_are_named_if_their_ids_are_given(
    folder: Path, evaluated: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluated()
    before = contents(folder)
    assert run(["card", str(folder), "--results", "r.json", "--datasets", "a/b/c"]) == 2
    assert "datasets has 'a/b/c'; expected ids on the Hub" in capfd.readouterr().err
    assert contents(folder) == before
    assert run(["card", str(folder), "--results", "r.json", "--datasets", "owner/pendulum", "owner/more"]) == 0
    front: Any = ModelCard.load(folder / "README.md").data
    assert front.datasets == ["owner/pendulum", "owner/more"]


def test_rules_and_variants_are_rows_of_one_table(folder: Path, evaluated: Run) -> None:
    rules = evaluated("a.json", "--acting", "sample", "zero", "best-of-2")
    evaluated("b.json", "--variant", "k2")
    assert run(["card", str(folder), "--results", "a.json", "b.json"]) == 0
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("\n| Pendulum-v1 | ") == 4
    assert "| Pendulum-v1 | best-of-2 | best-of-2 | 2 (seeds 0 … 1) |" in card
    assert "| Pendulum-v1 | sample | k2 | 2 (seeds 0 … 1) |" in card
    gain = rules["rules"][1]
    assert f"| {gain['gain_low']:.4g} … {gain['gain_high']:.4g} over sample |" in card
    assert "\nmeam eval pendulum --episodes 2 --seed 0 --acting sample zero best-of-2\n" in card
    assert "\nmeam eval pendulum --episodes 2 --seed 0 --variant k2\n" in card
    front: Any = ModelCard(card).data
    assert len(front.eval_results) == 4


@pytest.mark.parametrize("options", [(), ("--max-episode-steps", "3", "--env-kwargs", '{"g": 2}')])
def test_the_command_on_the_card_measures_the_same_again(
    folder: Path, options: tuple[str, ...], evaluated: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    found = evaluated("r.json", "--acting", "best-of-2", "--num-envs", "2", "--seed", "3", *options)
    (evaluation,) = write_card(folder, ["r.json"])
    assert run([*shlex.split(evaluation.command)[1:], "--json"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert {**again, "latency_p50_ms": 0, "latency_p99_ms": 0, "variant": 0} == {
        **found,
        "latency_p50_ms": 0,
        "latency_p99_ms": 0,
        "variant": 0,
    }


def test_the_snippet_of_a_written_card_acts(folder: Path, evaluated: Run, capfd: pytest.CaptureFixture[str]) -> None:
    evaluated()
    write_card(folder, ["r.json"])
    snippet = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    exec(compile(snippet.replace("episodes=20", "episodes=1"), "card", "exec"), {})
    assert "return_mean" in capfd.readouterr().out


@pytest.mark.parametrize("environment", [True, False])
def test_the_snippet_of_an_exported_card_acts(
    folder: Path, environment: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    if not environment:
        text = render_card(replace(read_config(folder).spec, environment_id=None), None)
    snippet = text.split("```python\n")[1].split("```")[0].replace("path/or/repo-id", str(folder))
    exec(compile(snippet.replace("episodes=20", "episodes=1"), "card", "exec"), {})
    assert capfd.readouterr().out.strip()


def test_what_is_not_in_the_folder_is_said(folder: Path, evaluated: Run) -> None:
    evaluated()
    (folder / "model.safetensors").unlink()
    write_card(folder, ["r.json"])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Exported, but not in this folder: `model.safetensors`." in text


def test_the_same_results_give_the_same_card(folder: Path, evaluated: Run) -> None:
    evaluated()
    cards = [(write_card(folder, ["r.json"]), (folder / "README.md").read_bytes())[1] for _ in range(2)]
    assert cards[0] == cards[1]


def test_results_of_another_export_are_refused(folder: Path, evaluated: Run, tmp_path: Path) -> None:
    shutil.copytree(folder, "other")
    config = json.loads((folder / "config.json").read_text())
    config["acting"]["noise_scale"] = 0.5
    Path("other/config.json").write_text(json.dumps(config))
    evaluated("r.json", policy=Path("other"))
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"r.json is of another policy.*it measured other.*expected"):
        write_card(folder, ["r.json"])
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"return_mean": None}, "\"return_mean\" is 'None'; expected a finite number"),
        ({"return_mean": 1e9}, "a mean within its interval"),
        ({"return_mean": True}, "\"return_mean\" is 'True'"),
        ({"success": 1.5}, "a share from 0 to 1"),
        ({"episodes": 0}, "one or more episodes"),
        ({"episodes": "2"}, "expected a whole number"),
        ({"variant": "k9"}, "\"variant\" is 'k9'; expected one of k2, best-of-2"),
        ({"machine": "a\n| b |"}, '"machine"'),
        ({"env_id": "`"}, '"env_id"'),
        ({"version": 1}, '"version"'),
        ({"packages": "os"}, "a list of package names"),
        ({"partial": True}, "the episodes of a finished evaluation"),
        ({"rules": []}, "a list of figures by rule"),
        ({"seed": -1}, '"seed"'),
    ],
)
def test_results_that_no_evaluation_wrote_are_refused(
    folder: Path, evaluated: Run, change: dict[str, Any], seen: str
) -> None:
    found = evaluated() if not Path("r.json").exists() else json.loads(Path("r.json").read_text())
    Path("r.json").write_text(json.dumps(found | change))
    before = contents(folder)
    with pytest.raises(FormatError) as refused:
        write_card(folder, ["r.json"])
    assert seen in str(refused.value)
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"policy": NaN', "\x00", "[" * 100_000, " " * 2**21])
def test_files_that_are_no_results_are_refused(folder: Path, text: str) -> None:
    Path("r.json").write_text(text)
    with pytest.raises(FormatError, match="is not what `meam eval --json` writes"):
        write_card(folder, ["r.json"])


def test_every_field_is_needed(folder: Path, evaluated: Run) -> None:
    found = evaluated()
    unused = {"length_mean"}
    for name in set(found) - unused:
        Path("r.json").write_text(json.dumps({key: value for key, value in found.items() if key != name}))
        with pytest.raises(FormatError, match=f'"{name}" is'):
            write_card(folder, ["r.json"])


def test_results_must_be_there_once(folder: Path, evaluated: Run) -> None:
    evaluated()
    with pytest.raises(NotFoundError, match=r"nowhere.json cannot be read: No such file"):
        write_card(folder, ["nowhere.json"])
    with pytest.raises(ConfigError, match="given twice"):
        write_card(folder, ["r.json", "r.json"])
    with pytest.raises(ConfigError, match="No results are given"):
        write_card(folder, [])
    with pytest.raises(ConfigError, match=r"expected a list of files, such as \['r.json'\]"):
        write_card(folder, "r.json")


def test_a_card_that_was_changed_by_hand_is_kept_unless_asked(folder: Path, evaluated: Run) -> None:
    evaluated()
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace("## Limits", "## My robot\n\nIt limps.\n\n## Limits"))
    before = contents(folder)
    with pytest.raises(ConfigError, match="was changed since it was written"):
        write_card(folder, ["r.json"])
    assert contents(folder) == before
    assert run(["card", str(folder), "--results", "r.json", "--replace"]) == 0
    assert "limps" not in card.read_text(encoding="utf-8")
    card.unlink()
    write_card(folder, ["r.json"])
    assert card.exists()


def test_a_folder_that_is_not_as_exported_gets_no_card(folder: Path, evaluated: Run) -> None:
    evaluated()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    before = contents(folder)
    with pytest.raises(IntegrityError, match=r"model.safetensors"):
        write_card(folder, ["r.json"])
    assert contents(folder) == before
    with pytest.raises(NotFoundError, match="owner/name is not a folder on this machine"):
        write_card("owner/name", ["r.json"])


def test_the_old_card_stays_when_the_new_one_cannot_be_written(
    folder: Path, evaluated: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated()
    before = contents(folder)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_module, "write_atomically", fail)
    with pytest.raises(OutputError, match=r"README.md cannot be written: No space left"):
        write_card(folder, ["r.json"])
    assert contents(folder) == before


def test_the_export_is_recorded_in_the_golden_file(folder: Path) -> None:
    record = ExportRecord.read(folder, read_config(folder).spec)
    assert record is not None
    assert (record.steps, record.machine, record.version) == (2, cpu_model(), __version__)
    assert [row.kind for row in record.parity] == ["random", "recorded"]


@pytest.mark.parametrize(
    "record",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"steps": 1, "machine": "m", "version": "1", "parity": []}',
        '{"parity": [{"kind": "random"}]}',
    ],
)
def test_a_broken_record_of_the_export_is_refused(folder: Path, record: str) -> None:
    golden = folder / "golden.safetensors"
    golden.write_bytes(save(load_file(golden), {"export": record}))
    spec = read_config(folder).spec
    spec = replace(spec, files={**spec.files, golden.name: sha256(golden.read_bytes())})
    with pytest.raises(FormatError, match="is not the record of an export"):
        ExportRecord.read(folder, spec)
    golden.write_bytes(save(load_file(golden)))
    spec = replace(spec, files={**spec.files, golden.name: sha256(golden.read_bytes())})
    assert ExportRecord.read(folder, spec) is None  # as earlier versions wrote it


def test_named_pipes_in_place_of_results_and_card_are_refused_and_not_waited_for(
    folder: Path, evaluated: Run, no_waiting: None
) -> None:
    evaluated("r.json")
    os.mkfifo("pipe.json")
    with pytest.raises(NotFoundError, match=r"pipe\.json cannot be read: it is a named pipe, not a regular file"):
        write_card(folder, ["pipe.json"])
    (folder / "README.md").unlink()
    os.mkfifo(folder / "README.md")
    with pytest.raises(OutputError, match=r"README\.md cannot be written: it is a named pipe"):
        write_card(folder, ["r.json"])


@pytest.mark.parametrize("name", ["a" * 256, "a\0b", "~nobody-of-this-name/r.json"])
def test_results_at_a_path_that_cannot_be_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="results is "):
        write_card(folder, [name])
