import json
from types import MappingProxyType

import pytest

from meam_policy import FormatError
from meam_policy.spec import EVALUATIONS, Integration, VariantSpec


def test_the_classical_schemes_take_as_many_evaluations_as_they_have_stages():
    assert EVALUATIONS == {"euler": 1, "ab2": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@pytest.mark.parametrize("solver", EVALUATIONS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_grid_has_one_time_more_than_steps(solver, steps):
    evaluations = steps * EVALUATIONS[solver]
    Integration(evaluations, solver, tuple(i / steps for i in range(steps + 1))).check()
    for times in (steps, steps + 2):
        message = f"time_grid is {times} times; expected {steps + 1}, the boundaries of {steps}"
        with pytest.raises(FormatError, match=message):
            Integration(evaluations, solver, tuple(i / (times - 1) if i else 0.0 for i in range(times))).check()


def test_messages_begin_with_the_prefix_of_the_field():
    for bad in (
        (0, "euler", None),
        (1, "rk5", None),
        (3, "heun", None),
        (1, "euler", (0.0,)),
        (1, "euler", (0.0, 2.0)),
    ):
        with pytest.raises(FormatError, match=r"config\.json: teacher\.(nfe|solver|time_grid) is"):
            Integration(*bad).check("teacher.")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_measured_figure_that_is_not_finite_is_refused_by_name(value):
    variant = VariantSpec("k1.onnx", integration=Integration(1), measured={"action_error": value})
    with pytest.raises(FormatError, match=r'variants\["k1"\]\.measured\["action_error"\] is'):
        variant.check("k1")


@pytest.mark.parametrize("mapping", [dict, MappingProxyType])
def test_variant_survives_its_json_whatever_mapping_holds_its_figures(mapping):
    measured = mapping({"latency_p50_ms": 0.5})
    variant = VariantSpec("k4.onnx", Integration(4, "rk4", (0.0, 1.0), 2), "fp16", measured=measured)
    assert VariantSpec.from_json(json.loads(json.dumps(variant.to_json())), "k4") == variant


@pytest.mark.parametrize("takes_prefix", [False, True])
def test_json_holds_whether_a_variant_takes_a_prefix(takes_prefix):
    variant = VariantSpec("rtc.onnx", integration=Integration(4), takes_prefix=takes_prefix)
    data = json.loads(json.dumps(variant.to_json()))
    assert data["takes_prefix"] is takes_prefix
    assert VariantSpec.from_json(data, "rtc") == variant


@pytest.mark.parametrize("value", [None, 0, 1, "true", [True]])
def test_only_true_or_false_say_it(value):
    data = VariantSpec("rtc.onnx", integration=Integration(4)).to_json() | {"takes_prefix": value}
    with pytest.raises(FormatError, match=r'variants\["rtc"\]\.takes_prefix is .*; expected true or false'):
        VariantSpec.from_json(data, "rtc")
