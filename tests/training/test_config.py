import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy.errors import ConfigError
from meam_training.config import PRESETS, TrainConfig

NAN, INF = math.nan, math.inf
WHOLE = {  # field: smallest value
    "steps": 1,
    "batch_size": 1,
    "num_critics": 1,
    "flow_steps": 1,
    "chunk_size": 1,
    "ascent_candidates": 1,
    "checkpoint_every": 1,
    "log_every": 1,
    "seed": 0,
    "pretrain_steps": 0,
    "ascent_steps": 0,
    "fourier_features": 0,
}
REAL = {  # field: values at the edges that are accepted, and that are not
    "fourier_scale": ([1e-9, 100.0], [0.0, -1.0, NAN, INF]),
    "discount": ([1e-9, 1.0], [0.0, -0.5, 1.0000001, NAN]),
    "learning_rate": ([1e-12, 1.0], [0.0, -1e-3, NAN, INF]),
    "score_eps": ([1e-6, 0.999], [0.0, 1.0, -0.1, NAN]),
    "score_limit": ([1e-6, 1e6], [0.0, -1.0, NAN, INF]),
    "polyak": ([1e-9, 1.0], [0.0, 1.0000001, -0.1, NAN]),
    "ascent_step_size": ([1e-9, 2.0], [0.0, -0.1, NAN, INF]),
    "inverse_temperature": ([0.0, 100.0], [-1e-9, NAN, INF]),
    "entropy_coef": ([0.0, 0.999], [-1e-9, 1.0, NAN]),
    "mixture_weight": ([0.0, 0.999], [-1e-9, 1.0, NAN]),
    "mixture_bandwidth": ([1e-9, 1.0], [0.0, -0.1, NAN, INF]),
    "pessimism": ([0.0, 10.0], [-1e-9, NAN, INF]),
    "gradient_clip": ([0.0, 10.0], [-1e-9, NAN, INF]),
}


def test_the_presets_are_the_three_methods():
    assert list(PRESETS) == ["bc", "qam", "me-am"]
    coefficients = {
        name: (c.inverse_temperature, c.entropy_coef, c.mixture_weight, c.trains_policy)
        for name in PRESETS
        for c in [TrainConfig.preset(name)]
    }
    assert coefficients["bc"] == (0, 0, 0, False)
    assert coefficients["qam"] == (1, 0, 0, True)
    assert min(coefficients["me-am"]) > 0
    assert TrainConfig.preset("me-am") == TrainConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_changes(name):
    config = TrainConfig.preset(name, steps=7, hidden_dims=(3,))
    assert (config.method, config.steps, config.hidden_dims) == (name, 7, (3,))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match='no preset "meam". Did you mean me-am?'):
        TrainConfig.preset("meam")
    with pytest.raises(ConfigError, match='no preset "zzz". Known: bc, qam, me-am'):
        TrainConfig.preset("zzz")


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match='no training setting "learning_rat". Did you mean learning_rate?'):
        TrainConfig.preset("qam", learning_rat=1e-3)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match='no method "qan". Did you mean qam?'):
        TrainConfig(method="qan")  # pyright: ignore[reportArgumentType]


def test_every_number_has_a_range_that_is_tested():
    numbers = {f.name for f in dataclasses.fields(TrainConfig) if type(f.default) in (int, float)}
    assert numbers == set(WHOLE) | set(REAL)


@pytest.mark.parametrize("field", WHOLE)
def test_a_count_must_be_whole_and_large_enough(field):
    others: dict[str, Any] = {} if field == "steps" else {"steps": 10}
    accepted = WHOLE[field]
    assert getattr(TrainConfig(**{**others, field: accepted}), field) == accepted
    for value in (WHOLE[field] - 1, -5, 2.0, "2", None, True):
        with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected a whole number of {accepted} or more"):
            TrainConfig(**{**others, field: value})


@pytest.mark.parametrize("field", REAL)
def test_a_number_must_lie_in_its_range(field):
    accepted, refused = REAL[field]
    for value in accepted:
        assert getattr(TrainConfig.preset("me-am", **{field: value}), field) == value
    for value in [*refused, "0.5", None]:
        with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected a number"):
            TrainConfig(**{field: value})


@pytest.mark.parametrize("field", ["hidden_dims", "critic_hidden_dims"])
@pytest.mark.parametrize("value", [(), (0,), (8, -1), (8.0,), (True,), 8, [8], "8", None])
def test_layers_must_be_a_tuple_of_positive_whole_numbers(field, value):
    with pytest.raises(ConfigError, match=rf"{field} is .*; expected"):
        TrainConfig(**{field: value})


def test_fourier_features_come_in_pairs():
    assert TrainConfig(fourier_features=4).fourier_features == 4
    with pytest.raises(ConfigError, match="fourier_features is 3; expected an even number"):
        TrainConfig(fourier_features=3)


@pytest.mark.parametrize("value", [0, 5, -1, 1.5, True, "2"])
def test_no_more_actions_are_executed_than_predicted(value):
    assert TrainConfig(chunk_size=4, execute_steps=4).execute_steps == 4
    with pytest.raises(ConfigError, match=f"execute_steps is {value!r}; expected .*1 to chunk_size = 4"):
        TrainConfig(chunk_size=4, execute_steps=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_threads_are_counted(value):
    assert (TrainConfig(threads=1).threads, TrainConfig().threads) == (1, None)
    with pytest.raises(ConfigError, match=f"threads is {value!r}; expected a whole number of 1 or more"):
        TrainConfig(threads=value)


def test_pretraining_leaves_updates_for_the_policy():
    assert TrainConfig(steps=10, pretrain_steps=9).pretrain_steps == 9
    with pytest.raises(ConfigError, match="pretrain_steps is 10; expected fewer than steps = 10"):
        TrainConfig(steps=10, pretrain_steps=10)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("bc", "inverse_temperature"),
        ("bc", "entropy_coef"),
        ("bc", "mixture_weight"),
        ("qam", "entropy_coef"),
        ("qam", "mixture_weight"),
    ],
)
def test_a_method_fixes_the_coefficients_that_it_lacks(method, field):
    with pytest.raises(ConfigError, match=rf"{field} is 0\.5.* {method} .*0"):
        TrainConfig.preset(method, **{field: 0.5})


@given(
    st.sampled_from(list(PRESETS)),
    st.fixed_dictionaries(
        {},
        optional={
            "steps": st.integers(10, 10**9),
            "seed": st.integers(0, 2**63),
            "hidden_dims": st.lists(st.integers(1, 4096), min_size=1, max_size=6).map(tuple),
            "learning_rate": st.floats(1e-12, 10),
            "discount": st.floats(1e-12, 1),
            "chunk_size": st.integers(3, 50),
            "execute_steps": st.none() | st.integers(1, 3),
            "device": st.text(),
        },
    ).filter(lambda d: d.get("execute_steps") is None or "chunk_size" in d),
)
def test_settings_survive_json(name, overrides):
    config = TrainConfig.preset(name, **overrides)
    assert TrainConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())) == {f.name for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        "{",
        "null",
        "[]",
        "3",
        '{"steps": "many"}',
        '{"steps": 0}',
        '{"unknown": 1}',
        '{"hidden_dims": 3}',
        '{"hidden_dims": null}',
        '{"learning_rate": NaN}',
        '{"method": ["me-am"]}',
        '{"device": 3}',
        "[" * 100_000,
    ],
)
def test_what_is_not_settings_is_refused(text):
    with pytest.raises(ConfigError):
        TrainConfig.from_json(text)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # pyright: ignore[reportAttributeAccessIssue]
