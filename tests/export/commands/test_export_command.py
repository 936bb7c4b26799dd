"""`meam export`."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meam_export import export_policy
from meam_export.commands import export as command
from meam_policy import ConfigError, MeamPolicy, make_environment, rollout
from meam_policy.cli import run
from meam_training import Checkpoint, OfflineDataset, TrainConfig, collect, train

TINY = {
    "steps": 3,
    "batch_size": 8,
    "hidden_dims": (8,),
    "critic_hidden_dims": (8,),
    "num_critics": 2,
    "chunk_size": 4,
    "nfe": 4,
    "distill_coef": 1.0,
    "device": "cpu",
}
BC = {name: TINY[name] for name in ("hidden_dims", "chunk_size", "nfe", "device")}
LADDER = ["k1", "k2", "k3", "k5", "k10", "k2-grid", "k3-grid", "k5-grid"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> OfflineDataset:
    return OfflineDataset.from_minari(collect("meam/Pockets-v0", 100, root=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def checkpoint(data: OfflineDataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return train(TrainConfig.preset("me-am", **TINY), data, tmp_path_factory.mktemp("run"))


@pytest.fixture
def run_folder(checkpoint: Checkpoint) -> str:
    return str(checkpoint.path.parent.parent)


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must be refused with one sentence or two, and returns them."""
    assert run(["export", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if "…" not in line]
    assert len(lines) == 1
    return lines[0]


def test_it_exports_and_shows_how_close_the_graph_is(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "policy"
    assert run(["export", run_folder, "--output-dir", str(target)]) == 0
    captured = capsys.readouterr()
    assert "onnxruntime against PyTorch in float64" in captured.out
    rows = [[cell.strip() for cell in line.split("│")] for line in captured.out.splitlines() if "│" in line]
    kept = Checkpoint.load(run_folder).read_observations()
    assert kept is not None
    assert [row[:3] for row in rows] == [["policy", "fp32", "1000 random"], ["policy", "fp32", f"{len(kept)} recorded"]]
    assert all(0 < float(cell) < 1e-5 for row in rows for cell in row[3:])
    assert f"Exported {target}" in captured.err
    assert f"meam eval {target}" in captured.err
    assert MeamPolicy.from_pretrained(target).act(np.zeros(4)).shape == (2,)


def test_the_command_to_go_on_with_can_be_pasted_whatever_the_folder_is_called(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "it's a policy"
    assert run(["export", run_folder, "--output-dir", str(target), "--triton", str(tmp_path / "a b" / "models")]) == 0
    commands = dict(line.split(" with: ") for line in capsys.readouterr().err.splitlines() if " with: " in line)
    assert shlex.split(commands["Try it"]) == ["meam", "eval", str(target)]
    assert shlex.split(commands["Serve it"])[:2] == ["tritonserver", "--model-repository"]
    assert len(shlex.split(commands["Serve it"])) == 3


@pytest.mark.slow
def test_json_is_one_line_and_nothing_else(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export", run_folder, "--output-dir", "policy", "--variants", "k1", "int8", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("\n") == 1
    found = json.loads(captured.out)
    assert found["policy"] == str(tmp_path / "policy")
    assert list(found["parity"]) == ["policy", "k4", "k1", "int8"]
    for name, rows in found["parity"].items():
        assert set(rows) == {"random", "recorded"}
        assert all(0 < row["max_error"] < (1.0 if name == "int8" else 1e-5) for row in rows.values())
    assert list(found["variants"]) == ["k4", "k1", "int8"]
    assert found["variants"]["k4"]["file"] == "policy.onnx"
    assert found["variants"]["k1"]["measured"]["action_error"] > 0


@pytest.mark.slow
def test_the_ladder_without_episodes_has_no_returns(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", run_folder, "--output-dir", str(tmp_path / "p"), "--ladder", "--variants", "int8", "k1"]) == 0
    captured = capsys.readouterr()
    spec = MeamPolicy.from_pretrained(tmp_path / "p").spec
    # The policy itself, those of a ladder, the one-step policy since it was distilled, and others; each once.
    assert list(spec.variants) == ["k4", *LADDER, "one-step", "int8"]
    table = captured.out.split("Variants, against policy.onnx")[1]
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines() if "│" in line]
    assert [row[0] for row in rows] == list(spec.variants)
    for row in rows:
        measured = spec.variants[row[0]].measured
        assert row[3] == f"{measured['action_error']:.3g}"
        assert row[5:7] == ["", ""]
    assert "Writing k3-grid …" in captured.err
    assert "Measuring the variants …" in captured.err


@pytest.mark.slow
def test_the_returns_of_episodes_are_those_of_a_rollout(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "policy"
    arguments = ["--output-dir", str(target), "--variants", "k1", "one-step", "--episodes", "2"]
    assert run(["export", run_folder, *arguments]) == 0
    assert "return" in capsys.readouterr().out
    env = make_environment("meam/Pockets-v0")
    for name in ("k1", "one-step"):
        policy = MeamPolicy.from_pretrained(target, variant=name)
        assert policy_return(target, name) == rollout(policy, env, 2, 0).return_mean
    env.close()
    # `meam eval` measures the same.
    assert run(["eval", str(target), "--variant", "k1", "--episodes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["return_mean"] == policy_return(target, "k1")


def policy_return(folder: Path, name: str) -> float:
    return MeamPolicy.from_pretrained(folder).spec.variants[name].measured["return_mean"]


def test_a_ladder_of_a_policy_that_was_not_distilled_has_no_one_step_policy(checkpoint: Checkpoint) -> None:
    assert command._ladder(checkpoint) == (*LADDER, "one-step")
    undistilled = replace(checkpoint, config=replace(checkpoint.config, distill_coef=0.0))
    assert command._ladder(undistilled) == tuple(LADDER)


def test_episodes_need_variants_and_an_environment(
    run_folder: str, checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "policy")
    text = refused(capsys, run_folder, "--output-dir", target, "--episodes", "2")
    assert "episodes is 2; expected 0, since there are no variants, and no --acting" in text
    text = refused(capsys, run_folder, "--output-dir", target, "--episodes", "-1", "--ladder")
    assert "episodes is -1; expected 0 or more" in text
    homeless = Path(shutil.copytree(checkpoint.path, tmp_path / "run/checkpoints" / checkpoint.path.name))
    (homeless / "hashes.json").unlink()
    spec = replace(checkpoint.spec, environment_id=None)
    (homeless / "policy_spec.json").write_text(spec.to_json())
    text = refused(capsys, str(homeless), "--output-dir", target, "--episodes", "2", "--ladder")
    assert "The policy does not say which environment it is for; pass --env-id" in text
    text = refused(capsys, run_folder, "--output-dir", target, "--ladder", "--env-kwargs", '{"g": 2}')
    assert "have no effect without --episodes" in text
    text = refused(
        capsys, run_folder, "--output-dir", target, "--ladder", "--episodes", "2", "--env-kwargs", '{"gg": 2}'
    )
    assert "meam/Pockets-v0 cannot be made with these arguments: gg=2" in text
    assert not Path(target).exists()


def test_the_rule_that_auto_records_is_the_one_that_eval_measures(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "policy"
    assert run(["export", run_folder, "--output-dir", str(target), "--acting", "auto", "--episodes", "10"]) == 0
    captured = capsys.readouterr()
    assert "Measuring how it acts …" in captured.err
    table = captured.out.split("How it acts in meam/Pockets-v0, 10 episodes from seed 2000000")[1]
    rows = {line.split("│")[0].strip(): line for line in table.splitlines() if "│" in line}
    assert list(rows) == ["sample", "0.5", "zero"]
    spec = MeamPolicy.from_pretrained(target).spec
    assert [rule for rule, line in rows.items() if "recorded" in line] == [spec.acting_name]
    measured = spec.acting.measured
    assert measured is not None
    episodes = ["--episodes", "10", "--seed", "2000000"]
    assert run(["eval", str(target), *episodes, "--acting", *rows, "--json"]) == 0
    for row in json.loads(capsys.readouterr().out)["rules"]:
        figures = measured.returns[row["acting"]]
        assert figures["return_mean"] == row["return_mean"]
        assert (figures["return_low"], figures["return_high"]) == (row["ci_low"], row["ci_high"])
        assert (figures.get("gain_low"), figures.get("gain_high")) == (row["gain_low"], row["gain_high"])
    assert run(["eval", str(target), *episodes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["acting"] == spec.acting_name


def test_the_rule_is_in_the_json_of_the_export(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export", run_folder, "--output-dir", str(tmp_path / "p"), "--acting", "zero", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["acting"] == {"rule": "zero", "noise_scale": 0.0, "measured": None}
    target = str(tmp_path / "other")
    text = refused(capsys, run_folder, "--output-dir", target, "--acting", "auto", "--episodes", "3")
    assert "episodes is 3; expected 10 or more" in text
    text = refused(capsys, run_folder, "--output-dir", target, "--acting", "loud")
    assert 'There is no acting rule "loud"; expected sample, zero' in text


def test_what_the_options_say_is_in_the_policy(run_folder: str, tmp_path: Path) -> None:
    target = tmp_path / "policy"
    arguments = ["--nfe", "2", "--solver", "ab2", "--time-grid", "0", "0.3", "1", "--best-of", "3"]
    arguments += ["--action-names", "x", "y", "--observation-names", "a", "b", "c", "d", "--license", "MIT", "--json"]
    assert run(["export", run_folder, "--output-dir", str(target), *arguments]) == 0
    spec = MeamPolicy.from_pretrained(target).spec
    assert (spec.integration.nfe, spec.integration.solver, spec.integration.time_grid, spec.integration.best_of) == (
        2,
        "ab2",
        (0.0, 0.3, 1.0),
        3,
    )
    assert (spec.action_names, spec.observation_names, spec.license) == (("x", "y"), tuple("abcd"), "MIT")


@pytest.fixture
def keyed_run(tmp_path: Path) -> str:
    random, n = np.random.default_rng(0), 40
    rows = {"speed": random.normal(size=(n, 2)), "place": random.normal(size=(n, 1))}
    ends = np.arange(n) % 20 == 19
    arrays = (rows, random.uniform(-1, 1, (n, 2)), np.zeros(n), rows, np.zeros(n, bool), ends)
    train(TrainConfig.preset("bc", **{**BC, "steps": 1}), OfflineDataset.from_arrays(*arrays), tmp_path / "run")
    return str(tmp_path / "run")


def test_names_of_a_dict_are_given_by_key_and_shown(
    keyed_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "policy")
    text = refused(capsys, keyed_run, "--output-dir", target, "--observation-names", "x", "v", "w")
    assert '--observation-names has "x", which begins with no key' in text
    assert "expected speed=NAME,NAME place=NAME." in text
    names = ["--observation-names", "place=x[m]", "speed=v,w", "--action-names", "a[N]", "b"]
    assert run(["export", keyed_run, "--output-dir", target, *names]) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in capsys.readouterr().out.splitlines()]
    for row in (["0", "speed", "v", "", "[-inf, inf]"], ["2", "place", "x", "m", "[-inf, inf]"]):
        assert row in rows
    assert ["0", "a", "N", "[-1, 1]"] in rows
    assert run(["export", keyed_run, "--output-dir", str(tmp_path / "json"), *names, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)["numbers"]
    assert numbers["observation"][2] == {"index": 2, "key": "place", "name": "x", "unit": "m"}
    assert [number["name"] for number in numbers["action"]] == ["a", "b"]


def test_triton_gets_the_policys_own_graph(run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, repository = tmp_path / "policy", tmp_path / "models"
    assert run(["export", run_folder, "--output-dir", str(target), "--triton", str(repository)]) == 0
    assert f"tritonserver --model-repository {repository}" in capsys.readouterr().err
    assert (repository / "policy/1/model.onnx").read_bytes() == (target / "policy.onnx").read_bytes()
    assert "KIND_CPU" in (repository / "policy/config.pbtxt").read_text()
    arguments = [
        "--output-dir",
        str(tmp_path / "other"),
        "--triton",
        str(repository),
        "--triton-device",
        "gpu",
        "--json",
    ]
    assert run(["export", run_folder, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["triton"] == str(repository / "other")
    assert "KIND_GPU" in (repository / "other/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--variants", "warp"], 'There is no variant "warp"; expected names such as k5'),
        (["--variants", "k3-midpoint"], "expected a multiple of 2, the evaluations per step of midpoint"),
        (["--nfe", "3"], "Cannot export with nfe=3"),
        (["--best-of", "0"], "Cannot export with best_of=0"),
        (["--time-grid", "0", "0.5"], "Cannot export with time_grid=(0.0, 0.5)"),
        (["--action-names", "x"], "action_names is 1 names (x); expected 2 names"),
        (["--variants", "int8", "--tolerance", "0"], "tolerance is 0.0; expected a number above 0"),
        (["--tolerance", "0.1"], "--tolerance 0.1 has no effect without an int8 or fp16 variant; leave it out"),
        (["--tolerance", "0.1", "--variants", "k1"], "--tolerance 0.1 has no effect without an int8 or fp16 variant"),
        (["--triton-device", "gpu"], "--triton-device gpu is given without --triton; leave it out"),
        (["--triton", ""], "the text after --triton is empty"),
        (["--variants", "int8", "--tolerance", "1e-9"], "policy-int8.onnx differs from the checkpoint by"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_one_sentence(
    run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert text in refused(capsys, run_folder, "--output-dir", str(tmp_path / "policy"), *arguments)
    assert not list(tmp_path.iterdir())


def test_a_wrong_path_is_refused(run_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "policy")
    assert "There is no checkpoint folder" in refused(capsys, str(tmp_path / "no"), "--output-dir", target)
    assert "holds no checkpoint" in refused(capsys, str(tmp_path), "--output-dir", target)
    assert "already holds" in refused(capsys, run_folder, "--output-dir", run_folder)


def test_help_names_every_form_of_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        run(["export", "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for example in ("k5", "k4-midpoint", "k3-grid", "one-step", "best-of-4", "-int8", "-fp16", "--ladder --episodes"):
        assert example in text


def test_an_empty_folder_is_refused_not_taken_for_this_one(
    run_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the text after --output-dir is empty" in refused(capsys, run_folder, "--output-dir", "")
    with pytest.raises(ConfigError, match="output_dir is ''; expected the path of a folder"):
        export_policy(run_folder, "")
    assert not list(tmp_path.iterdir())
