"""The ONNX graph against an independent NumPy policy, and what export refuses."""

from __future__ import annotations

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

CONFIG = TrainConfig.preset("qam", hidden_dims=(12, 10), critic_hidden_dims=(4,), num_critics=1, fourier_features=6)


def make_spec(
    flow_steps: int = 4, low: tuple[float, ...] = (-2.0, 0.5), high: tuple[float, ...] = (1.0, 0.75)
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
        method="qam",
    )


def numpy_policy(
    weights: dict[str, np.ndarray], spec: PolicySpec, observation: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Written from the definition, in float64: encoder, tanh-GELU network, Euler steps, scaling, clipping."""
    normalised = (observation.astype(np.float64) - spec.observation_mean) / np.array(spec.observation_std)
    phase = normalised @ weights["encoder.frequencies"]
    features = np.concatenate([normalised, np.cos(phase), np.sin(phase)], axis=1)
    x = noise.astype(np.float64)
    for k in range(spec.flow_steps):
        hidden = np.concatenate([features, x, np.full((len(x), 1), k / spec.flow_steps)], axis=1)
        for layer in range(3):
            hidden = hidden @ weights[f"policy.layers.{layer}.weight"].T + weights[f"policy.layers.{layer}.bias"]
            if layer < 2:
                hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + hidden / spec.flow_steps
    chunks = np.clip(x, -1, 1).reshape(len(x), spec.chunk_size, spec.action_dim)
    return np.array(spec.action_offset) + np.array(spec.action_scale) * chunks


def exported(spec: PolicySpec) -> tuple[bytes, PolicyModule, dict[str, np.ndarray]]:
    networks = build_networks(spec, CONFIG)
    weights = {name: value.double().numpy() for name, value in networks.state_dict().items()}
    module = PolicyModule(networks, spec)
    return build_graph(module, spec), module, weights


def test_the_graph_computes_what_the_definition_says() -> None:
    spec = make_spec()
    graph, _, weights = exported(spec)
    observations, noise = random_inputs(spec, 64, seed=3)
    session = onnxruntime.InferenceSession(graph)
    expected = numpy_policy(weights, spec, observations, noise)
    for rows in (1, 2, 64):
        found = np.asarray(session.run(["actions"], {"observation": observations[:rows], "noise": noise[:rows]})[0])
        assert found.shape == (rows, 3, 2)
        assert np.abs(found - expected[:rows]).max() < 1e-5
    assert expected.std(axis=0).min() > 0.01


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 1e4))
def test_actions_stay_within_the_bounds_for_any_input(seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    inputs = {
        "observation": (size * generator.standard_normal((4, 3))).astype(np.float32),
        "noise": (size * generator.standard_normal((4, 6))).astype(np.float32),
    }
    actions = np.asarray(BOUNDED.run(None, inputs)[0])
    assert (actions >= np.array([-2.0, 0.5], np.float32)).all()
    assert (actions <= np.array([1.0, 0.75], np.float32)).all()


BOUNDED = onnxruntime.InferenceSession(exported(make_spec(flow_steps=2))[0])


def test_the_weights_are_stored_once_however_many_steps_there_are() -> None:
    few, many = (exported(make_spec(flow_steps=steps))[0] for steps in (1, 8))
    sizes = [sum(t.ByteSize() for t in onnx.load_from_string(g).graph.initializer) for g in (few, many)]
    assert sizes[1] < 1.1 * sizes[0]
    assert [entry.version for entry in onnx.load_from_string(many).opset_import] == [OPSET]


def test_the_same_weights_make_the_same_bytes() -> None:
    assert exported(make_spec())[0] == exported(make_spec())[0]


def test_parity_notices_changed_weights_and_nan() -> None:
    spec = make_spec()
    graph, module, _ = exported(spec)
    assert check_parity(graph, module, spec).max_error < 1e-5
    (*_, bias) = module.velocity_field.parameters()
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
