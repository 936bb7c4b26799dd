"""The networks of a published policy, in PyTorch again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import meam_training.runs.trained_policy as trained_policy_module
from meam_export import export_policy
from meam_policy import CheckpointError, FormatError, MeamPolicy, NotFoundError
from meam_policy.folder.policy_folder import FoundPolicy, sha256
from meam_training import Checkpoint, OfflineDataset, PolicyModule, TrainConfig, load_networks, train
from meam_training.runs.starting_point import StartingPoint

TINY = {"steps": 3, "hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "chunk_size": 2}
METHODS = {
    "bc": {},
    "qam": {},
    "qam-edit": {},
    "me-am": {"fourier_features": 4, "best_of": 3, "distill_coef": 1.0, "precision": "bf16"},
}


@pytest.fixture(scope="module")
def dataset() -> OfflineDataset:
    generator = np.random.default_rng(0)
    observations = generator.normal(5, 3, size=(60, 3))
    return OfflineDataset.from_arrays(
        observations=observations,
        actions=generator.uniform(-1, 1, (60, 2)),
        rewards=generator.normal(size=60),
        next_observations=observations,
        terminations=np.zeros(60),
        truncations=np.arange(60) % 20 == 19,
    )


@pytest.fixture(scope="module", params=METHODS)
def published(request: pytest.FixtureRequest, dataset: OfflineDataset, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint and the policy folder exported from it, which has other solver steps."""
    folder = tmp_path_factory.mktemp(request.param)
    config = TrainConfig.preset(request.param, TINY, device="cpu", **METHODS[request.param])
    checkpoint = train(config, dataset, folder / "run")
    return checkpoint, export_policy(checkpoint, folder / "policy", nfe=6).folder


def test_the_networks_of_a_policy_folder_choose_the_actions_of_its_golden_file(
    published: tuple[Checkpoint, Path],
) -> None:
    folder = published[1]
    networks, spec = load_networks(folder), MeamPolicy.from_pretrained(folder).spec
    golden = {name: torch.from_numpy(array) for name, array in load_file(folder / "golden.safetensors").items()}
    with torch.no_grad():
        actions = PolicyModule(networks, spec)(golden["observation"], golden["noise"])
        chunks = networks.act(networks.encoder(golden["observation"]), golden["noise"])
    torch.testing.assert_close(actions, golden["actions"], rtol=0, atol=1e-5)
    # The box is [-1, 1], so that the flow's actions are the environment's.
    torch.testing.assert_close(chunks, golden["actions"].flatten(1), rtol=0, atol=1e-5)


def test_the_networks_of_a_policy_folder_are_those_of_the_run_but_for_training_targets(
    published: tuple[Checkpoint, Path],
) -> None:
    checkpoint, folder = published
    of_run, of_folder = load_networks(checkpoint.path).state_dict(), load_networks(folder).state_dict()
    assert of_run.keys() == of_folder.keys()
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(of_run[name], of_folder[name]) for name in stored)
    copies = {"target_prior": "prior", "target_critic": "critic"}
    lacking = [name for name in of_folder if name not in stored and not name.startswith("trust_region.")]
    for name in lacking:
        part, rest = name.split(".", 1)
        assert torch.equal(of_folder[name], of_folder[f"{copies[part]}.{rest}"])


@pytest.mark.parametrize("named", ["run", "run/checkpoints/latest"])
def test_the_networks_of_a_run_are_those_of_its_newest_checkpoint(
    published: tuple[Checkpoint, Path], named: str
) -> None:
    checkpoint, folder = published
    expected = checkpoint.load_networks().state_dict()
    found = load_networks(folder.parent / named).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _changed(folder: Path, copy: Path, change, described: bool = True) -> Path:
    """A copy of a policy folder with other weights, and with their hash if it is to pass for an export."""
    shutil.copytree(folder, copy)
    before = (copy / "model.safetensors").read_bytes()
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")
    if described:
        config = (copy / "config.json").read_text(encoding="utf-8")
        after = (copy / "model.safetensors").read_bytes()
        (copy / "config.json").write_text(config.replace(sha256(before), sha256(after)), encoding="utf-8")
    return copy


def test_weights_that_do_not_fit_are_refused_by_name(published: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    name = "prior.layers.0.bias"
    for number, (change, message) in enumerate(
        (
            (lambda w: w.pop(name), f"lacks {name}"),
            (lambda w: w.update(extra=np.zeros(1, np.float32)), "has extra"),
            (lambda w: w.update({name: np.zeros(3, np.float32)}), f"{name} is torch.float32 \\[3\\]"),
            (lambda w: w.update({name: np.full(8, np.nan, np.float32)}), "expected finite"),
            (lambda w: w.update({name: w[name].astype(np.float64)}), f"{name} is torch.float64"),
        )
    ):
        with pytest.raises(FormatError, match=message):
            load_networks(_changed(published[1], tmp_path / str(number), change))
    with pytest.raises(FormatError, match="SHA-256"):
        load_networks(_changed(published[1], tmp_path / "hash", lambda w: w[name].__iadd__(1), described=False))


def test_settings_of_gigantic_networks_allocate_nothing(published: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    shutil.copytree(published[1], tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    text = file.read_text(encoding="utf-8")
    head, _, tail = text.partition('"hidden_dims": [')
    file.write_text(f'{head}"hidden_dims": [65536, 65536{tail[tail.index("]") :]}', encoding="utf-8")
    with pytest.raises(FormatError, match="lacks prior.layers.2.weight"):
        load_networks(tmp_path / "copy")


def test_what_holds_no_weights_is_refused(published: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        load_networks(tmp_path / "nothing")
    shutil.copytree(published[1], tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"no model\.safetensors"):
        load_networks(tmp_path / "copy")
    run = published[0].path.parents[1]
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / published[0].path.name / "model.safetensors").write_bytes(b"\x80\x04pickled")
    with pytest.raises(CheckpointError, match="broken"):
        load_networks(tmp_path / "run")


def test_a_published_policy_goes_on_with_other_data_and_its_successor_says_so(
    published: tuple[Checkpoint, Path], dataset: OfflineDataset, tmp_path: Path
) -> None:
    checkpoint, folder = published
    kept = {"pretrain_steps": 0, "polyak": 1e-12} if checkpoint.config.trains_policy else {}
    config = checkpoint.config.changed(steps=1, learning_rate=1e-12, **kept)
    other = replace(dataset, observations=2 * dataset.observations, dataset_id="tests/other-v0")
    last = train(config, other, tmp_path / "run", start_from=folder)
    observation, noise = dataset.observations[:7], np.random.default_rng(0).normal(size=(7, last.spec.noise_dim))
    successor = export_policy(last, tmp_path / "policy", nfe=6, license="MIT").folder
    acts = [
        MeamPolicy.from_pretrained(place).sample(observation, noise=noise.astype(np.float32))
        for place in (folder, successor)
    ]
    np.testing.assert_allclose(acts[1], acts[0], rtol=0, atol=1e-5)
    spec = MeamPolicy.from_pretrained(successor).spec
    assert spec.training_data == "tests/other-v0"
    assert spec.started_from["weights"] == MeamPolicy.from_pretrained(folder).spec.files["model.safetensors"]
    card = " ".join((successor / "README.md").read_text(encoding="utf-8").split())
    assert f"started from the weights of `{folder}` ({config.method}; SHA-256" in card
    assert "normalisation statistics were kept." in card


def test_a_run_that_starts_from_the_hub_records_the_commit(
    published: tuple[Checkpoint, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, folder = published
    assert "commit" not in StartingPoint.load(folder, "kept").record(checkpoint.config)
    monkeypatch.setattr(trained_policy_module, "find_policy", lambda name: FoundPolicy(folder, "c" * 40))
    record = StartingPoint.load("owner/arm", "kept").record(checkpoint.config)
    assert (record["policy"], record["commit"]) == ("owner/arm", "c" * 40)
