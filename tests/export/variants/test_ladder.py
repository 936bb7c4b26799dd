"""What is measured of variants, and its picture."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import wasserstein_distance

from meam_export import export_policy
from meam_export.graph.parity import check_parity, draw_noise, random_observations
from meam_export.graph.policy_graph import build_graph
from meam_export.variants.build import BuiltVariant, build_variant
from meam_export.variants.ladder import FIGURES, LadderTask, measure_ladder, sliced_wasserstein
from meam_export.variants.ladder_figure import draw_ladder, ladder_figure
from meam_policy import BoxSpec, MeamPolicy, PolicySpec, make_environment, rollout
from meam_policy.spec import Integration, VariantSpec
from meam_training import Checkpoint, OfflineDataset, TrainConfig, collect, train
from meam_training.networks.meam_networks import MeamNetworks, build_networks
from meam_training.networks.policy_module import PolicyModule

SIZES: dict[str, Any] = {"hidden_dims": (16,), "critic_hidden_dims": (8,), "num_critics": 2, "chunk_size": 1}
CONFIG = TrainConfig.preset("me-am", **SIZES)
SPEC = PolicySpec(
    integration=Integration(nfe=4, solver="midpoint"),
    observation=(BoxSpec((2,), "float32", (-9.0,) * 2, (9.0,) * 2),),
    action=BoxSpec((1,), "float32", (-1.0,), (4.0,)),
    chunk_size=1,
    execute_steps=1,
    observation_mean=(0.0, 1.0),
    observation_std=(1.0, 2.0),
    action_offset=(1.5,),
    action_scale=(2.5,),
    method="me-am",
)
ROWS = np.random.default_rng(3).normal(size=(70, 2)).astype(np.float32)
TIMES = {"latency_p50_ms", "latency_p99_ms"}


def make_networks(spec: PolicySpec = SPEC) -> MeamNetworks:
    networks = build_networks(spec, CONFIG)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return networks


def build(networks: MeamNetworks, spec: PolicySpec, *names: str) -> list[BuiltVariant]:
    module = PolicyModule(networks, spec)
    graph = build_graph(module, spec)
    own = VariantSpec(
        "policy.onnx",
        integration=Integration(
            spec.integration.nfe, spec.integration.solver, spec.integration.time_grid, spec.integration.best_of
        ),
    )
    policy = BuiltVariant("policy", own, graph, spec, module, check_parity(graph, module, spec, ROWS))
    return [build_variant(name, networks, policy, ROWS, tolerance=1.0) for name in names]


def in_torch(networks: MeamNetworks, spec: PolicySpec, rows: np.ndarray, noise: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return PolicyModule(networks, spec)(torch.from_numpy(rows), torch.from_numpy(noise)).numpy()


@pytest.mark.slow
def test_errors_are_those_of_an_independent_computation() -> None:
    networks = make_networks()
    variants = build(networks, SPEC, "k1", "k2-midpoint", "int8")
    measured = measure_ladder(variants, networks, SPEC, ROWS)
    noise = draw_noise(SPEC, len(ROWS), seed=3)
    trained = in_torch(networks, SPEC, ROWS, noise)
    # Euler's method with steps as short as these is exact too.
    exact = in_torch(
        networks, replace(SPEC, integration=replace(SPEC.integration, nfe=4000, solver="midpoint")), ROWS, noise
    )
    for name, steps, solver in (("k1", 1, "euler"), ("k2-midpoint", 2, "midpoint")):
        found = in_torch(
            networks, replace(SPEC, integration=replace(SPEC.integration, nfe=steps, solver=solver)), ROWS, noise
        )
        rms = [np.sqrt((((found - other) / 2.5) ** 2).mean()) for other in (trained, exact)]
        assert measured[name]["action_error"] == pytest.approx(rms[0], rel=1e-4)
        assert measured[name]["ode_error"] == pytest.approx(rms[1], rel=1e-3)
        assert measured[name]["action_error"] > 1e-3
        assert abs(rms[0] - rms[1]) > 1e-4
    assert [measured[v.name]["parity_error"] for v in variants] == [v.parity.rms_error for v in variants]
    assert measured["int8"]["action_error"] == pytest.approx(measured["int8"]["parity_error"], rel=0.5)


def test_the_distance_is_the_mean_over_observations_of_that_in_one_dimension() -> None:
    networks = make_networks()
    measured = measure_ladder(build(networks, SPEC, "k1", "k2"), networks, SPEC, ROWS)
    rows = np.repeat(ROWS[:64], 64, axis=0)
    noise = draw_noise(SPEC, len(rows), seed=4)
    trained = in_torch(networks, SPEC, rows, noise).reshape(64, 64) / 2.5
    for name, spec in (
        ("k1", replace(SPEC, integration=replace(SPEC.integration, nfe=1, solver="euler"))),
        ("k2", replace(SPEC, integration=replace(SPEC.integration, nfe=2))),
    ):
        found = in_torch(networks, spec, rows, noise).reshape(64, 64) / 2.5
        expected = np.mean([wasserstein_distance(a, b) for a, b in zip(found, trained, strict=True)])
        assert measured[name]["sliced_w1"] == pytest.approx(expected, rel=1e-3)
        assert 1e-3 < expected < measured[name]["action_error"] * 1.5


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 30), dim=st.integers(1, 4))
def test_the_sliced_distance_is_the_mean_of_that_of_the_projections(seed: int, size: int, dim: int) -> None:
    generator = np.random.default_rng(seed)
    one, other = generator.normal(size=(size, dim)), 1 + generator.normal(size=(size, dim))
    directions = generator.normal(size=(3, dim))
    expected = np.mean([wasserstein_distance(one @ d, other @ d) for d in directions])
    assert sliced_wasserstein(one, other, directions) == pytest.approx(expected, rel=1e-9)
    assert sliced_wasserstein(one, one[::-1], directions) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2, 10])
def test_a_move_of_every_number_counts_much_the_same_in_any_dimension(dim: int) -> None:
    # A chunk of so many numbers, of which all move by 0.1: E|<d, 1>| over unit vectors d goes from 1 to sqrt(2 / pi).
    config = TrainConfig.preset("bc", SIZES, chunk_size=dim, confine=False)
    spec = replace(SPEC, integration=Integration(1), chunk_size=dim, method="bc")
    networks = build_networks(spec, config)
    with torch.no_grad():
        for parameter in networks.deployed.parameters():
            parameter.zero_()
    (variant,) = build(networks, spec, "k1-grid")
    moved = build_networks(spec, config)
    moved.load_state_dict(networks.state_dict())
    with torch.no_grad():
        moved.deployed.layers[-1].bias.fill_(0.1)  # pyright: ignore[reportCallIssue]
    figures = measure_ladder([variant], moved, spec, ROWS)["k1-grid"]
    unclipped = 0.68  # of normal noise within [-1, 1]
    assert 0.6 * unclipped < figures["sliced_w1"] / 0.1 < 1.05


def test_the_policy_itself_has_no_error() -> None:
    networks = make_networks()
    figures = measure_ladder(build(networks, SPEC, "k4"), networks, SPEC, ROWS)["k4"]
    assert figures["action_error"] < 1e-6
    assert figures["sliced_w1"] < 1e-6
    assert figures["ode_error"] > 1e-4  # it is no exact solution, and need not be


def test_without_recorded_observations_random_ones_are_taken() -> None:
    networks = make_networks()
    variants = build(networks, SPEC, "k1")
    drawn = random_observations(SPEC, 512, seed=3)
    found, expected, other = (
        measure_ladder(variants, networks, SPEC, rows)["k1"]["action_error"] for rows in (None, drawn, ROWS)
    )
    assert found == expected != other


@pytest.mark.slow
def test_a_variant_that_chooses_otherwise_has_times_but_no_errors() -> None:
    spec = replace(SPEC, integration=replace(SPEC.integration, best_of=2))
    networks = make_networks(spec)
    measured = measure_ladder(build(networks, spec, "best-of-4", "best-of-1", "k2"), networks, spec, ROWS)
    assert set(measured["best-of-4"]) == set(measured["best-of-1"]) == TIMES | {"parity_error"}
    assert set(measured["k2"]) == TIMES | {"parity_error", "action_error", "ode_error", "sliced_w1"}
    assert set(FIGURES) >= set(measured["k2"])
    for figures in measured.values():
        assert 0 < figures["latency_p50_ms"] <= figures["latency_p99_ms"]


# Returns


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    dataset = OfflineDataset.from_minari(collect("meam/Pockets-v0", 100, root=tmp_path_factory.mktemp("data")))
    config = TrainConfig.preset("me-am", steps=3, batch_size=8, nfe=2, device="cpu", **SIZES)
    return train(config, dataset, tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_figures_are_recorded_and_returns_are_those_of_a_rollout(checkpoint: Checkpoint, tmp_path: Path) -> None:
    env = make_environment("meam/Pockets-v0")
    task = LadderTask(env, episodes=2, seed=3)
    names = ("k1", "best-of-2", "k2")
    folder = export_policy(checkpoint, tmp_path / "policy", variants=names, task=task)
    spec = PolicySpec.from_json((folder / "config.json").read_bytes())
    recorded = json.loads((folder / "config.json").read_text())["variants"]
    for name, variant in spec.variants.items():
        result = rollout(MeamPolicy.from_pretrained(folder, variant=name), env, 2, 3)
        figures = dict(variant.measured)
        assert figures == recorded[name]["measured"]
        assert set(figures) <= set(FIGURES)
        assert figures["return_mean"] == result.return_mean
        assert (figures["return_low"], figures["return_high"]) == result.return_interval
        assert figures["success"] == result.success_rate
    assert PolicySpec.from_json(spec.to_json()) == spec
    assert (folder / "ladder.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    env.close()


def test_where_no_task_is_given_no_return_is_recorded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = export_policy(checkpoint, tmp_path / "policy", variants=("k1",))
    measured = MeamPolicy.from_pretrained(folder).spec.variants["k1"].measured
    assert not set(measured) & {"return_mean", "return_low", "return_high", "success"}


# The picture


def entry(steps: int, error: float | None, **changes: Any) -> VariantSpec:
    measured = {"latency_p50_ms": 0.01 * steps, "latency_p99_ms": 0.02 * steps, "parity_error": 1e-7}
    measured |= {} if error is None else {"action_error": error}
    measured |= changes.pop("returns", {})
    how = {name: changes.pop(name) for name in ("time_grid", "best_of") if name in changes}
    return replace(VariantSpec("policy-x.onnx", Integration(steps, **how), measured=measured), **changes)


RETURNS = {"return_mean": -3.0, "return_low": -4.0, "return_high": -1.0}
EVERY_KIND = {
    "k1": entry(1, 0.5, returns=RETURNS),
    "k5": entry(5, 0.0, returns=RETURNS),
    "k5-int8": entry(5, 0.04, precision="int8"),
    "k2-grid": entry(2, 0.01, time_grid=(0.0, 0.7, 1.0)),
    "one-step": entry(1, 0.2, one_step=True),
    "best-of-4": entry(5, None, best_of=4, returns=RETURNS),
    "k2-fp16": entry(2, 3.0, precision="fp16"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "panels"),
    [(list(EVERY_KIND), 3), (["k2-grid", "k5-int8"], 2), (["best-of-4"], 2), (["k5"], 3), (["one-step"], 2)],
)
def test_the_picture_has_a_panel_for_every_kind_of_figure(names: list[str], panels: int) -> None:
    image = draw_ladder({name: EVERY_KIND[name] for name in names})
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert width == pytest.approx(4.6 * 110 * panels, abs=2)
    assert height == pytest.approx(4.2 * 110, abs=2)
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("L"))
    for panel in np.array_split(pixels, panels, axis=1):
        assert (panel < 200).sum() > 1000  # something is drawn in every one


@pytest.mark.slow
def test_the_picture_depends_on_the_figures_only() -> None:
    assert draw_ladder(EVERY_KIND) == draw_ladder(EVERY_KIND)
    assert draw_ladder(EVERY_KIND) != draw_ladder({**EVERY_KIND, "k1": entry(1, 0.4, returns=RETURNS)})


def test_variants_on_one_point_are_all_seen_and_named() -> None:
    """A prefix of no weight changes nothing, so that the variant which takes one lies where the other does."""
    measured = {"action_error": 0.01, "latency_p50_ms": 0.1, "latency_p99_ms": 0.2}
    alike = VariantSpec("policy-x.onnx", integration=Integration(4, "midpoint"), measured=measured)
    variants = {
        "k1": entry(1, 0.5),
        "k4-midpoint": alike,
        "k4-midpoint-rtc": replace(alike, takes_prefix=True),
        "k4-midpoint-rtc-int8": replace(alike, takes_prefix=True, precision="int8"),
    }
    figure = ladder_figure(variants)
    for axes in figure.axes:
        drawn = [line for line in axes.get_lines() if line.get_marker() not in ("None", "")]
        there = [line for line in drawn if np.array_equal(line.get_xdata(), [4])]
        assert len(drawn) == len(variants)
        assert len({line.get_markersize() for line in there}) == 3
        outer = sorted(there, key=lambda line: line.get_markersize())[1:]
        assert [line.get_markerfacecolor() for line in outer] == ["none", "none"]
    named = {text.get_text() for text in figure.legends[0].get_texts()}
    assert named == {"euler, fp32", "midpoint, fp32", "rtc, fp32", "rtc, int8"}
