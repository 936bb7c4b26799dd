"""Writing policy folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from meam_export import export_policy
from meam_export.graph import PolicyModule
from meam_policy import CheckpointError, ConfigError, MeamPolicy, NotFoundError, ObservationError, OutputError
from meam_policy.cli import run
from meam_policy.folder import POLICY_FILES, sha256
from meam_training import Checkpoint, OfflineDataset, TrainConfig, train

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
    return export_policy(checkpoint, tmp_path_factory.mktemp("policies") / "arm")


def test_the_folder_holds_the_files_of_the_format_and_their_hashes(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == set(POLICY_FILES)
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
    expected = {name for name in networks if not name.startswith("target_") or name.split(".")[0] in averages}
    assert set(weights) == expected
    assert all(np.array_equal(weights[name], networks[name].numpy()) for name in weights)
    assert {name.split(".")[0] for name in weights if name.startswith("target_")} == averages


def test_the_model_file_holds_the_trained_networks_and_the_average_that_acts(
    checkpoint: Checkpoint, folder: Path
) -> None:
    assert_holds_what_acts(folder, checkpoint, {"target_policy"})


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
    assert (spec.flow_steps, spec.solver, spec.best_of) == (10, "midpoint", 1)
    other = MeamPolicy.from_pretrained(export_policy(checkpoint, tmp_path / "policy", flow_steps=3, solver="euler"))
    assert (other.spec.flow_steps, other.spec.solver) == (3, "euler")
    observation, noise = {"arm": [0.1, 0.2], "ball": [0.3]}, np.ones(4)
    as_trained = MeamPolicy.from_pretrained(folder).sample(observation, noise=noise)
    assert not np.array_equal(as_trained, other.sample(observation, noise=noise))


def test_of_several_chunks_the_exported_policy_takes_the_one_with_the_highest_value(
    dataset: OfflineDataset, tmp_path: Path
) -> None:
    config = TrainConfig.preset("me-am", best_of=3, **{**TINY, "learning_rate": 0.1})
    checkpoint = train(config, dataset, tmp_path / "run")
    policy = MeamPolicy.from_pretrained(export_policy(checkpoint, tmp_path / "policy"))
    assert (policy.spec.best_of, policy.spec.noise_dim, policy.spec.chunk_dim) == (3, 12, 4)
    assert_holds_what_acts(tmp_path / "policy", checkpoint, {"target_policy", "target_critic"})
    networks, spec = checkpoint.load_networks(), checkpoint.spec
    generator = np.random.default_rng(2)
    rows, noise = generator.normal(size=(40, 3)), generator.standard_normal((40, 12), dtype=np.float32)
    observation = {"arm": rows[:, :2], "ball": rows[:, 2:]}
    single = PolicyModule(networks, replace(spec, best_of=1))
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
    "settings", [{"flow_steps": 0}, {"flow_steps": -3}, {"flow_steps": 3}, {"solver": "rk45"}, {"solver": "heun"}]
)
def test_what_cannot_be_integrated_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"Cannot export with"):
        export_policy(checkpoint, tmp_path / "policy", **settings)  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


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
    assert {file.name for file in Path().iterdir()} == set(POLICY_FILES)
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
    assert run(["info", str(folder)]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err
