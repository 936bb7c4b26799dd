"""What the comparison of a graph with its checkpoint measures, accepts and notices."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

import meam_export.graph.parity as parity_module
from meam_export.graph.parity import TOLERANCES, ParityReport, check_parity, draw_noise, random_observations, reference
from meam_export.graph.policy_graph import build_graph
from meam_policy import BoxSpec, FormatError, MeamError, ParityError, PolicySpec
from meam_policy.inference.session import Optimization, PolicySession
from meam_policy.spec import Integration
from meam_training import TrainConfig
from meam_training.networks.data_statistics import DataStatistics
from meam_training.networks.meam_networks import build_networks
from meam_training.networks.policy_module import PolicyModule

STATISTICS = DataStatistics((0.3, -0.2, 0.1, -0.4), 0.4, -2.0, 3.0)
CONFIG = TrainConfig.preset("me-am", hidden_dims=(16, 16), critic_hidden_dims=(8,), num_critics=2, fourier_features=4)
COUNT = 40
RECORDED = np.random.default_rng(5).normal((0.5, -20.0, 3.0), (0.5, 3.0, 0.1), (30, 3)).astype(np.float32)

Rows = np.ndarray[Any, Any]
Fault = Callable[[Optimization, Rows, Rows, Rows], Rows]
"""Changes what a session returns: its level, the observations, the noise, the actions."""


def make_spec(best_of: int = 1, **changes: Any) -> PolicySpec:
    spec = PolicySpec(
        integration=Integration(nfe=4, solver="midpoint", best_of=best_of),
        observation=(BoxSpec((3,), "float64", (-np.inf,) * 3, (np.inf,) * 3),),
        action=BoxSpec((2,), "float32", (-2.0, 0.5), (1.0, 0.75)),
        chunk_size=2,
        execute_steps=2,
        observation_mean=(0.5, -20.0, 3.0),
        observation_std=(0.5, 3.0, 0.1),
        action_offset=(-0.5, 0.625),
        action_scale=(1.5, 0.125),
        method="me-am",
    )
    return replace(spec, **changes)


def make_module(spec: PolicySpec) -> PolicyModule:
    """Networks in which nothing is zero."""
    networks = build_networks(spec, CONFIG, STATISTICS)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return PolicyModule(networks, spec)


SPEC = make_spec()
MODULE = make_module(SPEC)
GRAPH = build_graph(MODULE, SPEC)
CHOOSING_SPEC = make_spec(best_of=3)
CHOOSING = make_module(CHOOSING_SPEC)


@pytest.fixture
def break_sessions(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], list[tuple[Optimization, int]]]:
    """Puts a fault into every session; returns the list of the runs that follow, by level and batch."""

    def install(fault: Fault) -> list[tuple[Optimization, int]]:
        runs: list[tuple[Optimization, int]] = []

        class Broken(PolicySession):
            def __init__(self, graph: bytes, spec: PolicySpec, *, optimization: Optimization, name: str) -> None:
                super().__init__(graph, spec, optimization=optimization, name=name)
                self.level: Optimization = optimization

            def run_all(
                self, observation: Rows, noise: Rows, prefix: Rows | None = None, prefix_weight: Rows | None = None
            ) -> dict[str, Rows]:
                runs.append((self.level, len(observation)))
                found = super().run_all(observation, noise, prefix, prefix_weight)
                return found | {"actions": fault(self.level, observation, noise, found["actions"])}

        monkeypatch.setattr(parity_module, "PolicySession", Broken)
        return runs

    return install


def check(graph: bytes = GRAPH, module: PolicyModule = MODULE, spec: PolicySpec = SPEC, **options: Any) -> ParityReport:
    return check_parity(graph, module, spec, **{"count": COUNT, **options})


def actions_at(level: Any, graph: bytes, spec: PolicySpec, rows: Rows, noise: Rows) -> Rows:
    """By onnxruntime itself."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    noise = noise.reshape(len(rows), spec.integration.best_of, -1) if spec.integration.best_of > 1 else noise
    found = onnxruntime.InferenceSession(graph, options).run(["actions"], {"observation": rows, "noise": noise})
    return np.asarray(found[0])


def test_the_report_holds_what_an_independent_computation_gives() -> None:
    report = check(observations=RECORDED)
    assert [(row.kind, row.inputs, row.near_ties) for row in report.rows] == [("random", 40, 0), ("recorded", 30, 0)]
    assert (report.precision, report.tolerance, report.inputs) == ("fp32", 1e-5, 70)
    scale, double = np.array(SPEC.action_scale), copy.deepcopy(MODULE).double()
    levels = [getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{name}") for name in ("DISABLE_ALL", "ENABLE_BASIC")]
    levels += [getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{name}") for name in ("EXTENDED", "ALL")]
    for row, rows in zip(report.rows, (random_observations(SPEC, COUNT, seed=0), RECORDED), strict=True):
        noise = draw_noise(SPEC, len(rows), seed=0)
        with torch.no_grad():
            exact = double(torch.tensor(rows).double(), torch.tensor(noise).double()).numpy()
            single = MODULE(torch.tensor(rows), torch.tensor(noise)).numpy()
        errors = [np.abs(actions_at(level, GRAPH, SPEC, rows, noise) - exact) / scale for level in levels]
        # One by one, products are summed in another order.
        assert row.max_error == pytest.approx(np.max(errors), rel=0.5)
        assert row.rms_error == pytest.approx(max(np.sqrt((e**2).mean()) for e in errors), rel=1e-6)
        assert row.torch_error == pytest.approx((np.abs(single - exact) / scale).max(), rel=1e-6)
        assert 0 < row.max_error < 2e-6
    assert report.max_error == max(row.max_error for row in report.rows)
    assert report.rms_error == report.rows[1].rms_error
    assert check().rms_error == check().rows[0].rms_error


def test_the_reference_is_of_double_precision_and_leaves_the_policy_as_it_is() -> None:
    exact = reference(MODULE)
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float64}
    assert {buffer.dtype for buffer in exact.buffers()} == {torch.float64}
    assert {parameter.dtype for parameter in MODULE.parameters()} == {torch.float32}


def test_observations_are_three_times_as_wide_as_the_data_and_noise_is_standard_normal() -> None:
    rows, noise = random_observations(SPEC, 20_000, seed=0), draw_noise(CHOOSING_SPEC, 20_000, seed=0)
    assert rows.dtype == noise.dtype == np.float32
    assert noise.shape == (20_000, 12)
    assert rows.mean(axis=0) == pytest.approx(SPEC.observation_mean, abs=0.2)
    assert rows.std(axis=0) == pytest.approx(3 * np.array(SPEC.observation_std), rel=0.02)
    assert noise.mean(axis=0) == pytest.approx(0, abs=0.03)
    assert noise.std(axis=0) == pytest.approx(1, rel=0.02)
    assert np.array_equal(draw_noise(SPEC, 3, seed=1), draw_noise(SPEC, 3, seed=1))
    assert not np.array_equal(draw_noise(SPEC, 3, seed=1), draw_noise(SPEC, 3, seed=2))


def test_every_level_runs_in_batches_and_one_by_one(break_sessions: Any) -> None:
    runs = break_sessions(lambda _level, _observation, _noise, actions: actions)
    check(observations=RECORDED, count=300)
    for level in get_args(Optimization):
        assert {(level, size) for size in (250, 50, 30, 1)} <= set(runs)
        assert runs.count((level, 1)) == 32


@pytest.mark.parametrize("broken", get_args(Optimization))
@pytest.mark.parametrize("alone", [True, False])
def test_an_error_at_one_level_or_batch_size_is_noticed(break_sessions: Any, broken: str, alone: bool) -> None:
    break_sessions(lambda level, rows, _, found: found + 1e-4 * (level == broken and (len(rows) == 1) == alone))
    with pytest.raises(ParityError, match="half width on random observations; expected at most 1e-05 for fp32"):
        check()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_noticed(break_sessions: Any, value: float) -> None:
    def spoil(_level: Optimization, rows: Rows, _noise: Rows, actions: Rows) -> Rows:
        if len(rows) == 30:  # the last of the recorded ones
            actions[-1, -1, -1] = value
        return actions

    break_sessions(spoil)
    for precision in ("fp32", "int8", "fp16"):
        with pytest.raises(ParityError, match="by (nan|inf) of the action's half width on recorded observations"):
            check(observations=RECORDED, precision=precision)


def edited(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_from_string(GRAPH)
    change(model)
    return model.SerializeToString()


def scale_one_weight(model: onnx.ModelProto) -> None:
    matrix = next(tensor for tensor in model.graph.initializer if list(tensor.dims) in ([16, 16], [4, 16], [16, 4]))
    values = numpy_helper.to_array(matrix).copy()
    values.flat[0] *= 1.02
    matrix.CopyFrom(numpy_helper.from_array(values, matrix.name))


def spoil_one_weight(model: onnx.ModelProto) -> None:
    matrix = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [16, 16])
    values = numpy_helper.to_array(matrix).copy()
    values.flat[0] = np.nan
    matrix.CopyFrom(numpy_helper.from_array(values, matrix.name))


def take_the_exact_gelu(model: onnx.ModelProto) -> None:
    gelus = [node for node in model.graph.node if node.op_type == "Gelu"]
    assert gelus
    for node in gelus:
        assert [(a.name, a.s) for a in node.attribute] == [("approximate", b"tanh")]
        node.attribute[0].s = b"none"


def of_another_policy(**changes: Any) -> bytes:
    """The graph of the same networks under another spec."""
    spec = replace(SPEC, **changes)
    return build_graph(PolicyModule(MODULE.networks, spec), spec)


def with_another_normaliser() -> bytes:
    networks = copy.deepcopy(MODULE.networks)
    with torch.no_grad():
        networks.encoder.mean[1] += 0.01
    return build_graph(PolicyModule(networks, SPEC), SPEC)


def with_swapped_outputs() -> bytes:
    networks = copy.deepcopy(MODULE.networks)
    last = networks.deployed.layers[-1]
    assert isinstance(last, torch.nn.Linear)
    with torch.no_grad():
        for parameter in (last.weight, last.bias):
            parameter.copy_(parameter[[1, 0, 2, 3]])
    return build_graph(PolicyModule(networks, SPEC), SPEC)


WRONG: dict[str, Callable[[], bytes]] = {
    "one weight by 2 %": lambda: edited(scale_one_weight),
    "gelu without tanh": lambda: edited(take_the_exact_gelu),
    "euler": lambda: of_another_policy(integration=replace(SPEC.integration, solver="euler")),
    "heun": lambda: of_another_policy(integration=replace(SPEC.integration, solver="heun")),
    "six steps": lambda: of_another_policy(integration=replace(SPEC.integration, nfe=6)),
    "another grid": lambda: of_another_policy(integration=replace(SPEC.integration, time_grid=(0.0, 0.49, 1.0))),
    "another offset": lambda: of_another_policy(action_offset=(-0.5001, 0.625)),
    "another bound": lambda: of_another_policy(action=BoxSpec((2,), "float32", (-1.9, 0.5), (1.0, 0.75))),
    "another normaliser": with_another_normaliser,
    "swapped outputs": with_swapped_outputs,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_graph_that_computes_something_else_is_refused(name: str) -> None:
    with pytest.raises(ParityError, match=r"policy\.onnx differs from the checkpoint by"):
        check(WRONG[name](), count=200)


def test_the_error_of_another_gelu_is_far_above_the_tolerance_and_far_below_any_notice() -> None:
    with pytest.raises(ParityError) as caught:
        check(WRONG["gelu without tanh"](), count=200)
    (seen,) = re.findall(r"by (\S+) of", str(caught.value))
    assert 1e-4 < float(seen) < 1e-2


def test_weights_that_are_not_finite_never_pass() -> None:
    with pytest.raises((ParityError, FormatError)):
        check(edited(spoil_one_weight))


def test_a_graph_of_other_inputs_is_refused() -> None:
    with pytest.raises(FormatError):
        check(build_graph(CHOOSING, CHOOSING_SPEC))


# Other precisions


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_rounded_weights_pass_and_their_error_is_that_of_rounding(precision: Any) -> None:
    graph = build_graph(MODULE, SPEC, precision)
    report = check(graph, observations=RECORDED, precision=precision, tolerance=1.0)
    exact = check(observations=RECORDED)
    assert (report.precision, report.tolerance) == (precision, 1.0)
    assert 100 * exact.rms_error < report.rms_error < TOLERANCES[precision]


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 1e-4), ("fp16", 1e-6)])
def test_a_rounded_graph_above_the_tolerance_is_refused_with_value_limit_and_remedy(
    precision: Any, tolerance: float
) -> None:
    graph = build_graph(MODULE, SPEC, precision)
    seen = check(graph, observations=RECORDED, precision=precision, tolerance=1.0).rms_error
    check(graph, observations=RECORDED, precision=precision, tolerance=1.01 * seen)
    with pytest.raises(ParityError) as caught:
        check(graph, observations=RECORDED, precision=precision, tolerance=tolerance, name="policy-x.onnx")
    assert str(caught.value) == (
        f"policy-x.onnx differs from the checkpoint by {seen:.2g} of the action's half width on recorded observations; "
        f"expected at most {tolerance:.2g} for {precision}. It was not written. Keep fp32 for this policy, or accept "
        "a larger error with `tolerance`."
    )


def test_other_precisions_are_judged_by_the_mean_square_of_recorded_observations(break_sessions: Any) -> None:
    def one_row_is_wrong(_level: Optimization, _rows: Rows, _noise: Rows, actions: Rows) -> Rows:
        actions[0] += 0.1 * np.array(SPEC.action_scale)
        return actions

    break_sessions(one_row_is_wrong)
    report = check(observations=RECORDED, precision="int8")
    assert report.max_error == pytest.approx(0.1, rel=1e-3)
    assert report.rms_error == pytest.approx(0.1 / 30**0.5, rel=1e-3)
    with pytest.raises(ParityError):
        check(observations=RECORDED)


def test_without_recorded_observations_random_ones_are_judged(break_sessions: Any) -> None:
    break_sessions(lambda _level, rows, _noise, found: found + (len(rows) == COUNT))
    assert check(observations=RECORDED, precision="fp16").rms_error < 1e-6
    with pytest.raises(ParityError, match="on random observations; expected at most 0.005 for fp16"):
        check(precision="fp16")


def test_float32_is_held_to_its_tolerance_where_pytorch_keeps_to_it_too(break_sessions: Any) -> None:
    break_sessions(lambda _level, _rows, _noise, found: found + 3e-5)
    with pytest.raises(ParityError, match="expected at most 1e-05 for fp32"):
        check()
    assert check(tolerance=1e-3).tolerance == 1e-3


# One chunk of several


def values_of(module: PolicyModule, rows: Rows, noise: Rows, dtype: torch.dtype) -> torch.Tensor:
    """Mean values [samples, batch] of every chunk, computed from its actions."""
    spec = CHOOSING_SPEC
    single = PolicyModule(
        copy.deepcopy(module.networks), replace(spec, integration=replace(spec.integration, best_of=1))
    ).to(dtype)
    given = torch.tensor(rows, dtype=dtype)
    with torch.no_grad():
        features, values = single.networks.encoder(given), []
        for part in torch.tensor(noise, dtype=dtype).split(spec.chunk_dim, dim=1):
            x_1 = single.networks.flow(single.networks.deployed, features, part, spec.integration).clamp(-1, 1)
            values.append(single.networks.target_critic(features, x_1).mean(dim=0))
    return torch.stack(values).double()


def shifted(by: float) -> PolicyModule:
    """The same choices, but among values so large that float32 blurs them."""
    module = copy.deepcopy(CHOOSING)
    with torch.no_grad():
        module.networks.target_critic.offset.add_(by)
    return module


def test_chunks_of_nearly_the_same_value_are_left_out_and_counted() -> None:
    module = shifted(3e4)
    report = check(build_graph(module, CHOOSING_SPEC), module, CHOOSING_SPEC, count=400)
    rows, noise = random_observations(CHOOSING_SPEC, 400, seed=0), draw_noise(CHOOSING_SPEC, 400, seed=0)
    exact, rounded = (values_of(module, rows, noise, dtype) for dtype in (torch.float64, torch.float32))
    best = exact.sort(dim=0, descending=True).values
    lost = (exact - rounded).abs().amax(dim=0).maximum(2e-7 * exact.abs().amax(dim=0))
    ties = int((best[0] - best[1] < 4 * lost).sum())
    assert report.rows[0].near_ties == ties
    assert 5 < ties < 200
    # In float32 some of them are chosen otherwise, which is no error.
    assert int((exact.argmax(dim=0) != rounded.argmax(dim=0)).sum()) > 0
    assert report.max_error < 1e-5


def test_hardly_anything_is_left_out_of_values_of_usual_size() -> None:
    report = check(build_graph(CHOOSING, CHOOSING_SPEC), CHOOSING, CHOOSING_SPEC, count=400)
    assert report.rows[0].near_ties <= 2
    assert report.max_error < 1e-5


def test_a_wrong_choice_is_noticed() -> None:
    other = copy.deepcopy(CHOOSING.networks)
    with torch.no_grad():
        for parameter in (other.target_critic.weights[-1], other.target_critic.biases[-1]):
            parameter.neg_()
    worst = PolicyModule(other, CHOOSING_SPEC)
    with pytest.raises(ParityError):
        check(build_graph(worst, CHOOSING_SPEC), CHOOSING, CHOOSING_SPEC)


def test_a_single_wrong_choice_is_noticed_even_where_float32_blurs_the_values(break_sessions: Any) -> None:
    module = shifted(3e4)
    rows, noise = random_observations(CHOOSING_SPEC, COUNT, seed=0), draw_noise(CHOOSING_SPEC, COUNT, seed=0)
    best = values_of(module, rows, noise, torch.float64).sort(dim=0, descending=True)
    clearest = int((best.values[0] - best.values[1]).argmax())
    second = noise.reshape(COUNT, 3, 4)[clearest, best.indices[1, clearest]]
    single = PolicyModule(
        module.networks, replace(CHOOSING_SPEC, integration=replace(CHOOSING_SPEC.integration, best_of=1))
    )
    with torch.no_grad():
        wrong = single(torch.tensor(rows[clearest : clearest + 1]), torch.tensor(second)[None]).numpy()[0]

    def choose_the_second(_level: Optimization, observation: Rows, _noise: Rows, actions: Rows) -> Rows:
        actions[(observation == rows[clearest]).all(axis=1)] = wrong
        return actions

    break_sessions(choose_the_second)
    with pytest.raises(ParityError):
        check(build_graph(module, CHOOSING_SPEC), module, CHOOSING_SPEC)


def test_a_policy_whose_choices_are_all_blurred_is_refused_rather_than_left_unchecked() -> None:
    module = shifted(1e12)
    with pytest.raises(
        ParityError,
        match=r"at more than nine tenths of the inputs, .* two of 3 chunks are equal .* Export with best_of=1",
    ):
        check(build_graph(module, CHOOSING_SPEC), module, CHOOSING_SPEC)


def test_every_refusal_is_one_of_this_package() -> None:
    assert issubclass(ParityError, MeamError)
    with pytest.raises(FormatError):
        check(b"no graph")


def test_a_wrong_value_or_disagreement_is_noticed_though_the_actions_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = build_graph(CHOOSING, CHOOSING_SPEC)
    check(graph, CHOOSING, CHOOSING_SPEC)
    run_all = PolicySession.run_all
    for name in ("value", "disagreement"):

        def broken(session: PolicySession, *inputs: Rows, wrong: str = name) -> dict[str, Rows]:
            found = run_all(session, *inputs)
            return found | {wrong: found[wrong] * np.float32(1.01)}

        monkeypatch.setattr(PolicySession, "run_all", broken)
        with pytest.raises(ParityError, match="differs from the checkpoint"):
            check(graph, CHOOSING, CHOOSING_SPEC)


# With a prefix

TOLD = PolicyModule(MODULE.networks, SPEC, takes_prefix=True)
TOLD_GRAPH = build_graph(TOLD, SPEC)


def test_a_graph_that_is_told_how_the_chunk_begins_passes_and_its_error_is_no_larger() -> None:
    report = check(TOLD_GRAPH, TOLD, observations=RECORDED)
    assert [(row.kind, row.inputs) for row in report.rows] == [("random", 40), ("recorded", 30)]
    assert 0 < report.max_error < 2e-6


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_so_do_its_rounded_weights(precision: Any) -> None:
    report = check(build_graph(TOLD, SPEC, precision), TOLD, observations=RECORDED, precision=precision)
    assert 1e-6 < report.rms_error < TOLERANCES[precision]


def test_it_is_told_chunks_within_the_bounds_with_weights_of_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    run_all, told = PolicySession.run_all, []

    def listening(session: PolicySession, *inputs: Rows) -> dict[str, Rows]:
        told.append(inputs[2:])
        return run_all(session, *inputs)

    monkeypatch.setattr(PolicySession, "run_all", listening)
    check(TOLD_GRAPH, TOLD, count=300)
    prefix, weight = (np.concatenate(parts) for parts in zip(*told, strict=True))
    assert (prefix.dtype, prefix.shape[1:]) == (np.float32, (2, 2))
    assert (weight.dtype, weight.shape[1:]) == (np.float32, (2,))
    low, high = np.array(SPEC.action.low), np.array(SPEC.action.high)
    assert ((prefix >= low - 1e-6) & (prefix <= high + 1e-6)).all()
    assert (np.ptp(prefix, axis=0) > 0.9 * (high - low)).all()
    for value in (0, 1):
        assert 0.15 < (weight == value).mean() < 0.35
    assert ((weight >= 0) & (weight <= 1)).all()


def deaf_to(name: str) -> bytes:
    """The graph, in which zeros take the place of an input."""
    model = onnx.load_from_string(TOLD_GRAPH)
    for node in model.graph.node:
        node.input[:] = ["nothing" if read == name else read for read in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Sub", [name, name], ["nothing"]))
    return model.SerializeToString()


def told_of_another(**changes: Any) -> bytes:
    """The graph of the same networks under another spec."""
    spec = replace(SPEC, **changes)
    return build_graph(PolicyModule(MODULE.networks, spec, takes_prefix=True), spec)


DEAF: dict[str, Callable[[], bytes]] = {
    "a plain graph": lambda: GRAPH,
    "no prefix": lambda: deaf_to("prefix"),
    "no weights": lambda: deaf_to("prefix_weight"),
    "another offset": lambda: told_of_another(action_offset=(-0.5001, 0.625)),
    "another solver": lambda: told_of_another(integration=replace(SPEC.integration, solver="ab2")),
}


@pytest.mark.parametrize("name", DEAF)
def test_a_graph_that_does_not_hear_what_it_is_told_is_refused(name: str) -> None:
    with pytest.raises(ParityError, match=r"policy\.onnx differs from the checkpoint by"):
        check(DEAF[name](), TOLD)
