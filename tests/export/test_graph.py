"""The ONNX graph against an independent NumPy policy, and what export refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_export.graph import OPSET, PolicyModule, build_graph
from meam_export.parity import check_parity, random_inputs
from meam_policy import BoxSpec, FormatError, ParityError, PolicySpec
from meam_training import TrainConfig
from meam_training.checkpoint import build_networks

SIZES: dict[str, Any] = {
    "hidden_dims": (12, 10),
    "critic_hidden_dims": (7, 6),
    "num_critics": 2,
    "fourier_features": 6,
}
CONFIG = TrainConfig.preset("qam", **SIZES)
KINDS = {
    "qam": CONFIG,
    "qam-edit, best of 2": TrainConfig.preset("qam-edit", edit_scale=0.4, best_of=2, **SIZES),
    "me-am, best of 3": TrainConfig.preset("me-am", best_of=3, distill_coef=1.0, **SIZES),
    "me-am, euler": TrainConfig.preset("me-am", solver="euler", **SIZES),
}


def make_spec(
    flow_steps: int = 4,
    low: tuple[float, ...] = (-2.0, 0.5),
    high: tuple[float, ...] = (1.0, 0.75),
    config: TrainConfig = CONFIG,
) -> PolicySpec:
    offset, scale = (np.array(high) + low) / 2, (np.array(high) - low) / 2
    return PolicySpec(
        observation=(BoxSpec((3,), "float64", (-np.inf,) * 3, (np.inf,) * 3),),
        action=BoxSpec((2,), "float32", low, high),
        chunk_size=3,
        execute_steps=2,
        observation_mean=(1.0, -20.0, 300.0),
        observation_std=(0.5, 3.0, 0.01),
        action_offset=tuple(offset.tolist()),
        action_scale=tuple(scale.tolist()),
        flow_steps=flow_steps,
        solver=config.solver,
        best_of=config.best_of,
        method=config.method,
    )


Weights = dict[str, np.ndarray]


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def perceptron(weights: Weights, names: Sequence[str], inputs: np.ndarray) -> np.ndarray:
    for i, name in enumerate(names):
        inputs = (gelu(inputs) if i else inputs) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return inputs


def mean_value(weights: Weights, features: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """The mean of the averaged critics."""
    values = []
    for member in range(2):
        hidden = np.concatenate([features, chunks], axis=1)
        for i in range(3):
            hidden = (
                hidden @ weights[f"target_critic.weights.{i}"][member] + weights[f"target_critic.biases.{i}"][member]
            )
            if i < 2:
                hidden = gelu(hidden)
                hidden = hidden - hidden.mean(axis=1, keepdims=True)
                hidden = hidden / np.sqrt((hidden**2).mean(axis=1, keepdims=True) + 1e-6)
                hidden = hidden * weights[f"target_critic.norm_scales.{i}"][member]
                hidden = hidden + weights[f"target_critic.norm_biases.{i}"][member]
        values.append(hidden[:, 0])
    return np.mean(values, axis=0)


def numpy_policy(
    weights: Weights, spec: PolicySpec, config: TrainConfig, observation: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Written from the definition, in float64: encoder, tanh-GELU network, integration, edit, choice, scaling."""
    normalised = (observation.astype(np.float64) - spec.observation_mean) / np.array(spec.observation_std)
    phase = normalised @ weights["encoder.frequencies"]
    features = np.concatenate([normalised, np.cos(phase), np.sin(phase)], axis=1)
    fields = ["target_policy", "policy", "prior"]
    field = next(name for name in fields if f"{name}.layers.0.weight" in weights)

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        inputs = np.concatenate([features, x, np.full((len(x), 1), t)], axis=1)
        v = perceptron(weights, [f"{field}.layers.{i}" for i in range(3)], inputs)
        return ((x + (1 - t) * v).clip(-1, 1) - x) / (1 - t) if config.confine else v

    chunks = []
    for x in np.split(noise.astype(np.float64), spec.best_of, axis=1):
        if spec.solver == "euler":
            for k in range(spec.flow_steps):
                x = x + velocity(x, k / spec.flow_steps) / spec.flow_steps
        else:
            h = 2 / spec.flow_steps
            for k in range(spec.flow_steps // 2):
                x = x + h * velocity(x + h / 2 * velocity(x, k * h), (k + 0.5) * h)
        x = x.clip(-1, 1)
        if config.edit_scale:
            names = ["edit_policy.layers.0", "edit_policy.layers.1", "edit_policy.mean"]
            edit = np.tanh(perceptron(weights, names, np.concatenate([features, x], axis=1)))
            x = (x + config.edit_scale * edit).clip(-1, 1)
        chunks.append(x)
    best = np.zeros(len(noise), int)
    if spec.best_of > 1:
        best = np.argmax([mean_value(weights, features, chunk) for chunk in chunks], axis=0)
    taken = np.array(chunks)[best, np.arange(len(noise))].reshape(len(noise), spec.chunk_size, spec.action_dim)
    return np.array(spec.action_offset) + np.array(spec.action_scale) * taken


def exported(spec: PolicySpec, config: TrainConfig = CONFIG) -> tuple[bytes, PolicyModule, Weights]:
    networks = build_networks(spec, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.parameters():  # nothing at zero, and averages that differ from their originals
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = {name: value.double().numpy() for name, value in networks.state_dict().items()}
    module = PolicyModule(networks, spec)
    return build_graph(module, spec), module, weights


@cache
def exported_kind(kind: str) -> tuple[bytes, PolicyModule, Weights]:
    return exported(make_spec(config=KINDS[kind]), KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_the_definition_says(kind: str) -> None:
    config = KINDS[kind]
    spec = make_spec(config=config)
    graph, module, weights = exported_kind(kind)
    observations, noise = random_inputs(spec, 64, seed=3)
    assert noise.shape == (64, spec.best_of * 6)
    session = onnxruntime.InferenceSession(graph)
    expected = numpy_policy(weights, spec, config, observations, noise)
    for rows in (1, 2, 64):
        found = np.asarray(session.run(["actions"], {"observation": observations[:rows], "noise": noise[:rows]})[0])
        assert found.shape == (rows, 3, 2)
        assert np.abs(found - expected[:rows]).max() < 1e-5
    with torch.no_grad():
        in_torch = module(torch.from_numpy(observations), torch.from_numpy(noise)).numpy()
    assert np.abs(in_torch - expected).max() < 1e-5
    assert expected.std(axis=0).min() > 0.01


def test_other_integration_than_that_of_training_is_that_of_the_spec() -> None:
    config = KINDS["me-am, best of 3"]
    spec = replace(make_spec(config=config), flow_steps=3, solver="euler")
    graph, _, weights = exported(spec, config)
    observations, noise = random_inputs(spec, 64, seed=3)
    found = np.asarray(onnxruntime.InferenceSession(graph).run(None, {"observation": observations, "noise": noise})[0])
    assert np.abs(found - numpy_policy(weights, spec, config, observations, noise)).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_holds_the_weights_that_act_and_no_others(kind: str) -> None:
    graph, module, _ = exported_kind(kind)
    networks = module.networks
    acting = [*networks.deployed.parameters(), networks.encoder.frequencies]
    if networks.edit_policy is not None:
        acting += [p for name, p in networks.edit_policy.named_parameters() if not name.startswith("log_")]
    if KINDS[kind].best_of > 1:
        acting += list(networks.target_critic.parameters())
    stored = sum(int(np.prod(t.dims)) for t in onnx.load_from_string(graph).graph.initializer)
    needed = sum(p.numel() for p in acting)
    assert needed <= stored < needed + 150  # and a few constants


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 1e4))
def test_actions_stay_within_the_bounds_for_any_input(seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    observation = (size * generator.standard_normal((4, 3))).astype(np.float32)
    for kind, config in KINDS.items():
        noise = (size * generator.standard_normal((4, 6 * config.best_of))).astype(np.float32)
        actions = np.asarray(session_of(kind).run(None, {"observation": observation, "noise": noise})[0])
        assert (actions >= np.array([-2.0, 0.5], np.float32)).all()
        assert (actions <= np.array([1.0, 0.75], np.float32)).all()


@cache
def session_of(kind: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(exported_kind(kind)[0])


def test_the_weights_are_stored_once_however_many_steps_there_are() -> None:
    few, many = (exported(make_spec(flow_steps=steps))[0] for steps in (1, 8))
    sizes = [sum(t.ByteSize() for t in onnx.load_from_string(g).graph.initializer) for g in (few, many)]
    assert sizes[1] < 1.1 * sizes[0]
    assert [entry.version for entry in onnx.load_from_string(many).opset_import] == [OPSET]


def test_the_same_weights_make_the_same_bytes() -> None:
    assert exported(make_spec())[0] == exported_kind("qam")[0]


def test_parity_notices_changed_weights_and_nan() -> None:
    spec = make_spec()
    graph, module, _ = exported(spec)
    assert check_parity(graph, module, spec).max_error < 1e-5
    (*_, bias) = module.networks.deployed.parameters()
    with torch.no_grad():
        bias.add_(0.01)
    with pytest.raises(ParityError, match="differs from the checkpoint by 0.0"):
        check_parity(graph, module, spec)
    with torch.no_grad():
        bias.fill_(np.nan)
    with pytest.raises(ParityError, match="nan"):
        check_parity(graph, module, spec)
    with pytest.raises(FormatError, match="policy.onnx"):
        check_parity(graph[:-100], module, spec)
