"""Collect, train, export, load and act at toy size, through the public API and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from meam_export import export_policy
from meam_policy import MeamPolicy, OutputError, make_environment, rollout
from meam_policy.cli import run as meam
from meam_training import Checkpoint, OfflineDataset, TrainConfig, collect, train
from meam_training.networks.policy_module import PolicyModule

TINY = {
    "steps": 40,
    "pretrain_steps": 20,
    "batch_size": 32,
    "hidden_dims": (32, 32),
    "critic_hidden_dims": (32, 32),
    "num_critics": 2,
    "chunk_size": 4,
    "execute_steps": 2,
    "fourier_features": 8,
    "nfe": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect("meam/Pockets-v0", 400, root=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dataset = OfflineDataset.from_minari(data_folder)
    return train(TrainConfig.preset("me-am", **TINY), dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def policy_folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_policy(checkpoint, tmp_path_factory.mktemp("policies") / "me-am").folder


def test_the_loaded_policy_acts_in_the_environment(policy_folder: Path) -> None:
    policy = MeamPolicy.from_pretrained(policy_folder)
    env = make_environment("meam/Pockets-v0")
    result = rollout(policy, env, episodes=3, seed=5)
    assert result.lengths.tolist() == [20, 20, 20]
    assert len(result.latencies) == 30
    again = rollout(MeamPolicy.from_pretrained(policy_folder), env, episodes=3, seed=5)
    assert np.array_equal(result.returns, again.returns)


def test_the_exported_graph_computes_what_the_checkpoint_computes(checkpoint: Checkpoint, policy_folder: Path) -> None:
    policy = MeamPolicy.from_pretrained(policy_folder)
    generator = np.random.default_rng(0)
    observations = generator.uniform(-1, 1, (64, 4)).astype(np.float32)
    noise = generator.standard_normal((64, 8)).astype(np.float32)
    module = PolicyModule(checkpoint.load_networks(), checkpoint.spec)
    with torch.no_grad():
        expected = module(torch.from_numpy(observations), torch.from_numpy(noise)).numpy()
    assert np.abs(policy.sample(observations, noise=noise) - expected).max() < 1e-5
    assert expected.std() > 0.05


def test_the_golden_vectors_are_reproduced_by_onnxruntime(policy_folder: Path) -> None:
    golden = load_file(policy_folder / "golden.safetensors")
    policy = MeamPolicy.from_pretrained(policy_folder)
    assert np.abs(policy.sample(golden["observation"], noise=golden["noise"]) - golden["actions"]).max() < 1e-5


def test_the_graph_is_self_contained_and_free_of_control_flow_and_randomness(policy_folder: Path) -> None:
    model = onnx.load(policy_folder / "policy.onnx", load_external_data=False)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Loop", "If", "Scan", "RandomNormal", "RandomNormalLike", "RandomUniform"}
    assert "Gelu" in operators
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert b"/" + Path(__file__).parts[1].encode() not in (policy_folder / "policy.onnx").read_bytes()
    batch = [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)]
    assert len(set(batch)) == 1
    assert batch[0]


def test_another_nfe_and_solver_change_the_graph_but_not_the_weights(checkpoint: Checkpoint, tmp_path: Path) -> None:
    one = export_policy(checkpoint, tmp_path / "one", nfe=1, solver="euler")
    module = PolicyModule(checkpoint.load_networks(), MeamPolicy.from_pretrained(one).spec)
    observation, noise = torch.zeros(1, 4), torch.ones(1, 8)
    networks = module.networks
    velocity = networks.deployed(networks.encoder(observation), noise, torch.zeros(1, 1))
    expected = (noise + velocity).clamp(-1, 1).view(4, 2).detach().numpy()
    found = MeamPolicy.from_pretrained(one).sample(np.zeros(4), noise=np.ones(8))
    assert np.abs(found - expected).max() < 1e-6


def test_an_output_folder_that_holds_a_policy_is_left_alone(checkpoint: Checkpoint, policy_folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in policy_folder.iterdir()}
    with pytest.raises(OutputError, match="already holds a policy"):
        export_policy(checkpoint, policy_folder)
    assert {file.name: file.read_bytes() for file in policy_folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bc", "qam", "qam-edit", "trqam"])
def test_every_method_goes_the_whole_way(method: str, data_folder: Path, tmp_path: Path) -> None:
    checkpoint = train(
        TrainConfig.preset(method, TINY, steps=21), OfflineDataset.from_minari(data_folder), tmp_path / "run"
    )
    policy = MeamPolicy.from_pretrained(export_policy(checkpoint, tmp_path / "policy"))
    assert policy.spec.method == method
    assert policy.act(np.zeros(4)).shape == (2,)


@pytest.mark.slow
def test_the_command_line_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code, shown = meam([*arguments]), capsys.readouterr()
        return code, shown.out, shown.err

    code, out, err = run("collect", "meam/Pockets-v0", "--transitions", "400", "--root", "data", "--json")
    assert code == 0, err
    data = json.loads(out)["dataset"]
    sizes = ["--hidden-dims", "16", "--critic-hidden-dims", "16", "--num-critics", "2", "--batch-size", "16"]
    train_arguments = ["--data", data, "--output-dir", "run", "--steps", "5", "--chunk-size", "4", *sizes]
    code, out, err = run("train", "qam", *train_arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 5
    code, out, err = run("train", "qam", *train_arguments)
    assert (code, out) == (2, "")
    assert "already holds a run" in err
    code, out, err = run("export", "run", "--output-dir", "policy", "--json")
    assert code == 0, err
    code, out, err = run("eval", "policy", "--episodes", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["episodes"] == 2
