import types

import numpy as np
import pytest

from meam_policy import ConfigError, DeviceError, IntegrityError, MeamPolicy, VersionError
from meam_policy.inference import latency
from meam_policy.inference.latency import answer_time_ms

TIMES = {None: 8.0, "k5": 4.0, "k3": 2.0, "k1": 1.0, "best": 0.1, "light": 0.2}
ERRORS = {"k5": 0.01, "k3": 0.05, "k1": 0.3, "light": 0.2}


@pytest.fixture
def ladder(make_policy):
    """A policy with four variants close to it, listed in another order, and two without an action error."""
    linear = make_policy()
    for name in ("best", "k1", "k3", "light", "k5"):
        measured = {"action_error": ERRORS[name]} if name in ERRORS else {"latency_p50_ms": 0.0}
        linear.add_variant(name, linear.graph, measured=measured)
    return linear


@pytest.fixture
def timed(monkeypatch):
    """The names of the graphs that were timed, in order."""
    names = []

    def answer_time(policy):
        names.append(policy.variant)
        return TIMES[policy.variant]

    monkeypatch.setattr(latency, "answer_time_ms", answer_time)
    return names


@pytest.mark.parametrize(
    ("budget", "chosen"), [(100, None), (8, None), (7.9, "k5"), (4, "k5"), (3.9, "k3"), (1.9, "light"), (0.2, "light")]
)
def test_the_closest_graph_within_the_budget_is_taken(ladder, timed, budget, chosen):
    policy = ladder.load(latency_budget_ms=budget)
    assert policy.variant == chosen
    closest = [None, "k5", "k3", "light", "k1"]
    assert timed == closest[: closest.index(chosen) + 1]


def test_budget_that_no_graph_keeps_is_refused_with_the_fastest_and_what_to_do(ladder, timed):
    with pytest.raises(DeviceError) as caught:
        ladder.load(latency_budget_ms=0.15)
    assert str(caught.value) == (
        "No graph of the policy answers within 0.15 ms here; the fastest: light 0.2 ms, k1 1 ms, k3 2 ms. "
        "Export variants with fewer steps (`meam export --ladder`), or allow more time."
    )


def test_variant_without_an_action_error_is_never_taken_nor_timed(ladder, timed):
    with pytest.raises(DeviceError) as caught:
        ladder.load(latency_budget_ms=0.1)
    assert "best" not in timed
    assert "best" not in str(caught.value)


def test_policy_without_variants_is_taken_or_refused(make_policy, timed):
    assert make_policy().load(latency_budget_ms=8).variant is None
    with pytest.raises(DeviceError, match="here; the fastest: policy.onnx 8 ms"):
        make_policy().load(latency_budget_ms=7)


@pytest.mark.parametrize("budget", [0, -1, 0.0, float("nan"), float("inf"), -float("inf")])
def test_budget_that_is_not_a_time_is_refused(ladder, timed, budget):
    with pytest.raises(ConfigError, match=f"latency_budget_ms is {budget}; expected milliseconds above 0"):
        ladder.load(latency_budget_ms=budget)
    assert timed == []


def test_variant_and_budget_exclude_each_other_before_anything_is_looked_for(tmp_path):
    with pytest.raises(ConfigError, match='variant="k3" and latency_budget_ms are given; expected at most one'):
        MeamPolicy.from_pretrained(tmp_path / "missing", variant="k3", latency_budget_ms=5)


def test_graph_that_needs_a_newer_onnxruntime_is_left_out_with_a_warning(ladder, timed, light_graph, old_onnxruntime):
    ladder.add_variant("int8", light_graph(), precision="int8", measured={"action_error": 0.001})
    with pytest.warns(
        RuntimeWarning, match=r"int8\.onnx needs onnxruntime 1\.22 or newer, and this is 1\.20\.1: .*left out"
    ) as caught:
        policy = ladder.load(latency_budget_ms=4)
    assert len(caught) == 1
    assert (policy.variant, timed) == ("k5", [None, "k5"])


def test_policy_of_which_every_graph_needs_a_newer_onnxruntime_is_refused(
    make_policy, timed, light_graph, old_onnxruntime
):
    linear = make_policy()
    linear.replace_graph(light_graph())
    with pytest.warns(RuntimeWarning), pytest.raises(VersionError, match=r"policy\.onnx .* 1\.22 or newer"):
        linear.load(latency_budget_ms=4)
    assert timed == []


def test_damaged_graph_is_not_left_out(ladder, timed):
    (ladder.folder / "k5.onnx").write_bytes(b"damaged")
    with pytest.raises(IntegrityError):
        ladder.load(latency_budget_ms=4)


def test_policy_chosen_by_its_time_acts_as_if_nothing_had_been_timed(ladder, monkeypatch):
    monkeypatch.setattr(latency, "_PAUSE_S", 0.0)
    timed, plain = ladder.load(latency_budget_ms=1e6, seed=0), ladder.load(seed=0)
    assert (timed.variant, timed.inferences) == (None, 0)
    for _ in range(3):
        np.testing.assert_array_equal(timed.act(np.ones(3)), plain.act(np.ones(3)))


class Clock:
    """Time that passes only in pauses and runs; every run takes the next of the given milliseconds."""

    def __init__(self, runs_ms):
        self.now, self.pauses, self.runs = 0.0, 0, iter(runs_ms)

    def sleep(self, seconds):
        self.now += seconds
        self.pauses += 1

    def perf_counter(self):
        return self.now

    def run_all(self, observation, noise):
        assert (observation.shape, noise.shape) == ((1, 3), (1, 16))
        self.now += next(self.runs) / 1e3


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([100] * 6 + [2] * 54, 2),  # the first tenth warms up
        ([2] * 6 + [2] * 52 + [50] * 2, 2),  # rare outliers are no answer time
        ([2] * 6 + [2] * 48 + [50] * 6, 50),  # every ninth run is
    ],
)
def test_answer_time_is_the_95th_percentile_of_warm_runs_without_the_pauses(make_spec, monkeypatch, runs, expected):
    clock = Clock(runs)
    monkeypatch.setattr(latency, "time", clock)
    policy = types.SimpleNamespace(spec=make_spec(best_of=2), session=clock)
    assert answer_time_ms(policy) == pytest.approx(expected)  # pyright: ignore[reportArgumentType]
    assert clock.pauses == 60
