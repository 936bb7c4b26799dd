"""The ONNX graph against an independent NumPy policy, PyTorch's own export, and the format's promises."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meam_export.benchmark.traced import traced_graph
from meam_export.graph.parity import draw_noise, random_observations
from meam_export.graph.policy_graph import build_graph, graph_metadata
from meam_export.graph.writer import IR_VERSION, OPSET
from meam_policy import BoxSpec, ConfigError, PolicySpec
from meam_policy.graph.graph_check import check_graph
from meam_policy.spec import EVALUATIONS, Integration, Precision, Solver
from meam_training import TrainConfig
from meam_training.flow.solvers import PREFIX_SOLVERS
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.policy_module import PolicyModule

SIZES: dict[str, Any] = {
    "hidden_dims": (12, 10),
    "critic_hidden_dims": (7, 6),
    "num_critics": 2,
    "fourier_features": 6,
}
CONFIG = TrainConfig.preset("qam", **SIZES)
PLAIN: dict[str, Any] = {"precondition": False, "normalise_values": False}
STATISTICS = DataStatistics((0.3, -0.2, 0.1, 0.0, -0.4, 0.25), 0.4, -2.0, 3.0)
"""What preconditioned fields and normalised critics know of the data."""
KINDS = {
    "bc": TrainConfig.preset("bc", SIZES),
    "qam": CONFIG,
    "qam-edit, best of 2": TrainConfig.preset("qam-edit", edit_scale=0.4, best_of=2, **SIZES),
    "qam-edit, confined": TrainConfig.preset("qam-edit", edit_scale=0.4, confine=True, **SIZES),
    "me-am": TrainConfig.preset("me-am", **SIZES),
    "me-am, best of 3": TrainConfig.preset("me-am", best_of=3, **SIZES),
    "me-am, plain": TrainConfig.preset("me-am", **PLAIN, **SIZES),
    "me-am, plain, best of 3": TrainConfig.preset("me-am", best_of=3, **PLAIN, **SIZES),
    "bc, free": TrainConfig.preset("bc", confine=False, **{"hidden_dims": (12, 10), "fourier_features": 6}),
    "no features, one hidden layer": TrainConfig.preset(
        "me-am", **{**SIZES, "fourier_features": 0, "hidden_dims": (9,)}
    ),
    "three hidden layers": TrainConfig.preset("qam", **{**SIZES, "hidden_dims": (9, 8, 7)}),
    "layer norm": TrainConfig.preset("me-am", layer_norm=True, **SIZES),
    "bounded observations": TrainConfig.preset("me-am", observation_limit=0.5, **SIZES),
    "one step": TrainConfig.preset("me-am", distill_coef=1.0, **SIZES),
    "one step beside an edit policy": TrainConfig.preset("qam-edit", edit_scale=0.4, distill_coef=1.0, **SIZES),
    "takes_prefix": TrainConfig.preset("me-am", **SIZES),
    "takes_prefix, plain": TrainConfig.preset("me-am", **PLAIN, **SIZES),
    "takes_prefix, not confined": CONFIG,
}
WITH_PREFIX = [kind for kind in KINDS if kind.startswith("takes_prefix")]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
GRIDS: dict[str, tuple[float, ...] | None] = {"equal steps": None, "unequal steps": (0.0, 0.125, 0.3, 1.0)}


def make_spec(
    nfe: int = 4,
    low: tuple[float, ...] = (-2.0, 0.5),
    high: tuple[float, ...] = (1.0, 0.75),
    config: TrainConfig = CONFIG,
    **changes: Any,
) -> PolicySpec:
    offset, scale = (np.array(high) + low) / 2, (np.array(high) - low) / 2
    how = {"solver": config.solver, "best_of": config.best_of}
    how |= {name: changes.pop(name) for name in ("solver", "time_grid", "best_of") if name in changes}
    fields: dict[str, Any] = {
        "observation": (BoxSpec((3,), "float64", (-np.inf,) * 3, (np.inf,) * 3),),
        "action": BoxSpec((2,), "float32", low, high),
        "chunk_size": 3,
        "execute_steps": 2,
        "observation_mean": (1.0, -20.0, 300.0),
        "observation_std": (0.5, 3.0, 0.01),
        "action_offset": tuple(offset.tolist()),
        "action_scale": tuple(scale.tolist()),
        "integration": Integration(nfe, **how),
        "method": config.method,
    }
    return PolicySpec(**{**fields, **changes})


# The policy in NumPy, written from its definition

Weights = dict[str, np.ndarray]
Field = Callable[[np.ndarray, float], np.ndarray]
RUNGE_KUTTA: Mapping[str, tuple[list[float], list[list[float]], list[float]]] = {  # nodes, matrix, weights
    "euler": ([0], [[]], [1]),
    "midpoint": ([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "rk4": ([0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def integrated(velocity: Field, x: np.ndarray, times: Sequence[float], solver: Solver) -> np.ndarray:
    last: tuple[float, np.ndarray] | None = None
    for t, u in itertools.pairwise(times):
        h = u - t
        if solver == "ab2":  # the integral of the line through the last two velocities
            v = velocity(x, t)
            slope = 0 if last is None else (v - last[1]) / (t - last[0])
            x, last = x + h * v + h**2 / 2 * slope, (t, v)
            continue
        nodes, matrix, weights = RUNGE_KUTTA[solver]
        k: list[np.ndarray] = []
        for node, row in zip(nodes, matrix, strict=True):
            k.append(velocity(x + h * sum((a * b for a, b in zip(row, k, strict=True)), np.zeros(())), t + node * h))
        x = x + h * sum((w * b for w, b in zip(weights, k, strict=True)), np.zeros(()))
    return x


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def normalised(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)


def perceptron(weights: Weights, name: str, inputs: np.ndarray, last: Sequence[str] = ()) -> np.ndarray:
    layers = [f"{name}.layers.{i}" for i in range(9) if f"{name}.layers.{i}.weight" in weights]
    for i, layer in enumerate([*layers, *last]):
        if i:
            inputs = gelu(inputs)
            norm = f"{name}.norms.{i - 1}"
            if f"{norm}.weight" in weights:
                inputs = normalised(inputs) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
        inputs = inputs @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
    return inputs


def critic_values(weights: Weights, features: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Values [critics, batch] by the averaged critics."""
    values = []
    for member in range(2):
        hidden = np.concatenate([features, chunks], axis=1)
        for i in range(3):
            hidden = (
                hidden @ weights[f"target_critic.weights.{i}"][member] + weights[f"target_critic.biases.{i}"][member]
            )
            if i < 2:
                hidden = normalised(gelu(hidden))
                hidden = hidden * weights[f"target_critic.norm_scales.{i}"][member]
                hidden = hidden + weights[f"target_critic.norm_biases.{i}"][member]
        values.append(hidden[:, 0])
    return weights.get("target_critic.offset", 0) + weights.get("target_critic.scale", 1) * np.array(values)


def numpy_policy(
    weights: Weights,
    spec: PolicySpec,
    config: TrainConfig,
    observation: np.ndarray,
    noise: np.ndarray,
    one_step: bool = False,
    prefix: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """In float64: encoder, tanh-GELU network, integration, edit, choice, scaling; noise is [batch, samples, act]."""
    features = (observation.astype(np.float64) - spec.observation_mean) / np.array(spec.observation_std)
    limit = config.observation_limit or np.inf
    features = features.clip(-limit, limit)
    if config.fourier_features:
        phase = features @ weights["encoder.frequencies"]
        features = np.concatenate([features, np.cos(phase), np.sin(phase)], axis=1)
    field = next(name for name in ("target_policy", "policy", "prior") if f"{name}.layers.0.weight" in weights)
    given, share = np.zeros(()), np.zeros(())
    if prefix is not None and weight is not None:
        scaled = (prefix.astype(np.float64) - spec.action_offset) / np.array(spec.action_scale)
        given = scaled.clip(-1, 1).reshape(len(prefix), -1)
        share = np.repeat(weight.astype(np.float64), spec.action_dim, axis=1)

    def network(x: np.ndarray, t: float) -> np.ndarray:
        return perceptron(weights, field, np.concatenate([features, x, np.full((len(x), 1), t)], axis=1))

    def free(x: np.ndarray, t: float) -> np.ndarray:
        if not config.precondition:
            return network(x, t)
        mean, std = weights[f"{field}.preconditioner.mean"], weights[f"{field}.preconditioner.std"]
        spread = np.sqrt((1 - t) ** 2 + (t * std) ** 2)
        of_gaussian = mean + (t * std**2 - (1 - t)) / spread**2 * (x - t * mean)
        return of_gaussian + std / spread * network((x - t * mean) / spread, t)

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        v = free(x, t)
        if t == 1 or (prefix is None and not config.confine):
            return v
        x_1 = (x + (1 - t) * v).clip(-1, 1) if config.confine else x + (1 - t) * v
        return ((1 - share) * x_1 + share * given - x) / (1 - t)

    steps = spec.integration.nfe // EVALUATIONS[spec.integration.solver]
    times = spec.integration.time_grid or tuple(k / steps for k in range(steps + 1))
    chunks = []
    for x in noise.astype(np.float64).swapaxes(0, 1):
        if one_step:
            chunks.append(perceptron(weights, "one_step", np.concatenate([features, x], axis=1)).clip(-1, 1))
            continue
        x = integrated(velocity, x, times, spec.integration.solver).clip(-1, 1)
        if config.edit_scale:
            mean = perceptron(weights, "edit_policy", np.concatenate([features, x], axis=1), ["edit_policy.mean"])
            x = (x + config.edit_scale * np.tanh(mean)).clip(-1, 1)
        chunks.append(x)
    rows, best, outputs = np.arange(len(noise)), np.zeros(len(noise), int), {}
    if spec.integration.best_of > 1:
        values = np.array([critic_values(weights, features, chunk) for chunk in chunks])
        best = values.mean(axis=1).argmax(axis=0)
        chosen = values[best, :, rows]
        outputs = {"value": chosen.mean(axis=1), "disagreement": chosen.std(axis=1)}
    taken = np.array(chunks)[best, rows].reshape(len(noise), spec.chunk_size, spec.action_dim)
    actions = np.array(spec.action_offset) + np.array(spec.action_scale) * taken
    return {"actions": actions.clip(spec.action.low, spec.action.high), **outputs}


# What is compared


def trained(
    spec: PolicySpec, config: TrainConfig, one_step: bool = False, takes_prefix: bool = False
) -> tuple[PolicyModule, Weights]:
    torch.manual_seed(0)
    networks = build_networks(spec, config, STATISTICS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.parameters():  # nothing at zero, and averages that differ from their originals
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = {name: value.double().numpy() for name, value in networks.state_dict().items()}
    return PolicyModule(networks, spec, one_step, takes_prefix), weights


def exported(
    spec: PolicySpec,
    config: TrainConfig = CONFIG,
    precision: Precision = "fp32",
    one_step: bool = False,
    takes_prefix: bool = False,
) -> tuple[bytes, PolicyModule, Weights]:
    module, weights = trained(spec, config, one_step, takes_prefix)
    return build_graph(module, spec, precision), module, weights


@cache
def exported_kind(kind: str, precision: Precision = "fp32") -> tuple[bytes, PolicyModule, Weights]:
    one_step, takes_prefix = kind.startswith("one step"), kind in WITH_PREFIX
    return exported(make_spec(config=KINDS[kind]), KINDS[kind], precision, one_step, takes_prefix)


def inputs(spec: PolicySpec, rows: int = 64, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Observations, and noise [rows, samples, act]."""
    noise = draw_noise(spec, rows, seed).reshape(rows, spec.integration.best_of, spec.chunk_dim)
    return random_observations(spec, rows, seed), noise


def start(graph: bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()  # its defaults
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph, options)


def run(
    session: onnxruntime.InferenceSession,
    observation: np.ndarray,
    noise: np.ndarray,
    prefix: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """All outputs, for noise [rows, samples, act]; where no prefix is given, a graph that takes one gets zeros."""
    shapes = {node.name: node.shape for node in session.get_inputs()}
    fed = {"observation": observation, "noise": noise if len(shapes["noise"]) == 3 else noise[:, 0]}
    for name, array in (("prefix", prefix), ("prefix_weight", weight)):
        if name in shapes:
            zeros = np.zeros((len(observation), *shapes[name][1:]), np.float32)
            fed[name] = zeros if array is None else array.astype(np.float32)
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, fed)
    return dict(zip(names, map(np.asarray, found), strict=True))


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], atol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol)


CASES = [
    (kind, solver, grid)
    for kind, solver, grid in itertools.product(KINDS, SOLVERS, GRIDS)
    if not kind.startswith("one step") or (solver, grid) == ("euler", "equal steps")  # where nothing is integrated
    if kind not in WITH_PREFIX or solver in PREFIX_SOLVERS
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "solver", "grid"), CASES)
def test_the_graph_computes_what_the_definition_says(kind: str, solver: Solver, grid: str) -> None:
    config, one_step = KINDS[kind], kind.startswith("one step")
    spec = make_spec(3 * EVALUATIONS[solver], config=config, solver=solver, time_grid=GRIDS[grid])
    graph, module, weights = exported(spec, config, one_step=one_step, takes_prefix=kind in WITH_PREFIX)
    observation, noise = inputs(spec)
    expected = numpy_policy(weights, spec, config, observation, noise, one_step)
    session = start(graph)
    for rows in (1, 2, 64):
        found = run(session, observation[:rows], noise[:rows])
        assert_close(found, {name: array[:rows] for name, array in expected.items()})
    with torch.no_grad():
        decided = module.decide(torch.from_numpy(observation), torch.from_numpy(noise.reshape(64, -1)))
    names = ("actions", "value", "disagreement")[: len(decided)]
    assert_close(dict(zip(names, (output.numpy() for output in decided), strict=True)), expected)
    assert expected["actions"].std(axis=0).min() > 0.01
    assert check_graph(graph).opset == OPSET


@pytest.mark.parametrize("steps", [1, 2, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["qam", "me-am", "qam-edit, best of 2", "layer norm"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_few_and_many_steps_are_right_too(kind: str, solver: Solver, steps: int) -> None:
    spec = make_spec(EVALUATIONS[solver] * steps, config=KINDS[kind], solver=solver)
    graph, _, weights = exported(spec, KINDS[kind])
    observation, noise = inputs(spec, 16)
    assert_close(run(start(graph), observation, noise), numpy_policy(weights, spec, KINDS[kind], observation, noise))


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", [(0.0, 1e-3, 1.0), (0.0, 0.5, 0.999, 1.0), (0.0, 0.03, 0.5, 0.51, 1.0)])
@pytest.mark.parametrize("kind", ["qam", "me-am"])
def test_very_unequal_steps_lose_hardly_more_than_in_pytorch(
    kind: str, grid: tuple[float, ...], solver: Solver
) -> None:
    config = KINDS[kind]
    spec = make_spec((len(grid) - 1) * EVALUATIONS[solver], config=config, solver=solver, time_grid=grid)
    graph, module, weights = exported(spec, config)
    observation, noise = inputs(spec)
    expected = numpy_policy(weights, spec, config, observation, noise)["actions"]
    with torch.no_grad():
        in_torch = module(torch.from_numpy(observation), torch.from_numpy(noise[:, 0])).numpy()
    # Extrapolating from a step of 1e-3 over the rest, Adams-Bashforth magnifies rounding errors by 500.
    tolerance = 1e-5 + 4 * np.abs(in_torch - expected).max()
    assert_close(run(start(graph), observation, noise), {"actions": expected}, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qam", "qam-edit, confined", "me-am, best of 3", "one step"])
def test_pytorchs_own_export_computes_the_same(kind: str) -> None:
    spec = make_spec(config=KINDS[kind])
    graph, module, _ = exported_kind(kind)
    observation, noise = inputs(spec)
    traced = start(traced_graph(module, spec)).run(
        None, {"observation": observation, "noise": noise.reshape(len(noise), -1)}
    )
    np.testing.assert_allclose(run(start(graph), observation, noise)["actions"], np.asarray(traced[0]), atol=1e-5)


# Choosing among several


def test_one_graph_takes_any_number_of_samples_and_rows() -> None:
    config = KINDS["me-am, best of 3"]
    graph, _, weights = exported_kind("me-am, best of 3")
    session = start(graph)
    for samples, rows in itertools.product((1, 2, 5), (1, 3, 8)):
        spec = make_spec(config=config, best_of=max(samples, 2))
        observation, noise = inputs(replace(spec, integration=replace(spec.integration, best_of=samples)), rows)
        # The definition chooses among two at least: one sample twice is the same choice.
        twice = np.repeat(noise, 2, axis=1) if samples == 1 else noise
        assert_close(run(session, observation, noise), numpy_policy(weights, spec, config, observation, twice))


def test_of_chunks_with_the_same_value_the_first_is_taken() -> None:
    config = KINDS["me-am, best of 3"]
    spec = make_spec(config=config)
    module, _ = trained(spec, config)
    with torch.no_grad():
        module.networks.target_critic.weights[-1].zero_()
    session = start(build_graph(module, spec))
    single = start(
        build_graph(
            PolicyModule(module.networks, replace(spec, integration=replace(spec.integration, best_of=1))),
            replace(spec, integration=replace(spec.integration, best_of=1)),
        )
    )
    observation, noise = inputs(spec, 16)
    found = run(session, observation, noise)
    np.testing.assert_allclose(found["actions"], run(single, observation, noise)["actions"], rtol=0, atol=1e-6)
    biases = module.networks.target_critic.biases[-1].detach().numpy().ravel()
    in_reward = STATISTICS.value_offset + STATISTICS.value_scale * biases
    np.testing.assert_allclose(found["value"], np.full(16, in_reward.mean()), rtol=1e-5)
    np.testing.assert_allclose(found["disagreement"], np.full(16, in_reward.std()), rtol=1e-4)


def test_critics_that_agree_have_no_disagreement() -> None:
    config = KINDS["me-am, best of 3"]
    spec = make_spec(config=config)
    module, _ = trained(spec, config)
    with torch.no_grad():
        for name, parameter in module.networks.target_critic.named_parameters():
            if name != "frequencies":
                parameter[1] = parameter[0]
    observation, noise = inputs(spec, 16)
    found = run(start(build_graph(module, spec)), observation, noise)
    assert found["disagreement"].max() < 1e-3
    assert not np.isnan(found["disagreement"]).any()


def test_the_best_of_one_has_only_actions() -> None:
    session = start(exported_kind("me-am")[0])
    assert [(node.name, node.shape) for node in session.get_inputs()] == [
        ("observation", ["batch", 3]),
        ("noise", ["batch", 6]),
    ]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("actions", ["batch", 3, 2])]


def test_the_best_of_several_says_its_value_too() -> None:
    session = start(exported_kind("me-am, best of 3")[0])
    assert [(node.name, node.shape) for node in session.get_inputs()] == [
        ("observation", ["batch", 3]),
        ("noise", ["batch", "samples", 6]),
    ]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [
        ("actions", ["batch", 3, 2]),
        ("value", ["batch"]),
        ("disagreement", ["batch"]),
    ]


def test_what_cannot_act_is_refused() -> None:
    networks = trained(make_spec(), CONFIG)[0].networks
    with pytest.raises(ConfigError, match="no one-step policy"):
        PolicyModule(networks, make_spec(), one_step=True)
    one_step = trained(make_spec(config=KINDS["one step"]), KINDS["one step"])[0].networks
    with pytest.raises(ConfigError, match="best_of is 2; expected 1, because the one-step policy"):
        PolicyModule(one_step, make_spec(config=KINDS["one step"], best_of=2), one_step=True)
    cloned = trained(make_spec(config=KINDS["bc"]), KINDS["bc"])[0].networks
    with pytest.raises(ConfigError, match="best_of is 2; expected 1, because bc trains no critics"):
        PolicyModule(cloned, make_spec(config=KINDS["bc"], best_of=2))


def test_the_reference_shares_the_networks_and_integrates_them_its_own_way() -> None:
    module, _ = trained(make_spec(), CONFIG)
    other = PolicyModule(module.networks, make_spec(6, solver="heun", time_grid=(0.0, 0.1, 0.2, 1.0), best_of=2))
    assert (module.networks.integration, module.integration) == (CONFIG.integration, Integration(4))
    assert other.integration == Integration(6, "heun", (0.0, 0.1, 0.2, 1.0), 2)
    assert other.networks is module.networks


# With a prefix


def some_prefixes(spec: PolicySpec, rows: int, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of which many actions are beyond the bounds, and weights of which about half are 0 or 1."""
    generator = np.random.default_rng(seed)
    u = generator.uniform(-1.5, 1.5, (rows, spec.chunk_size, spec.action_dim))
    prefix = np.array(spec.action_offset) + np.array(spec.action_scale) * u
    return prefix.astype(np.float32), generator.uniform(-0.5, 1.5, (rows, spec.chunk_size)).clip(0, 1).astype("f4")


def clipped(spec: PolicySpec, prefix: np.ndarray) -> np.ndarray:
    offset, scale = np.array(spec.action_offset), np.array(spec.action_scale)
    return prefix.clip(offset - scale, offset + scale).clip(spec.action.low, spec.action.high)


CAN_TAKE_PREFIX = [k for k, c in KINDS.items() if c.best_of == 1 and not c.edit_scale and not k.startswith("one step")]
UNEQUAL: dict[str, tuple[float, ...] | None] = {**GRIDS, "a short last step": (0.0, 0.5, 0.99, 1.0)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAN_TAKE_PREFIX)
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@pytest.mark.parametrize("grid", UNEQUAL)
def test_a_continued_chunk_is_the_one_of_the_definition(kind: str, solver: Solver, grid: str) -> None:
    config = KINDS[kind]
    spec = make_spec(3 * EVALUATIONS[solver], config=config, solver=solver, time_grid=UNEQUAL[grid])
    graph, module, weights = exported(spec, config, takes_prefix=True)
    (observation, noise), given = inputs(spec), some_prefixes(spec, 64)
    expected = numpy_policy(weights, spec, config, observation, noise, False, *given)
    session = start(graph)
    for rows in (1, 2, 64):
        found = run(session, observation[:rows], noise[:rows], *(array[:rows] for array in given))
        assert_close(found, {"actions": expected["actions"][:rows]})
    with torch.no_grad():
        decided = module.decide(*map(torch.from_numpy, (observation, noise[:, 0], *given)))
    assert_close({"actions": decided[0].numpy()}, expected)
    plain = numpy_policy(weights, spec, config, observation, noise)["actions"]
    assert np.abs(expected["actions"] - plain).mean() > 0.01
    assert check_graph(graph).opset == OPSET


@pytest.mark.slow
@pytest.mark.parametrize("kind", WITH_PREFIX)
@pytest.mark.parametrize("solver", PREFIX_SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [1, 1000], ids=["small", "large"])
def test_actions_given_with_weight_one_come_back_within_the_bounds_whatever_the_network_says(
    kind: str, solver: Solver, grid: str, size: float
) -> None:
    config = KINDS[kind]
    spec = make_spec(3 * EVALUATIONS[solver], config=config, solver=solver, time_grid=GRIDS[grid])
    module, _ = trained(spec, config, takes_prefix=True)
    last = module.networks.deployed.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.weight *= size
    (observation, noise), (prefix, _) = inputs(spec), some_prefixes(spec, 64)
    session, expected = start(build_graph(module, spec)), clipped(spec, prefix)
    free = run(session, observation, noise)["actions"]
    for count in (1, 2, 3):
        weight = np.broadcast_to(np.arange(3) < count, (64, 3))
        found = run(session, observation, noise, prefix, weight)["actions"]
        # Three roundings of numbers up to 3, and the last steps of a grid enlarge those of Adams-Bashforth.
        np.testing.assert_allclose(found[:, :count], expected[:, :count], rtol=0, atol=5e-6)
        assert (np.abs(free - expected).max(axis=(1, 2)) > 0.01).all()


def test_a_prefix_of_weight_zero_is_of_no_consequence() -> None:
    for kind in WITH_PREFIX:
        spec = make_spec(config=KINDS[kind])
        (observation, noise), (prefix, _) = inputs(spec), some_prefixes(spec, 64)
        found = run(session_of(kind), observation, noise, 100 * prefix, np.zeros((64, 3)))["actions"]
        assert np.array_equal(found, run(session_of(kind), observation, noise)["actions"])
        plain = run(start(exported(spec, KINDS[kind])[0]), observation, noise)["actions"]
        # Denoised actions are written out, added to nothing and divided by what is left of the time.
        np.testing.assert_allclose(found, plain, rtol=0, atol=2e-6)


def test_every_row_continues_its_own_prefix_with_its_own_weights() -> None:
    for kind in WITH_PREFIX:
        spec, session = make_spec(config=KINDS[kind]), session_of(kind)
        (observation, noise), given = inputs(spec, 9), some_prefixes(spec, 9)
        together = run(session, observation, noise, *given)["actions"]
        for row in range(9):
            part = slice(row, row + 1)
            alone = run(session, observation[part], noise[part], *(array[part] for array in given))["actions"]
            np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=2e-6)


def test_a_graph_that_is_told_how_the_chunk_begins_has_two_inputs_more() -> None:
    session = start(exported_kind("takes_prefix")[0])
    assert [(node.name, node.type, node.shape) for node in session.get_inputs()] == [
        ("observation", "tensor(float)", ["batch", 3]),
        ("noise", "tensor(float)", ["batch", 6]),
        ("prefix", "tensor(float)", ["batch", 3, 2]),
        ("prefix_weight", "tensor(float)", ["batch", 3]),
    ]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("actions", ["batch", 3, 2])]


@pytest.mark.parametrize(
    ("low", "high", "offset", "scale"),
    [
        ((-np.inf, -np.inf), (np.inf, np.inf), (0.3, -5.0), (1.0, 2.0)),
        ((-np.inf, 0.1), (0.7, np.inf), (0.3, 0.6), (1.0, 2.0)),
        ((-0.1, -0.1), (0.1, 0.1), (0.0, 0.0), (1.0, 1.0)),
        ((0.1, 1e6), (0.3, 1e6 + 1), (0.2, 1e6 + 0.5), (0.1, 0.5)),
    ],
)
def test_a_prefix_in_any_units_is_clipped_to_the_narrower_of_scale_and_bounds(
    low: tuple[float, ...], high: tuple[float, ...], offset: tuple[float, ...], scale: tuple[float, ...]
) -> None:
    changes = {"action": BoxSpec((2,), "float32", low, high), "action_offset": offset, "action_scale": scale}
    spec = make_spec(**changes)
    session = start(exported(spec, takes_prefix=True)[0])
    (observation, noise), (prefix, _) = inputs(spec), some_prefixes(spec, 64)
    prefix[0], prefix[1] = np.finfo(np.float32).max, np.finfo(np.float32).min
    found = run(session, observation, noise, prefix, np.ones((64, 3)))["actions"]
    np.testing.assert_allclose(found, clipped(spec, prefix), rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize(("precision", "largest", "usual"), [("int8", 0.15, 0.02), ("fp16", 6e-3, 6e-4)])
@pytest.mark.parametrize("kind", WITH_PREFIX)
def test_with_rounded_weights_a_chunk_is_continued_nearly_the_same(
    kind: str, precision: Precision, largest: float, usual: float
) -> None:
    spec = make_spec(config=KINDS[kind])
    (observation, noise), (prefix, weight) = inputs(spec), some_prefixes(spec, 64)
    graphs = (session_of(kind), start(exported_kind(kind, precision)[0]))
    exact, found = (run(g, observation, noise, prefix, weight)["actions"] / np.array(spec.action_scale) for g in graphs)
    error = np.abs(found - exact)
    assert 1e-6 < error.max() < largest
    assert np.sqrt((error**2).mean()) < 2 * usual
    given = weight == 1
    assert given.sum() > 30
    assert error[given].max() < 5e-6  # what is given passes through no rounded weight


def test_what_cannot_take_a_prefix_is_refused() -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("qam", {"solver": "heun"}, "solver is heun; expected one of euler, ab2, midpoint"),
        ("qam", {"solver": "rk4"}, "solver is rk4; expected one of euler, ab2, midpoint"),
        ("one step", {}, "Only a flow that draws one chunk, without an edit policy, .* Export it without rtc"),
        ("me-am, best of 3", {}, "Only a flow that draws one chunk"),
        ("qam-edit, confined", {}, "Only a flow that draws one chunk"),
    ]
    for kind, changes, message in refused:
        spec = make_spec(config=KINDS[kind], **changes)
        module, _ = trained(spec, KINDS[kind])
        with pytest.raises(ConfigError, match=message):
            PolicyModule(module.networks, spec, one_step=kind == "one step", takes_prefix=True)


# Two ways to go


@cache
def two_ways() -> tuple[PolicySpec, bytes, bytes, np.ndarray]:
    """A network fitted to chunks near one of two others, m and -m; its plain graph, that which is told, and m."""
    chunk_size = 6
    way = 0.7 * (-1.0) ** np.arange(2 * chunk_size)
    # A plain field, which these few updates fit a little better.
    config = TrainConfig.preset("bc", SIZES, hidden_dims=(64, 64), fourier_features=0, precondition=False)
    spec = make_spec(10, (-2.0, 0.5), (1.0, 0.75), config, chunk_size=chunk_size, solver="midpoint")
    torch.manual_seed(0)
    networks = build_networks(spec, config)
    field, mode = networks.deployed, torch.from_numpy(way).float()
    optimizer = torch.optim.Adam(field.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    features = torch.zeros(256, networks.encoder.output_dim)
    for _ in range(600):
        x_0, t = torch.randn(256, len(way)), torch.rand(256, 1)
        x_1 = mode * (2 * (torch.rand(256, 1) < 0.5).float() - 1) + 0.05 * torch.randn_like(x_0)
        loss = (field(features, (1 - t) * x_0 + t * x_1, t) - (x_1 - x_0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    plain, told = (build_graph(PolicyModule(networks, spec, takes_prefix=told), spec) for told in (False, True))
    return spec, plain, told, way.reshape(chunk_size, 2)


@pytest.mark.slow
def test_a_chunk_goes_on_the_way_that_most_of_it_was_given_for_every_noise() -> None:
    spec, plain, told, way = two_ways()
    offset, scale = np.array(spec.action_offset), np.array(spec.action_scale)
    observation = np.broadcast_to(np.array(spec.observation_mean, np.float32), (1000, 3))
    noise = draw_noise(spec, 1000, seed=0)[:, None]
    free = (run(start(plain), observation, noise)["actions"] - offset) / scale
    share = ((free * way).mean(axis=(1, 2)) > 0).mean()
    assert 0.3 < share < 0.7
    weight = np.broadcast_to(np.array([1, 1, 1, 1, 1, 0]), (1000, 6))
    for sign in (1, -1):
        prefix = np.broadcast_to(offset + scale * sign * way, (1000, 6, 2))
        found = (run(start(told), observation, noise, prefix, weight)["actions"] - offset) / scale
        np.testing.assert_allclose(found[:, :5], np.broadcast_to(sign * way[:5], (1000, 5, 2)), atol=1e-5)
        assert ((found[:, 5:] * sign * way[5:]).mean(axis=(1, 2)) > 0).all()
        # Of what a free chunk would put there, much is on the other way.
        assert ((free[:, 5:] * sign * way[5:]).mean(axis=(1, 2)) < 0).mean() > 0.3


# Bounds


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 1e4))
def test_actions_stay_within_the_bounds_for_any_input(seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    observation = (size * generator.standard_normal((4, 3))).astype(np.float32)
    for kind, config in KINDS.items():
        noise = (size * generator.standard_normal((4, config.best_of, 6))).astype(np.float32)
        actions = run(session_of(kind), observation, noise)["actions"]
        assert (actions >= np.array([-2.0, 0.5], np.float32)).all()
        assert (actions <= np.array([1.0, 0.75], np.float32)).all()


@cache
def session_of(kind: str) -> onnxruntime.InferenceSession:
    return start(exported_kind(kind)[0])


@pytest.mark.parametrize(
    ("low", "high", "offset", "scale"),
    [
        ((-1.0, -1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 1.0)),
        ((-np.inf, -np.inf), (np.inf, np.inf), (0.3, -5.0), (1.0, 2.0)),
        ((-np.inf, 0.1), (0.7, np.inf), (0.3, 0.6), (1.0, 2.0)),
        ((-0.1, -0.1), (0.1, 0.1), (0.0, 0.0), (1.0, 1.0)),
        ((0.1, 1e6), (0.3, 1e6 + 1), (0.2, 1e6 + 0.5), (0.1, 0.5)),
    ],
)
def test_actions_are_clipped_to_the_narrower_of_scale_and_bounds(
    low: tuple[float, ...], high: tuple[float, ...], offset: tuple[float, ...], scale: tuple[float, ...]
) -> None:
    changes = {"action": BoxSpec((2,), "float32", low, high), "action_offset": offset, "action_scale": scale}
    spec = make_spec(**changes)
    graph, _, weights = exported(spec)
    observation, noise = inputs(spec)
    expected = numpy_policy(weights, spec, CONFIG, observation, noise)["actions"]
    found = run(start(graph), observation, noise)["actions"]
    np.testing.assert_allclose(found, expected, rtol=2e-7, atol=1e-5)
    assert (found >= np.array(low, np.float32)).all()
    assert (found <= np.array(high, np.float32)).all()
    check_graph(graph)
    head = [node.op_type for node in onnx.load_from_string(graph).graph.node][-4:]
    assert ("Mul" in head) == (set(scale) != {1.0})
    assert ("Add" in head) == (set(offset) != {0.0})


# Precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "largest", "usual"), [("int8", 0.15, 0.02), ("fp16", 6e-3, 6e-4)])
def test_rounded_weights_act_nearly_the_same(kind: str, precision: Precision, largest: float, usual: float) -> None:
    spec = make_spec(config=KINDS[kind])
    observation, noise = inputs(
        replace(spec, integration=replace(spec.integration, best_of=1)) if "best" not in kind else spec
    )
    scale = np.array(spec.action_scale)
    exact = run(session_of(kind), observation, noise)["actions"] / scale
    graph = exported_kind(kind, precision)[0]
    found = run(start(graph), observation, noise)["actions"] / scale
    error = np.abs(found - exact).max(axis=(1, 2))
    if spec.integration.best_of > 1:  # another chunk of nearly the same value may be chosen
        error = error[error < 0.3]
        assert len(error) > 0.9 * len(observation)
    assert error.max() < largest
    assert np.sqrt((error**2).mean()) < 2 * usual
    assert error.max() > 1e-6
    summary = check_graph(graph)
    assert ("com.microsoft.MatMulNBits" in summary.operators) == (precision == "int8")


@pytest.mark.parametrize("kind", ["me-am", "qam-edit, confined", "layer norm", "one step"])
def test_float16_weights_take_two_bytes_and_int8_weights_one(kind: str) -> None:
    wide = replace(KINDS[kind], hidden_dims=(256, 256))
    spec = make_spec(config=wide)
    sizes = {p: len(exported(spec, wide, p, kind == "one step")[0]) for p in get_args(Precision)}
    assert sizes["fp16"] < 0.6 * sizes["fp32"]
    assert sizes["int8"] < 0.45 * sizes["fp32"]  # inputs of fewer than 128 numbers are padded
    stored = onnx.load_from_string(exported(spec, wide, "fp16", kind == "one step")[0]).graph.initializer
    hidden = [tensor.data_type for tensor in stored if list(tensor.dims) == [256, 256]]
    assert set(hidden) == {onnx.TensorProto.FLOAT16}


# The same numbers every time


@pytest.mark.slow
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("kind", ["qam", "qam-edit, best of 2", "me-am", "one step"])
def test_repeated_runs_and_any_number_of_threads_give_the_same_bits(kind: str, precision: Precision) -> None:
    wide = replace(KINDS[kind], hidden_dims=(96, 64))
    spec = make_spec(config=wide)
    graph = exported(spec, wide, precision, kind == "one step")[0]
    observation, noise = inputs(spec, 33)
    one, two = start(graph, 1), start(graph, 2)
    first = run(one, observation, noise)
    for again in (run(one, observation, noise), run(two, observation, noise), run(start(graph), observation, noise)):
        assert all(np.array_equal(again[name], array) for name, array in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bc", "qam", "qam-edit, best of 2", "me-am", "me-am, best of 3", "one step"])
@pytest.mark.parametrize("widths", [(12, 10), (96, 64), (256, 256)])
@pytest.mark.parametrize("fourier_features", [0, 16])
def test_in_float32_a_row_is_bit_for_bit_the_same_alone_and_in_any_batch(
    kind: str, widths: tuple[int, ...], fourier_features: int
) -> None:
    # onnxruntime packs constant weights, and multiplies a single row by them as any other.
    config = replace(KINDS[kind], hidden_dims=widths, fourier_features=fourier_features)
    assert_rows_are_the_same_in_any_batch(config, kind == "one step", 0)


@pytest.mark.parametrize("fourier_features", [2, 6, 12])
def test_sines_of_a_number_that_is_no_multiple_of_four_may_differ_in_the_last_bits(fourier_features: int) -> None:
    # onnxruntime takes sines and cosines of four numbers at a time, across rows, and those left over in another way. A
    # multiple of eight features, four cosines and four sines, leaves none over.
    config = replace(KINDS["me-am"], fourier_features=fourier_features)
    assert_rows_are_the_same_in_any_batch(config, False, 5e-6)


def assert_rows_are_the_same_in_any_batch(config: TrainConfig, one_step: bool, tolerance: float) -> None:
    spec = make_spec(config=config)
    session = start(exported(spec, config, one_step=one_step)[0])
    observation, noise = inputs(spec, 33)
    alone = [run(session, observation[i : i + 1], noise[i : i + 1]) for i in range(33)]
    for first, rows in ((0, 2), (0, 17), (5, 17), (0, 33), (30, 3)):
        part = slice(first, first + rows)
        for name, array in run(session, observation[part], noise[part]).items():
            expected = np.concatenate([one[name] for one in alone[part]])
            # Of the critics' batched products onnxruntime takes a single row another way.
            accepted = tolerance if name == "actions" else 1e-5
            assert np.abs(array - expected).max() <= accepted


def test_the_same_weights_make_the_same_bytes() -> None:
    for precision in get_args(Precision):
        kind = "qam-edit, best of 2"
        again = exported(make_spec(config=KINDS[kind]), KINDS[kind], precision)[0]
        assert again == exported_kind(kind, precision)[0]
    assert exported_kind("qam")[0] != exported_kind("me-am")[0]


SCRIPT = """
import hashlib, torch
from meam_export.graph.policy_graph import build_graph
from meam_training.networks.policy_module import PolicyModule
from meam_policy import PolicySpec
from meam_training import TrainConfig
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.meam_networks import build_networks
torch.manual_seed(5)
spec = PolicySpec.from_json(SPEC)
config = TrainConfig.from_json(CONFIG)
print(hashlib.sha256(build_graph(PolicyModule(build_networks(spec, config), spec), spec)).hexdigest())
"""


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    config = KINDS["qam-edit, best of 2"]
    spec = make_spec(config=config)
    torch.manual_seed(5)
    expected = build_graph(PolicyModule(build_networks(spec, config), spec), spec)
    code = f"SPEC, CONFIG = {spec.to_json()!r}, {config.to_json()!r}\n{SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "17"},
    )
    assert done.stdout.strip() == hashlib.sha256(expected).hexdigest()


# What is in the file


ALL_GRAPHS = [(kind, precision) for kind in KINDS for precision in get_args(Precision)]


@pytest.mark.parametrize(("kind", "precision"), ALL_GRAPHS)
def test_every_graph_is_one_plain_self_contained_file(kind: str, precision: Precision) -> None:
    graph = exported_kind(kind, precision)[0]
    summary = check_graph(graph)
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, summary.ir_version) == (IR_VERSION, 9)
    domains = {entry.domain: entry.version for entry in model.opset_import}
    assert domains == {"": OPSET, **({"com.microsoft": 1} if precision == "int8" else {})}
    assert OPSET == 20
    assert not model.functions
    assert not any(tensor.HasField("data_location") for tensor in model.graph.initializer)
    held = {attribute.type for node in model.graph.node for attribute in node.attribute}
    assert held <= {onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT, onnx.AttributeProto.STRING}
    # No two constants hold the same numbers.
    seen = Counter(
        (tensor.data_type, tuple(tensor.dims), tensor.raw_data or tensor.SerializeToString())
        for tensor in model.graph.initializer
    )
    assert max(seen.values()) == 1


@pytest.mark.parametrize(("kind", "precision"), ALL_GRAPHS)
def test_nothing_in_a_graph_tells_of_the_machine_that_wrote_it(kind: str, precision: Precision) -> None:
    graph = exported_kind(kind, precision)[0]
    model = onnx.load_from_string(graph)
    assert (model.producer_name, model.producer_version) == ("meam-policy", "")
    parts = [model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output]
    assert not any(part.doc_string for part in parts)
    assert not any(part.metadata_props for part in [model.graph, *model.graph.node])
    for trace in (str(Path.cwd()), str(Path.home()), os.path.dirname(torch.__file__), ".py", "torch", "/usr"):
        assert trace.encode() not in graph


def test_every_operator_is_used() -> None:
    for kind, precision in ALL_GRAPHS:
        graph = onnx.load_from_string(exported_kind(kind, precision)[0]).graph
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        written = {name for node in graph.node for name in node.output} | {t.name for t in graph.initializer}
        assert written <= read


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "three hidden layers"])
def test_the_graph_holds_the_weights_that_act_and_no_others(kind: str) -> None:
    graph, module, _ = exported_kind(kind)
    networks = module.networks
    acting = [*networks.deployed.parameters(), networks.encoder.frequencies]
    if module.one_step:
        assert networks.one_step is not None
        acting = [*networks.one_step.parameters(), networks.encoder.frequencies]
    elif networks.edit_policy is not None:
        acting += [p for name, p in networks.edit_policy.named_parameters() if not name.startswith("log_")]
    if KINDS[kind].best_of > 1:
        acting += list(networks.target_critic.parameters())
    stored = sum(int(np.prod(t.dims)) for t in onnx.load_from_string(graph).graph.initializer)
    needed = sum(p.numel() for p in acting)
    assert needed - 40 <= stored < needed + 150  # and a few constants; scales of norms are in the next layer's weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qam", "me-am", "me-am, plain"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_adds_a_row_of_biases_and_its_operators_to_the_file_and_no_weights(kind: str, solver: Solver) -> None:
    width, together = 64, EVALUATIONS[solver]
    config = replace(KINDS[kind], hidden_dims=(width, width))
    sizes = [len(exported(make_spec(n * together, config=config, solver=solver), config)[0]) for n in (2, 12, 32)]
    per_step = [(b - a) / n / together for (a, b), n in zip(itertools.pairwise(sizes), (10, 20), strict=True)]
    assert max(per_step) < 4 * width + 900
    field = trained(make_spec(config=config), config)[0].networks.deployed
    weights = 4 * sum(parameter.numel() for parameter in field.parameters())
    assert sizes[0] < 2 * weights


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("precondition", [False, True])
def test_free_euler_steps_are_one_gemm_a_layer_and_their_activations(
    precondition: bool, layers: int, steps: int
) -> None:
    config = replace(CONFIG, hidden_dims=(6,) * layers, precondition=precondition)
    found = check_graph(exported(make_spec(steps, config=config), config)[0]).operators
    split = {"Split": 1} if steps > 1 else {}
    assert dict(found) == {
        # Encoder: normalisation and Fourier features.
        **{"Sub": 1, "Div": 1, "MatMul": 1, "Cos": 1, "Sin": 1, "Concat": 1},
        # The network, every step, and once the observation's share of its first layer.
        "Gemm": steps * (layers + 1) + 1,
        "Gelu": steps * layers,
        # Biases of all first layers in one addition; of the last layers in one; the action's offset.
        **{"Unsqueeze": 1, "Add": 2 if precondition and steps == 1 else 3, **split},
        # Scaling: one Reshape here, one for the biases.
        **{"Reshape": 2, "Mul": 1, "Max": 1, "Min": 1},
    }


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 25])
@pytest.mark.parametrize("kind", ["me-am, plain", "me-am"])
def test_confined_euler_steps_clip_once_each(kind: str, steps: int) -> None:
    config = KINDS[kind]
    found = check_graph(exported(make_spec(steps, config=config, solver="euler"), config)[0]).operators
    assert found["Gemm"] == 3 * steps + 1
    assert found["Clip"] == steps + 1  # one bounds the observation
    if kind == "me-am":
        # The two of every graph, and at every step but the last two: a step's constant is not the next one's.
        assert found["Add"] == 2 + 2 * (steps - 1)
    else:
        # The two of every graph, the velocity's bias at the beginning, and every step but the last.
        assert found["Add"] == 3 + (steps - 1)
    assert found["Mul"] == found["Sub"] == 1


def test_biases_of_zero_are_not_added() -> None:
    config = KINDS["me-am, plain"]
    spec = make_spec(config=config)
    module, _ = trained(spec, config)
    with_biases = check_graph(build_graph(module, spec)).operators
    last = module.networks.deployed.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        last.bias.zero_()
    graph = build_graph(module, spec)
    assert check_graph(graph).operators["Add"] == with_biases["Add"] - 1
    weights = {name: value.double().numpy() for name, value in module.networks.state_dict().items()}
    observation, noise = inputs(spec)
    assert_close(run(start(graph), observation, noise), numpy_policy(weights, spec, config, observation, noise))


# Metadata


def test_the_graph_carries_the_contract_of_its_policy() -> None:
    spec = make_spec(
        observation_names=("x", "y", "z"),
        action_names=("hip", "knee"),
        environment_id="tests/Leg-v0",
        license="MIT",
        control_rate_hz=50.0,
    )
    metadata = check_graph(exported(spec)[0]).metadata
    assert metadata == {
        "spec_sha256": spec.identity,
        "method": "qam",
        "environment_id": "tests/Leg-v0",
        "license": "MIT",
        "chunk_size": "3",
        "execute_steps": "2",
        "nfe": "4",
        "solver": "euler",
        "control_rate_hz": "50.0",
        "observation_names": "x,y,z",
        "action_names": "hip,knee",
    }
    assert metadata == graph_metadata(spec)
    assert graph_metadata(spec, ("left", "right")) == {**metadata, "joint_names": "left,right"}


def test_the_keys_of_a_dict_observation_are_named_and_what_is_unknown_is_left_out() -> None:
    boxes = tuple(BoxSpec((n,), "float32", (-1.0,) * n, (1.0,) * n, key=key) for key, n in (("arm", 2), ("ball", 1)))
    metadata = graph_metadata(make_spec(observation=boxes))
    assert (metadata["observation_keys"], metadata["observation_sizes"]) == ("arm,ball", "2,1")
    assert set(metadata) == {
        *("spec_sha256", "method", "chunk_size", "execute_steps", "nfe", "solver"),
        *("observation_keys", "observation_sizes"),
    }


def test_the_contract_changes_with_the_policy_and_not_with_its_files() -> None:
    spec = make_spec()
    other = replace(spec, files={"policy.onnx": "0" * 64})
    assert graph_metadata(spec) == graph_metadata(other)
    assert graph_metadata(spec)["spec_sha256"] != graph_metadata(replace(spec, execute_steps=1))["spec_sha256"]
