"""Writing policy folders."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import meam_export.export as export_module
from meam_export import export_policy
from meam_export.graph.parity import ParityReport, draw_noise, random_observations
from meam_export.graph.policy_graph import build_graph
from meam_export.variants.build import BuiltVariant
from meam_policy import (
    CheckpointError,
    ConfigError,
    FormatError,
    MeamPolicy,
    NotFoundError,
    ObservationError,
    OutputError,
    ParityError,
    PolicySpec,
)
from meam_policy.cli import run
from meam_policy.diagnosis.verify import verify_policy
from meam_policy.folder.policy_folder import OPTIONAL_FILES, POLICY_FILES, sha256
from meam_policy.inference.session import PolicySession
from meam_policy.robot import RobotContract
from meam_training import Checkpoint, OfflineDataset, TrainConfig, train
from meam_training.networks.policy_module import PolicyModule

TINY = {"steps": 2, "hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "chunk_size": 2}


@pytest.fixture(scope="module")
def dataset() -> OfflineDataset:
    generator = np.random.default_rng(0)
    observations = {"arm": generator.normal(size=(60, 2)), "ball": generator.normal(size=(60, 1))}
    return OfflineDataset.from_arrays(
        observations=observations,
        actions=generator.uniform(-1, 1, (60, 2)),
        rewards=generator.normal(size=60),
        next_observations=observations,
        terminations=np.zeros(60),
        truncations=np.arange(60) % 20 == 19,
        dataset_id="tests/arm-v0",
        control_rate_hz=50.0,
    )


@pytest.fixture(scope="module")
def checkpoint(dataset: OfflineDataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return train(TrainConfig.preset("me-am", **TINY), dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_policy(checkpoint, tmp_path_factory.mktemp("policies") / "arm").folder


def test_the_folder_holds_the_files_of_the_format_and_their_hashes(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == set(POLICY_FILES) - set(OPTIONAL_FILES)
    spec = MeamPolicy.from_pretrained(folder).spec
    hashed = {"policy.onnx", "model.safetensors", "golden.safetensors"}
    assert dict(spec.files) == {name: sha256((folder / name).read_bytes()) for name in hashed}


def test_a_dict_observation_is_flattened_in_the_recorded_order(folder: Path) -> None:
    policy = MeamPolicy.from_pretrained(folder)
    assert [box.key for box in policy.spec.observation] == ["arm", "ball"]
    golden = load_file(folder / "golden.safetensors")
    split = {"ball": golden["observation"][:, 2:], "arm": golden["observation"][:, :2]}
    assert np.abs(policy.sample(split, noise=golden["noise"]) - golden["actions"]).max() < 1e-5


def assert_holds_what_acts(folder: Path, checkpoint: Checkpoint, averages: set[str]) -> None:
    weights = load_file(folder / "model.safetensors")
    networks = checkpoint.load_networks().state_dict()
    networks = {name: value for name, value in networks.items() if not name.startswith("trust_region.")}
    expected = {name for name in networks if not name.startswith("target_") or name.split(".")[0] in averages}
    assert set(weights) == expected
    assert all(np.array_equal(weights[name], networks[name].numpy()) for name in weights)
    assert {name.split(".")[0] for name in weights if name.startswith("target_")} == averages


def test_the_model_file_holds_the_trained_networks_and_the_average_that_acts(
    checkpoint: Checkpoint, folder: Path
) -> None:
    assert_holds_what_acts(folder, checkpoint, {"target_policy"})


def test_a_policy_trained_within_a_budget_leaves_its_dual_variables_behind(
    dataset: OfflineDataset, tmp_path: Path
) -> None:
    config = TrainConfig.preset("me-am", kl_budget=0.5, layer_norm=True, **{**TINY, "steps": 2})
    checkpoint = train(config, dataset, tmp_path / "run")
    assert checkpoint.load_networks().trust_region is not None
    folder = tmp_path / "policy"
    export_policy(checkpoint, folder)
    assert_holds_what_acts(folder, checkpoint, {"target_policy"})
    assert not any(name.startswith("trust_region.") for name in load_file(folder / "model.safetensors"))


def test_the_model_card_says_what_goes_in_and_comes_out(folder: Path) -> None:
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "meam-policy"
    assert card.data.to_dict()["pipeline_tag"] == "robotics"
    assert "me-am" in card.data.to_dict()["tags"]
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert [row.split("|")[2].strip() for row in rows] == ["name", "arm", "ball", "action"]
    assert "tests/arm-v0" in card.text
    assert "50.0 actions a second" in card.text
    assert "{{" not in card.text


def test_the_newest_checkpoint_of_a_training_folder_is_exported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    exported = export_policy(checkpoint.path.parent.parent, tmp_path / "policy")
    assert MeamPolicy.from_pretrained(exported).spec.method == "me-am"


def test_the_policy_is_integrated_as_in_training_unless_told_otherwise(
    checkpoint: Checkpoint, folder: Path, tmp_path: Path
) -> None:
    spec = MeamPolicy.from_pretrained(folder).spec
    assert (spec.integration.nfe, spec.integration.solver, spec.integration.best_of) == (10, "midpoint", 1)
    other = MeamPolicy.from_pretrained(export_policy(checkpoint, tmp_path / "policy", nfe=3, solver="euler"))
    assert (other.spec.integration.nfe, other.spec.integration.solver) == (3, "euler")
    observation, noise = {"arm": [0.1, 0.2], "ball": [0.3]}, np.ones(4)
    as_trained = MeamPolicy.from_pretrained(folder).sample(observation, noise=noise)
    assert not np.array_equal(as_trained, other.sample(observation, noise=noise))


@pytest.mark.slow
def test_of_several_chunks_the_exported_policy_takes_the_one_with_the_highest_value(
    dataset: OfflineDataset, tmp_path: Path
) -> None:
    config = TrainConfig.preset("me-am", best_of=3, **{**TINY, "learning_rate": 0.1})
    checkpoint = train(config, dataset, tmp_path / "run")
    policy = MeamPolicy.from_pretrained(export_policy(checkpoint, tmp_path / "policy"))
    assert (policy.spec.integration.best_of, policy.spec.noise_dim, policy.spec.chunk_dim) == (3, 12, 4)
    assert_holds_what_acts(tmp_path / "policy", checkpoint, {"target_policy", "target_critic"})
    networks, spec = checkpoint.load_networks(), checkpoint.spec
    generator = np.random.default_rng(2)
    rows, noise = generator.normal(size=(40, 3)), generator.standard_normal((40, 12), dtype=np.float32)
    observation = {"arm": rows[:, :2], "ball": rows[:, 2:]}
    single = PolicyModule(networks, replace(spec, integration=replace(spec.integration, best_of=1)))
    with torch.no_grad():
        given = torch.from_numpy(rows.astype(np.float32))
        features = networks.encoder(given)
        chunks = torch.stack([single(given, part) for part in torch.from_numpy(noise).split(4, dim=1)])
        normalised = (chunks - torch.tensor(spec.action_offset)) / torch.tensor(spec.action_scale)
        values = [networks.target_critic(features, chunk.flatten(1).float()).mean(dim=0) for chunk in normalised]
    best = torch.stack(values).argmax(dim=0).numpy()
    assert len(set(best)) == 3
    sampled = policy.sample(observation, noise=noise)
    assert np.abs(sampled - chunks.numpy()[best, np.arange(40)]).max() < 1e-5
    # One noise vector holds all of them, and acting draws as many numbers.
    with pytest.raises(ObservationError, match=r"expected \(40, 12\)"):
        policy.sample(observation, noise=noise[:, :4])
    assert policy.sample(observation).shape == (40, 2, 2)
    assert policy.predict(observation)[0].shape == (40, 2)
    policy.reset()
    first = MeamPolicy.from_pretrained(tmp_path / "policy", seed=1)
    again = MeamPolicy.from_pretrained(tmp_path / "policy", seed=1)
    assert np.array_equal(first.act(observation), again.act(observation))
    # Zero noise gives equal chunks: there is nothing to choose from.
    zero = policy.sample(observation, noise=np.zeros((40, 12)))
    assert np.abs(zero[:, 0] - policy.act(observation, deterministic=True)).max() < 1e-6


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"nfe": 0}, "nfe is 0; expected 1 to 10000"),
        ({"nfe": -3}, "nfe is -3"),
        ({"nfe": 3}, "nfe is 3; expected a multiple of 2, the evaluations per step of midpoint"),
        ({"solver": "rk45"}, "solver is 'rk45'; expected one of euler, ab2, midpoint, heun, rk4"),
        ({"solver": "rk4"}, "nfe is 10; expected a multiple of 4, the evaluations per step of rk4"),
        ({"time_grid": (0.0, 1.0)}, "time_grid is 2 times; expected 6, the boundaries of 5 steps"),
        ({"time_grid": (0.0, 1.0), "nfe": 3, "solver": "euler"}, "time_grid is 2 times"),
        ({"time_grid": (0.0, 0.6, 0.5, 1.0), "nfe": 3, "solver": "euler"}, "increasing times from 0 to 1"),
        ({"time_grid": (0.0, 0.9), "nfe": 1, "solver": "euler"}, "increasing times from 0 to 1"),
        ({"best_of": 0}, "best_of is 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=r"Cannot export with") as caught:
        export_policy(checkpoint, tmp_path / "policy", **settings)
    assert reason in str(caught.value)
    assert "config.json" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({"action_names": ("left",)}, "action_names is 1 names (left); expected 2 names"),
        ({"action_names": ("left", "left")}, 'action_names has "left" twice'),
        ({"action_names": {"arm": ["a", "b"]}}, "action_names has the keys arm; expected a list of 2 names"),
        ({"observation_names": ("a", "b", "c")}, 'expected {"arm": [NAME,NAME], "ball": [NAME]}'),
        ({"observation_names": {"arm": "ab", "ball": ["c"]}}, "of \"arm\" is 'ab'; expected a list of 2 texts"),
        ({"observation_names": {"arm": ["a"], "ball": ["b", "c"]}}, 'of "arm" is 1 names (a); expected 2 names'),
        ({"observation_names": {"arm": ["a", "a[m]"], "ball": ["b"]}}, '"a" twice; expected each name once'),
        ({"observation_names": {"arm": ["a", ""], "ball": ["b"]}}, "the name ''; expected names that are not empty"),
        ({"observation_names": {"arm": ["a", "b,c"], "ball": ["b"]}}, "the name 'b,c'"),
        ({"observation_names": {"arm": ["a", "b"], "bell": ["c"]}}, "missing keys ball, unknown keys bell"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path, names: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        export_policy(checkpoint, tmp_path / "policy", **names)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_that_says_nothing_is_refused(checkpoint: Checkpoint, tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ConfigError, match=f"tolerance is {tolerance}; expected a number above 0"):
        export_policy(checkpoint, tmp_path / "policy", tolerance=tolerance)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "heun"},
        {"solver": "ab2", "nfe": 3},
        {"solver": "rk4", "nfe": 8},
        {"solver": "euler", "nfe": 2, "time_grid": [0, 0.9, 1]},
        {"best_of": 2},
    ],
)
def test_another_integration_is_recorded_and_acts(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    policy = MeamPolicy.from_pretrained(export_policy(checkpoint, tmp_path / "policy", **settings))
    settings = {name: tuple(map(float, v)) if isinstance(v, list) else v for name, v in settings.items()}
    spec = replace(checkpoint.spec, integration=replace(checkpoint.spec.integration, **settings))
    assert replace(policy.spec, files={}) == spec
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    noise = np.random.default_rng(1).standard_normal((5, spec.noise_dim), dtype=np.float32)
    with torch.no_grad():
        expected = PolicyModule(checkpoint.load_networks(), spec)(torch.from_numpy(rows), torch.from_numpy(noise))
    found = policy.sample({"arm": rows[:, :2], "ball": rows[:, 2:]}, noise=noise)
    assert np.abs(found - expected.numpy()).max() < 1e-5


def occupy_with_file(path: Path) -> None:
    path.write_text("mine")


def occupy_with_notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize("occupy", [occupy_with_file, occupy_with_notes])
def test_an_occupied_output_is_left_alone(
    checkpoint: Checkpoint, tmp_path: Path, occupy: Callable[[Path], None]
) -> None:
    occupy(tmp_path / "policy")
    with pytest.raises(OutputError, match="already holds something"):
        export_policy(checkpoint, tmp_path / "policy")
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]


def test_an_output_that_cannot_be_made_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    occupy_with_file(tmp_path / "file")
    with pytest.raises(OutputError, match="file/policy cannot be written"):
        export_policy(checkpoint, tmp_path / "file" / "policy")


def test_an_empty_folder_is_filled(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    assert (export_policy(checkpoint, tmp_path / "policy") / "policy.onnx").is_file()
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]


def test_missing_and_broken_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint folder"):
        export_policy(tmp_path / "nowhere", tmp_path / "policy")
    with pytest.raises(NotFoundError, match="holds no checkpoint"):
        export_policy(tmp_path, tmp_path / "policy")
    (tmp_path / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match="broken"):
        export_policy(tmp_path, tmp_path / "policy")


def test_the_working_directory_itself_can_be_the_output(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_policy(checkpoint, ".")
    assert {file.name for file in Path().iterdir()} == set(POLICY_FILES) - set(OPTIONAL_FILES)
    assert MeamPolicy.from_pretrained(".").act({"arm": [0.0, 0.0], "ball": [0.0]}).shape == (2,)


def test_info_notices_any_damaged_file(
    checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export_policy(checkpoint, tmp_path / "policy")
    assert run(["info", str(folder)]) == 0
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert run(["info", str(folder)]) == 2
    assert "model.safetensors has SHA-256" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert run(["info", str(folder)]) == 0  # it acts without
    assert "model.safetensors" in next(line for line in capsys.readouterr().out.splitlines() if "missing" in line)


# Variants


@pytest.mark.slow
def test_with_variants_there_are_their_graphs_and_a_picture(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(checkpoint, tmp_path / "policy", variants=("k1", "best-of-2")).folder
    graphs = {"policy-k1.onnx", "policy-best-of-2.onnx"}
    assert {file.name for file in folder.iterdir()} == {*POLICY_FILES, *graphs} - {"robot.json"}
    spec = MeamPolicy.from_pretrained(folder).spec
    assert set(spec.files) == {"policy.onnx", "model.safetensors", "golden.safetensors", *graphs}
    # The critics by which a variant chooses belong to what acts.
    assert_holds_what_acts(folder, checkpoint, {"target_policy", "target_critic"})


# Nothing is left of what fails


def stages_of(checkpoint: Checkpoint, folder: Path) -> list[tuple[str, bool]]:
    stages: list[tuple[str, bool]] = []
    export_policy(
        checkpoint, folder, variants=("k1",), on_stage=lambda name, built: stages.append((name, built is not None))
    )
    return stages


@pytest.mark.slow
def test_every_stage_is_announced_and_every_graph_reported(checkpoint: Checkpoint, tmp_path: Path) -> None:
    expected = [("policy", False), ("policy", True), ("k1", False), ("k1", True), ("ladder", False)]
    assert stages_of(checkpoint, tmp_path / "policy") == expected


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("there", [True, False])
def test_an_interrupt_leaves_nothing_behind(checkpoint: Checkpoint, tmp_path: Path, stage: int, there: bool) -> None:
    target = tmp_path / "there" / "policy"
    if there:
        target.mkdir(parents=True)
    passed: list[str] = []

    def interrupt(name: str, _: BuiltVariant | None) -> None:
        passed.append(name)
        if len(passed) == stage + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_policy(checkpoint, target, variants=("k1",), on_stage=interrupt)
    assert [path.name for path in tmp_path.rglob("*")] == (["there", "policy"] if there else [])


def test_an_interrupt_while_files_are_written_leaves_nothing_behind(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_policy(checkpoint, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_is_wrong_is_not_written(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_another(module: PolicyModule, spec: PolicySpec, joints: Sequence[str]) -> bytes:
        other = replace(spec, integration=replace(spec.integration, solver="euler"))
        return build_graph(PolicyModule(module.networks, other), other)

    monkeypatch.setattr(export_module, "build_graph", build_another)
    with pytest.raises(ParityError, match=r"policy\.onnx differs from the checkpoint by .* It was not written"):
        export_policy(checkpoint, tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_filled_meanwhile_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "policy"

    def fill(_name: str, _built: BuiltVariant | None) -> None:
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match="already holds a policy"):
        export_policy(checkpoint, target, on_stage=fill)
    assert {path.name for path in tmp_path.rglob("*")} == {"policy", "config.json"}
    assert (target / "config.json").read_text() == "theirs"


# Observations


def test_a_graph_is_checked_at_the_observations_of_the_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    kept = checkpoint.read_observations()
    assert kept is not None
    reports: list[ParityReport] = []

    def keep(_: str, built: BuiltVariant | None) -> None:
        if built is not None:
            reports.append(built.parity)

    export_policy(checkpoint, tmp_path / "kept", on_stage=keep)
    export_policy(checkpoint, tmp_path / "given", observations=kept[:7], on_stage=keep)
    assert [[(row.kind, row.inputs) for row in report.rows] for report in reports] == [
        [("random", 1000), ("recorded", len(kept))],
        [("random", 1000), ("recorded", 7)],
    ]


@pytest.mark.slow
def test_of_a_run_that_kept_no_observations_random_ones_suffice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(checkpoint.path.parent.parent, tmp_path / "run")
    (tmp_path / "run/observations.safetensors").unlink()
    kinds: list[list[str]] = []

    def keep(_: str, built: BuiltVariant | None) -> None:
        if built is not None:
            kinds.append([row.kind for row in built.parity.rows])

    folder = export_policy(tmp_path / "run", tmp_path / "policy", variants=("k2-grid",), on_stage=keep)
    assert kinds == [["random"]] * 2
    assert "Parity: on 1000 random inputs, onnxruntime" in (folder / "README.md").read_text()
    golden = load_file(folder / "golden.safetensors")
    assert np.array_equal(golden["observation"], random_observations(checkpoint.spec, 16, seed=1))


@pytest.mark.parametrize(
    "rows",
    [np.zeros((4, 2)), np.zeros(3), np.zeros((0, 3)), np.zeros((2, 2, 3)), [[0.0, np.nan, 0.0]], [[0.0, 0.0, np.inf]]],
    ids=["width", "one", "none", "rank", "nan", "infinite"],
)
def test_observations_that_do_not_fit_are_refused(checkpoint: Checkpoint, tmp_path: Path, rows: Any) -> None:
    with pytest.raises(ConfigError, match=r"observations is an array \(.*\); expected finite numbers \[n, 3\]"):
        export_policy(checkpoint, tmp_path / "policy", observations=rows)
    assert not list(tmp_path.iterdir())


def test_golden_vectors_are_half_random_and_half_recorded_and_reproduced(checkpoint: Checkpoint, folder: Path) -> None:
    golden = load_file(folder / "golden.safetensors")
    kept = checkpoint.read_observations()
    assert kept is not None
    spec = checkpoint.spec
    assert np.array_equal(golden["observation"][:8], random_observations(spec, 16, seed=1)[:8])
    assert np.array_equal(golden["observation"][8:], kept[:8])
    assert np.array_equal(golden["noise"], draw_noise(spec, 16, seed=1))
    exact = PolicyModule(checkpoint.load_networks(), spec).double()
    with torch.no_grad():
        expected = exact(*(torch.from_numpy(golden[name]).double() for name in ("observation", "noise"))).numpy()
    assert np.abs(golden["actions"] - expected).max() < 1e-6
    split = {"arm": golden["observation"][:, :2], "ball": golden["observation"][:, 2:]}
    sampled = MeamPolicy.from_pretrained(folder).sample(split, noise=golden["noise"])
    assert np.abs(sampled - golden["actions"]).max() < 1e-5
    assert golden["actions"].std() > 0.05


# What the file says of itself


@pytest.mark.slow
def test_names_and_licence_are_in_the_folder_and_in_every_graph(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(
        checkpoint,
        tmp_path / "policy",
        variants=("k1",),
        action_names=["hip", "knee"],
        observation_names={"ball": ["height[m]"], "arm": ["x", "y"]},
        license="MIT",
    )
    spec = MeamPolicy.from_pretrained(folder).spec
    assert (spec.action_names, spec.observation_names) == (("hip", "knee"), ("x", "y", "height[m]"))
    assert spec.license == "MIT"
    card = (folder / "README.md").read_text()
    for row in ("| in | 0 | arm | x |  |", "| in | 2 | ball | height | m |", "| out | 1 |  | knee |  |"):
        assert f"\n{row}\n" in card
    assert ModelCard.load(folder / "README.md").data.to_dict()["license"] == "mit"
    for file in ("policy.onnx", "policy-k1.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(folder / file).metadata_props}
        assert metadata["action_names"] == "hip,knee"
        # Elsewhere these would have consumers scale the output again, or take the numbers for joints.
        assert not {"joint_names", "action_scale", "action_offset"} & metadata.keys()
        assert metadata["observation_names"] == "x,y,height[m]"
        assert (metadata["observation_keys"], metadata["observation_sizes"]) == ("arm,ball", "2,1")
        assert metadata["license"] == "MIT"
        assert metadata["nfe"] == ("10" if file == "policy.onnx" else "1")


def robot_data(**elbow: Any) -> dict[str, Any]:
    arm = {"key": "arm", "kind": "state/joint/position", "unit": "rad"}
    joint = {"kind": "target/joint/position", "unit": "rad"}
    return {
        "observation": [
            {**arm, "name": "hip", "joint": "hip"},
            {**arm, "name": "knee", "joint": "knee"},
            {"key": "ball", "name": "height", "kind": "extra/height", "unit": "m", "frame": "world"},
        ],
        "action": [{"name": "to_hip", "joint": "hip", **joint, **elbow}, {"name": "to_knee", "joint": "knee", **joint}],
        "timing": {"rate_hz": 50.0, "on_failure": "hold"},
    }


def test_a_robots_contract_is_in_the_folder_its_names_in_the_graphs_and_its_table_on_the_card(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    robot = RobotContract.from_object(robot_data(max_rate=2.0, lower=-0.25, stiffness=40.0))
    folder = export_policy(checkpoint, tmp_path / "policy", variants=("k1",), robot=robot)
    policy = MeamPolicy.from_pretrained(folder, variant="k1")
    assert policy.robot == robot
    assert policy.spec.action_names == ("to_hip[rad]", "to_knee[rad]")
    assert [number.unit for number in policy.spec.observation_numbers] == ["rad", "rad", "m"]
    for file in ("policy.onnx", "policy-k1.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(folder / file).metadata_props}
        assert metadata["joint_names"] == "hip,knee"
        assert metadata["action_names"] == "to_hip[rad],to_knee[rad]"
    card = (folder / "README.md").read_text()
    assert "follow: 50 actions a second; hold between actions; on failure: hold." in card
    row = "| out | 0 | to_hip | hip | target/joint/position | rad |  | absolute | -0.25 to … | 2 | 40 |  |"
    assert f"\n{row}\n" in card
    assert "| in | 2 | height |  | extra/height | m | world |  |  |  |  |  |" in card
    assert verify_policy(folder, calls=2).missing == ()


def test_a_robots_contract_of_another_policy_is_refused_before_anything_is_written(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "robot.toml"
    file.write_text('[[action]]\nname = "elbow"\nkind = "extra/elbow"\nunit = "1"\n')
    with pytest.raises(FormatError, match=r"robot\.toml: action is '1 numbers'; expected 2 numbers"):
        export_policy(checkpoint, tmp_path / "policy", robot=file)
    assert not (tmp_path / "policy").exists()


def test_without_a_licence_none_is_claimed(folder: Path) -> None:
    assert MeamPolicy.from_pretrained(folder).spec.license is None
    assert "license" not in {entry.key for entry in onnx.load(folder / "policy.onnx").metadata_props}
    assert "license" not in ModelCard.load(folder / "README.md").data.to_dict()


@pytest.mark.slow
def test_verify_tells_a_graph_that_continues_a_chunk_from_one_that_does_not(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_policy(checkpoint, tmp_path / "policy", variants=("rtc",))
    report = verify_policy(folder, calls=2)
    assert [graph.variant for graph in report.graphs] == [None, "rtc"]
    run_all = PolicySession.run_all

    def deaf(session: PolicySession, observation: Any, noise: Any, *told: Any) -> dict[str, Any]:
        return run_all(session, observation, noise)

    monkeypatch.setattr(PolicySession, "run_all", deaf)
    with pytest.raises(ParityError, match="of the action's half width from its prefix"):
        verify_policy(folder, calls=2)


@pytest.mark.slow
def test_what_was_exported_is_the_folder_its_spec_and_its_parity(checkpoint: Checkpoint, tmp_path: Path) -> None:
    exported = export_policy(checkpoint, tmp_path / "policy", variants=("k1",))
    assert exported.folder == tmp_path / "policy" == Path(exported)
    assert (str(exported), exported / "config.json") == (str(exported.folder), exported.folder / "config.json")
    assert exported.spec == PolicySpec.from_json((exported / "config.json").read_bytes())
    assert exported.parity.rows
    assert set(exported.variants) == {"k1"}
    assert repr(exported) == f"Exported({str(exported)!r}, method='me-am', graphs='policy, k1')"
