import dataclasses
import json
import math
import re
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meam_policy.errors import ConfigError
from meam_training.config import PRESETS, TrainConfig
from meam_training.config.declaration import Range

NAN, INF = math.nan, math.inf
WHOLE = {  # field: smallest value
    "steps": 1,
    "batch_size": 1,
    "num_critics": 1,
    "nfe": 1,
    "best_of": 1,
    "chunk_size": 1,
    "candidates": 4,
    "likelihood_steps": 1,
    "divergence_probes": 1,
    "mirror_stages": 1,
    "ascent_starts": 1,
    "checkpoint_every": 1,
    "log_every": 1,
    "keep_checkpoints": 1,
    "evaluate_episodes": 1,
    "updates_per_step": 1,
    "evaluate_every": 0,
    "online_steps": 0,
    "online_warmup": 0,
    "seed": 0,
    "ascent_steps": 0,
    "fourier_features": 0,
}
REAL = {  # field: values at the edges that are accepted, and that are not
    "fourier_scale": ([1e-9, 100.0], [0.0, -1.0, NAN, INF]),
    "observation_limit": ([1e-9, 1e9], [0.0, -1.0, NAN, INF]),
    "discount": ([1e-9, 1.0], [0.0, -0.5, 1.0000001, NAN]),
    "learning_rate": ([1e-12, 1.0], [0.0, -1e-3, NAN, INF]),
    "score_eps": ([1e-6, 0.999], [0.0, 1.0, -0.1, NAN]),
    "score_limit": ([1e-6, 1e6], [0.0, -1.0, NAN, INF]),
    "switch_time": ([1e-6, 0.999], [0.0, 1.0, -0.1, NAN]),
    "polyak": ([1e-9, 1.0], [0.0, 1.0000001, -0.1, NAN]),
    "ascent_step_size": ([1e-9, 2.0], [0.0, -0.1, NAN, INF]),
    "inverse_temperature": ([0.0, 100.0], [-1e-9, NAN, INF]),
    "entropy_coef": ([0.0, 0.999], [-1e-9, 1.0, NAN]),
    "mixture_weight": ([0.0, 0.999], [-1e-9, 1.0, NAN]),
    "mixture_bandwidth": ([1e-9, 1.0], [0.0, -0.1, NAN, INF]),
    "ascent_spread": ([0.0, 2.0], [-1e-9, NAN, INF]),
    "trust_radius": ([1e-9, 10.0], [0.0, -0.1, NAN, INF]),
    "edit_scale": ([1e-9, 2.0], [-1e-9, NAN, INF]),
    "distill_coef": ([0.0, 300.0], [-1e-9, NAN, INF]),
    "pessimism": ([0.0, 10.0], [-1e-9, NAN, INF]),
    "value_penalty": ([0.0, 10.0], [-1e-9, NAN, INF]),
    "gradient_clip": ([0.0, 10.0], [-1e-9, NAN, INF]),
}
EFFECTIVE: dict[str, dict[str, Any]] = {  # what it takes, beside the me-am preset, for a setting to have an effect
    "fourier_scale": {"fourier_features": 4},
    "sde": {"objective": "adjoint"},
    "sde_steps": {"objective": "adjoint", "sde": "reference"},
    "bridge_adjoint": {"objective": "bridge"},
    "candidates": {"objective": "reweighted"},
    "likelihood_steps": {"objective": "reweighted"},
    "divergence_probes": {"objective": "reweighted"},
    "score_eps": {"objective": "target_score"},
    "score_limit": {"objective": "target_score"},
    "evaluate_episodes": {"evaluate_every": 1},
    "online_warmup": {"online_steps": 2000},
    "updates_per_step": {"online_steps": 2000},
    "offline_share": {"online_steps": 2000},
    "ascent_starts": {"mixture_weight": 0.1},
    "ascent_steps": {"mixture_weight": 0.1},
    "ascent_step_size": {"mixture_weight": 0.1},
    "mixture_bandwidth": {"mixture_weight": 0.1},
    "ascent_spread": {"mixture_weight": 0.1},
    "trust_radius": {"mixture_weight": 0.1},
    "adaptive_mixture": {"mixture_weight": 0.1},
    "edit_target_entropy": {**PRESETS["qam-edit"]},
    "kl_dual": {"kl_budget": 1.0},
    "pad_chunks": {"chunk_size": 2},
}


PUBLISHED = {"objective": "adjoint", "sde": "reference", "solver": "euler", "confine": False, "joint_clip": True}
PUBLISHED |= {
    "observation_limit": None,
    "action_scaling": "box",
    "precondition": False,
    "normalise_values": False,
    "pretrain_critics": False,
    "pad_chunks": False,
}


def test_the_presets_are_the_five_methods():
    assert list(PRESETS) == ["bc", "qam", "qam-edit", "trqam", "me-am"]
    coefficients = {
        name: (c.inverse_temperature, c.entropy_coef, c.mixture_weight, c.edit_scale, c.trains_policy)
        for name in PRESETS
        for c in [TrainConfig.preset(name)]
    }
    assert coefficients["bc"] == (0, 0, 0, 0, False)
    assert coefficients["qam"] == (1, 0, 0, 0, True)
    assert coefficients["qam-edit"] == (1, 0, 0, 0.1, True)
    assert coefficients["trqam"] == (1, 0, 0, 0, True)
    budgets = {name: TrainConfig.preset(name).kl_budget for name in PRESETS}
    assert budgets == {**dict.fromkeys(PRESETS), "trqam": 1, "me-am": 1}
    assert coefficients["me-am"] == (1, 0.1, 0, 0, True)
    assert TrainConfig.preset("me-am", kl_budget=None, value_penalty=0.0) == TrainConfig()


def test_the_presets_of_qam_take_the_published_scheme_and_me_am_its_own():
    for name in PRESETS:
        config = TrainConfig.preset(name)
        scheme = {field: getattr(config, field) for field in PUBLISHED}
        if "qam" in name:
            assert scheme == PUBLISHED
        else:
            assert scheme == {
                "objective": "two_scale",
                "sde": "ancestral",
                "solver": "midpoint",
                "confine": True,
                "joint_clip": False,
                "observation_limit": 10.0,
                "action_scaling": "data",
                "precondition": True,
                "normalise_values": True,
                "pretrain_critics": True,
                "pad_chunks": True,
            }


def test_only_a_known_few_settings_differ_between_the_presets():
    plain = dataclasses.asdict(TrainConfig())
    for name in PRESETS:
        changed = {
            field for field, value in dataclasses.asdict(TrainConfig.preset(name)).items() if value != plain[field]
        }
        coefficients = {"method", "inverse_temperature", "entropy_coef", "mixture_weight", "edit_scale"}
        coefficients |= {"trqam": {"kl_budget", "kl_dual"}, "me-am": {"kl_budget", "value_penalty"}}.get(name, set())
        assert changed <= coefficients | ({*PUBLISHED, "pretrain_steps"} if "qam" in name else set())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_changes(name):
    config = TrainConfig.preset(name, steps=7, hidden_dims=(3,))
    assert (config.method, config.steps, config.hidden_dims) == (name, 7, (3,))


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match='no preset "meam". Did you mean me-am?'):
        TrainConfig.preset("meam")
    with pytest.raises(ConfigError, match='no preset "zzz". Known: bc, qam, qam-edit, trqam, me-am'):
        TrainConfig.preset("zzz")


def test_an_unknown_field_names_the_nearest():
    with pytest.raises(ConfigError, match='no training setting "learning_rat". Did you mean learning_rate?'):
        TrainConfig.preset("qam", learning_rat=1e-3)


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match='no method "qan". Did you mean qam?'):
        TrainConfig(method="qan")  # pyright: ignore[reportArgumentType]


def test_every_number_has_a_range_that_is_tested():
    numbers = {f.name for f in dataclasses.fields(TrainConfig) if type(f.default) in (int, float)}
    assert numbers | {"learning_rate", "polyak"} == set(WHOLE) | set(REAL)  # theirs follow from other settings


@pytest.mark.parametrize("field", WHOLE)
def test_a_count_must_be_whole_and_large_enough(field):
    # With these, nothing but the field's own range is at stake.
    others: dict[str, Any] = {"steps": 10, "solver": "euler", "objective": "adjoint", "sde": "reference"}
    if field in EFFECTIVE:
        others = {"steps": 10, "solver": "euler", **EFFECTIVE[field]}
    accepted = WHOLE[field]
    assert getattr(TrainConfig(**{**others, field: accepted}), field) == accepted
    expected = "1 or more|4 to batch_size = 256" if field == "candidates" else f"{accepted} or more"
    for value in (WHOLE[field] - 1, -5, 2.0, "2", None, True):
        with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected (a whole number of )?({expected})"):
            TrainConfig(**{**others, field: value})


@pytest.mark.parametrize("field", REAL)
def test_a_number_must_lie_in_its_range(field):
    accepted, refused = REAL[field]
    method = "qam-edit" if field == "edit_scale" else "me-am"
    for value in accepted:
        assert getattr(TrainConfig.preset(method, **{**EFFECTIVE.get(field, {}), field: value}), field) == value
    optional = field in ("observation_limit", "learning_rate", "polyak")
    for value in [*refused, "0.5", True, *([] if optional else [None])]:
        with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected a number"):
            TrainConfig.preset(method, **{field: value})


@pytest.mark.parametrize("field", ["steps", "edit_scale", "trust_radius"])
def test_a_number_that_is_accepted_is_accepted_as_an_integer_too(field):
    method = "qam-edit" if field == "edit_scale" else "me-am"
    settings = {**EFFECTIVE.get(field, {}), field: 1}
    assert getattr(TrainConfig.preset(method, **settings), field) == 1


@pytest.mark.parametrize(
    ("method", "hidden", "critic_hidden", "rate"),
    [
        ("me-am", (255, 8), (64,), 1e-3),
        ("me-am", (8, 256), (64,), 3e-4),
        ("me-am", (8,), (64, 256), 3e-4),
        ("qam", (8,), (8,), 3e-4),
        ("bc", (8,), (64,), 3e-4),
    ],
)
def test_small_networks_of_me_am_learn_at_a_larger_rate(method, hidden, critic_hidden, rate):
    sizes = {"hidden_dims": hidden, "critic_hidden_dims": critic_hidden}
    config = TrainConfig.preset(method, sizes, steps=10)
    assert config.adam_rate == config.resolved().learning_rate == rate
    assert config.changed(learning_rate=0.02).adam_rate == 0.02
    # A run goes on with the rate that it began with.
    assert config.resolved(config.changed(learning_rate=0.02)).learning_rate == 0.02


@pytest.mark.parametrize(
    ("method", "settings", "rate"),
    [
        ("me-am", {"steps": 2000, "pretrain_steps": 0, "chunk_size": 5, "discount": 0.5}, 40 / 2000),
        ("me-am", {"steps": 800, "online_steps": 1200, "pretrain_steps": 0, "discount": 0.5}, 40 / 2000),
        ("me-am", {"steps": 2000, "pretrain_steps": 1000, "chunk_size": 10, "discount": 0.99}, 0.4 * (1 - 0.99**10)),
        ("me-am", {"steps": 2000, "chunk_size": 1, "discount": 0.99}, 0.005),
        ("me-am", {"steps": 100, "pretrain_steps": 0, "chunk_size": 10}, 0.05),
        ("me-am", {"steps": 1_000_000, "chunk_size": 10}, 0.005),
        ("qam", {"steps": 2000, "chunk_size": 10}, 0.005),
        ("trqam", {"steps": 2000, "chunk_size": 10}, 0.005),
    ],
)
def test_targets_are_renewed_forty_times_in_a_short_run_of_me_am(method, settings, rate):
    config = TrainConfig.preset(method, **settings)
    assert config.target_rate == config.resolved().polyak == pytest.approx(rate, rel=1e-12)
    assert config.changed(polyak=0.3).target_rate == 0.3
    # A longer run goes on with the rate that it began with.
    assert config.changed(steps=3_000_000).resolved(config.resolved()).polyak == config.target_rate


CHOICES = {
    "objective": ["two_scale", "reweighted", "adjoint", "bridge", "target_score"],
    "bridge_adjoint": ["denoiser", "scalar"],
    "sde": ["ancestral", "reference"],
    "kl_dual": ["log", "reference"],
    "solver": ["euler", "ab2", "midpoint", "heun", "rk4"],
    "precision": ["float32", "bf16"],
    "action_scaling": ["data", "box"],
}
SWITCHES = ["confine", "adaptive_mixture", "joint_clip", "compile", "layer_norm", "precondition", "normalise_values"]
SWITCHES += ["pretrain_critics", "pad_chunks"]


def changed(field: str, value: Any) -> TrainConfig:
    return TrainConfig(**{"nfe": 12, **EFFECTIVE.get(field, {}), field: value})  # a number that every solver can take


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_must_be_a_known_one_and_the_nearest_is_named(field):
    for value in CHOICES[field]:
        assert getattr(changed(field, value), field) == value
        with pytest.raises(ConfigError, match=f'There is no {field} "{value}s". Did you mean {value}\\?'):
            changed(field, f"{value}s")
    known = ", ".join(get_args(get_type_hints(TrainConfig)[field]))
    assert sorted(known.split(", ")) == sorted(CHOICES[field])
    for value in ("zzz", None, 3, True, []):
        with pytest.raises(ConfigError, match=f'There is no {field} "{re.escape(str(value))}". Known: {known}'):
            changed(field, value)


@pytest.mark.parametrize("field", SWITCHES)
def test_a_switch_is_true_or_false(field):
    for value in (True, False):
        assert getattr(changed(field, value), field) is value
    for value in (0, 1, None, "true", 1.0):
        with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected true or false"):
            changed(field, value)


def test_every_field_is_tested():
    others = {"method", "device", "hidden_dims", "critic_hidden_dims", "loggers", *CHOICES, *SWITCHES}
    optional = {"threads", "sde_steps", "execute_steps", "edit_target_entropy", "offline_share", "kl_budget"}
    optional |= {"pretrain_steps", "reward_offset"}
    assert {f.name for f in dataclasses.fields(TrainConfig)} == others | optional | set(WHOLE) | set(REAL)


def test_metrics_go_to_any_of_the_known_loggers():
    for loggers in ((), ("tensorboard",), ("wandb", "tensorboard")):
        assert changed("loggers", loggers).loggers == loggers
    with pytest.raises(ConfigError, match=r'no logger "tensorbord"\. Did you mean tensorboard\?'):
        changed("loggers", ("wandb", "tensorbord"))
    for value in ("wandb", ["wandb"], None):
        with pytest.raises(ConfigError, match="loggers is .*; expected a tuple of tensorboard, wandb"):
            changed("loggers", value)


@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, "0.5", [0.5]])
def test_the_share_of_offline_data_is_none_or_a_number_from_0_to_1(value):
    for share in (None, 0, 0.5, 1):
        assert changed("offline_share", share).offline_share == share
    with pytest.raises(ConfigError, match=f"offline_share is {re.escape(repr(value))}; expected a number from 0 to 1"):
        changed("offline_share", value)


@pytest.mark.parametrize("value", [0, -0.1, NAN, INF, "0.5", True])
def test_the_budget_of_the_kl_divergence_is_none_or_above_0(value):
    for budget in (None, 1e-9, 2, 100.0):
        assert changed("kl_budget", budget).kl_budget == budget
    with pytest.raises(ConfigError, match=f"kl_budget is {re.escape(repr(value))}; expected a number above 0, or None"):
        changed("kl_budget", value)


def test_trqam_has_a_budget_and_no_temperature():
    with pytest.raises(ConfigError, match="kl_budget is None; expected a number above 0 for trqam. .* take qam"):
        TrainConfig.preset("trqam", kl_budget=None)
    expected = r"inverse_temperature is 3, but has no effect with kl_budget=1\.0; .* \(not with trqam\)"
    with pytest.raises(ConfigError, match=expected):
        TrainConfig.preset("trqam", inverse_temperature=3)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 11])
@pytest.mark.parametrize(("solver", "together"), [("euler", 1), ("ab2", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_a_solver_takes_a_multiple_of_the_evaluations_of_its_step(solver, together, steps):
    assert TrainConfig(nfe=together * steps, solver=solver).nfe == together * steps
    if steps % together == 0:
        assert TrainConfig(nfe=steps, solver=solver).nfe == steps
        return
    expected = f'nfe is {steps}; expected a multiple of {together}, the evaluations per step of solver="{solver}"'
    with pytest.raises(ConfigError, match=expected):
        TrainConfig(nfe=steps, solver=solver)


BC: dict[str, Any] = {"method": "bc", "inverse_temperature": 0.0, "entropy_coef": 0.0, "mixture_weight": 0.0}
WITHOUT_CANDIDATES = [{"objective": "adjoint"}, {"objective": "target_score"}, BC]


def test_the_candidates_of_an_observation_fit_into_a_batch_where_they_are_used():
    # A quarter of them comes from the prior.
    for candidates in (4, 16):
        assert TrainConfig(batch_size=16, candidates=candidates).candidates == candidates
    for candidates in (17, 3, 1):
        with pytest.raises(ConfigError, match=f"candidates is {candidates}; expected 4 to batch_size = 16"):
            TrainConfig(batch_size=16, candidates=candidates)
    for unused in WITHOUT_CANDIDATES:
        assert TrainConfig(**{"batch_size": 4, **unused}).batch_size == 4


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_batch_too_small_for_the_reweighted_objective_is_refused_with_a_way_out(rows):
    with pytest.raises(ConfigError, match=f'batch_size is {rows}; expected 4 or more with .*objective="adjoint"'):
        TrainConfig(batch_size=rows)
    for unused in WITHOUT_CANDIDATES:
        assert TrainConfig(**{"batch_size": rows, **unused}).batch_size == rows


def test_the_ancestral_sde_has_at_least_one_step_with_noise():
    ancestral: dict[str, Any] = {"objective": "adjoint", "sde": "ancestral", "solver": "euler"}
    assert TrainConfig(**ancestral, sde_steps=2, nfe=1).sde_steps == 2
    for name in ("sde_steps", "nfe"):
        values: dict[str, Any] = {name: 1}
        with pytest.raises(ConfigError, match=f"{name} is 1; expected 2 or more"):
            TrainConfig(**ancestral, **values)
        assert getattr(TrainConfig(**{**ancestral, **values, "sde": "reference"}), name) == 1
    for objective in ("reweighted", "target_score"):
        assert TrainConfig(objective=objective, solver="euler", nfe=1).nfe == 1


@pytest.mark.parametrize(
    ("field", "value", "neutral"), [("best_of", 2, 1), ("mirror_stages", 2, 1), ("distill_coef", 0.5, 0)]
)
def test_without_critics_there_is_nothing_to_choose_by_and_no_policy_to_train(field, value, neutral):
    assert getattr(TrainConfig(**BC, **{field: neutral}), field) == neutral
    with pytest.raises(ConfigError, match=f'{field} is {value}, but has no effect with method="bc"; leave it out'):
        TrainConfig(**BC, **{field: value})


@pytest.mark.parametrize("value", [None, -3, 0.5, 2.0])
def test_the_target_entropy_of_the_edits_is_a_number_or_none(value):
    assert changed("edit_target_entropy", value).edit_target_entropy == value


@pytest.mark.parametrize("value", [NAN, INF, -INF, "0", [1.0]])
def test_another_target_entropy_of_the_edits_is_refused(value):
    with pytest.raises(
        ConfigError, match=f"edit_target_entropy is {re.escape(repr(value))}; expected a number, or None"
    ):
        changed("edit_target_entropy", value)


def test_edits_belong_to_qam_edit_and_to_it_alone():
    with pytest.raises(ConfigError, match=r"edit_scale is 0\.0; expected above 0 for qam-edit"):
        TrainConfig.preset("qam-edit", edit_scale=0.0)
    for method in ("bc", "qam", "me-am"):
        with pytest.raises(ConfigError, match=rf"edit_scale is 0\.1; expected 0 for {method}"):
            TrainConfig.preset(method, edit_scale=0.1)


@pytest.mark.parametrize("field", ["hidden_dims", "critic_hidden_dims"])
@pytest.mark.parametrize("value", [(), (0,), (8, -1), (8.0,), (True,), 8, [8], "8", None])
def test_layers_must_be_a_tuple_of_positive_whole_numbers(field, value):
    with pytest.raises(ConfigError, match=rf"{field} (is|has) .*; expected"):
        changed(field, value)


def test_fourier_features_come_in_pairs():
    assert TrainConfig(fourier_features=4).fourier_features == 4
    with pytest.raises(ConfigError, match="fourier_features is 3; expected an even number"):
        TrainConfig(fourier_features=3)


@pytest.mark.parametrize("value", [0, 5, -1, 1.5, True, "2"])
def test_no_more_actions_are_executed_than_predicted(value):
    assert TrainConfig(chunk_size=4, execute_steps=4).execute_steps == 4
    with pytest.raises(
        ConfigError, match=f"execute_steps is {value!r}; expected .*1 (to chunk_size = 4|or more, or None)"
    ):
        TrainConfig(chunk_size=4, execute_steps=value)


@pytest.mark.parametrize("field", ["threads", "sde_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_an_optional_count_is_none_or_1_or_more(field, value):
    assert getattr(changed(field, 1), field) == 1
    assert getattr(TrainConfig(), field) is None
    with pytest.raises(ConfigError, match=f"{field} is {value!r}; expected a whole number of 1 or more, or None"):
        changed(field, value)


def test_pretraining_leaves_updates_for_the_policy():
    assert TrainConfig(steps=10, pretrain_steps=9).pretrain_steps == 9
    with pytest.raises(ConfigError, match="pretrain_steps is 10; expected fewer than steps = 10"):
        TrainConfig(steps=10, pretrain_steps=10)


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_the_updates_of_pretraining_are_a_count_or_none(value):
    for steps in (None, 0, 7):
        assert TrainConfig(pretrain_steps=steps).pretrain_steps == steps
    with pytest.raises(ConfigError, match=f"pretrain_steps is {value!r}; expected a whole number of 0 or more, or Non"):
        TrainConfig(pretrain_steps=value)


@pytest.mark.parametrize(
    ("steps", "fifths", "tenths"),
    [(1, 0, 0), (3, 1, 0), (4, 2, 1), (10, 6, 3), (12, 7, 3), (100_000, 60_000, 30_000)],
)
def test_pretraining_takes_three_fifths_of_the_steps_or_three_tenths_unless_it_is_told(steps, fifths, tenths):
    for method, expected in (("me-am", fifths), ("trqam", tenths)):
        assert TrainConfig.preset(method, steps=steps).pretraining == expected
        assert TrainConfig.preset(method, steps=steps, pretrain_steps=0).pretraining == 0
    for method in ("bc", "qam", "qam-edit"):
        assert TrainConfig.preset(method, steps=steps).pretraining == 0


def test_resolved_settings_pretrain_as_long_with_other_steps_and_decide_the_same():
    for method in PRESETS:
        config = TrainConfig.preset(method, steps=100)
        resolved = config.resolved()
        assert resolved.pretraining == config.pretraining
        assert resolved.deciding() == config.deciding()
        longer = dataclasses.replace(resolved, steps=1000)
        assert longer.pretraining == config.pretraining
        assert longer.deciding() == config.deciding()
        assert TrainConfig.from_json(resolved.to_json()) == resolved
    # A longer run that was not told pretrains for longer: it is another run.
    shorter, longer = (TrainConfig.preset("me-am", steps=steps) for steps in (100, 1000))
    assert shorter.deciding() != longer.deciding()


def test_me_am_is_held_within_a_budget_unless_it_is_given_a_temperature():
    assert TrainConfig.preset("me-am").kl_budget == 1
    for config in (
        TrainConfig.preset("me-am", inverse_temperature=3),
        TrainConfig.preset("me-am", {"inverse_temperature": 3}),
        TrainConfig.preset("me-am").changed(inverse_temperature=3),
        TrainConfig.preset("me-am", kl_budget=None, inverse_temperature=3),
    ):
        assert (config.kl_budget, config.inverse_temperature) == (None, 3)
    # Also where it is the default: to ask for a temperature is to ask for it to stay.
    assert TrainConfig.preset("me-am", inverse_temperature=1.0).kl_budget is None
    assert TrainConfig.preset("me-am", kl_budget=0.5).kl_budget == 0.5
    with pytest.raises(ConfigError, match=r"inverse_temperature is 3, but has no effect with kl_budget=0\.5"):
        TrainConfig.preset("me-am", kl_budget=0.5, inverse_temperature=3)


NEW = ("precondition", "normalise_values", "kl_budget", "kl_dual", "switch_time", "bridge_adjoint", "layer_norm")
NEW += ("pretrain_critics", "pad_chunks", "action_scaling", "observation_limit")


@pytest.mark.parametrize("method", ["bc", "qam", "qam-edit", "me-am"])
def test_settings_of_an_earlier_version_train_as_they_did(method):
    """Plain networks, a constant temperature, and the objective and pretraining that the file names."""
    earlier = {"method": method, "objective": "reweighted", "pretrain_steps": 0, "inverse_temperature": 2.0}
    if method == "bc":
        earlier = {"method": "bc", "objective": "reweighted", "inverse_temperature": 0.0}
        earlier |= {"entropy_coef": 0.0, "mixture_weight": 0.0}
    if "qam" in method:
        earlier |= {"entropy_coef": 0.0, "mixture_weight": 0.0, "edit_scale": 0.1 if method == "qam-edit" else 0.0}
    written = {**json.loads(TrainConfig.preset(method).to_json()), **earlier}
    config = TrainConfig.from_json(json.dumps({name: value for name, value in written.items() if name not in NEW}))
    assert (config.precondition, config.kl_budget, config.pretraining) == (False, None, 0)
    assert (config.action_scaling, config.observation_limit) == ("box", None)
    assert not config.pretrains_critics
    if method != "bc":
        assert (config.normalise_values, config.objective, config.inverse_temperature) == (False, "reweighted", 2.0)


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("bc", "inverse_temperature"),
        ("bc", "entropy_coef"),
        ("bc", "mixture_weight"),
        ("qam", "entropy_coef"),
        ("qam", "mixture_weight"),
        ("qam-edit", "entropy_coef"),
        ("qam-edit", "mixture_weight"),
        ("trqam", "entropy_coef"),
        ("trqam", "mixture_weight"),
        ("bc", "kl_budget"),
    ],
)
def test_a_method_fixes_the_coefficients_that_it_lacks(method, field):
    with pytest.raises(ConfigError, match=rf"{field} is 0\.5.* {method} fixes it at (0|None)"):
        TrainConfig.preset(method, **{field: 0.5})


@given(
    st.sampled_from(list(PRESETS)),
    st.fixed_dictionaries(
        {"nfe": st.sampled_from([4, 12, 20])},
        optional={
            "steps": st.integers(10, 10**9),
            "seed": st.integers(0, 2**63 - 1),
            "hidden_dims": st.lists(st.integers(1, 4096), min_size=1, max_size=6).map(tuple),
            "learning_rate": st.none() | st.floats(1e-12, 10),
            "chunk_size": st.integers(3, 50),
            "execute_steps": st.none() | st.integers(1, 3),
            "device": st.text(),
            "solver": st.sampled_from(CHOICES["solver"]),
            "confine": st.booleans(),
            "loggers": st.lists(st.sampled_from(["tensorboard", "wandb"])).map(tuple),
        },
    ).filter(lambda d: d.get("execute_steps") is None or "chunk_size" in d),
    st.fixed_dictionaries(
        {},
        optional={
            "discount": st.floats(1e-12, 1),
            "objective": st.sampled_from(CHOICES["objective"]),
            "sde": st.sampled_from(CHOICES["sde"]),
            "sde_steps": st.none() | st.integers(2, 100),
            "online_steps": st.sampled_from([0, 2000]),
            "offline_share": st.none() | st.floats(0, 1),
            "edit_target_entropy": st.none() | st.floats(-10, 10),
        },
    ),
)
def test_settings_survive_json(name, overrides, shared):
    config = TrainConfig.preset(name, shared, **overrides)
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
        '{"objective": null}',
        '{"solver": "rk45"}',
        '{"solver": "rk4", "nfe": 10}',
        '{"confine": 1}',
        '{"edit_scale": 0.1}',
        '{"sde_steps": 2.0}',
        '{"loggers": [[]]}',
        '{"loggers": "wandb"}',
        "[" * 100_000,
    ],
)
def test_what_is_not_settings_is_refused(text):
    with pytest.raises(ConfigError):
        TrainConfig.from_json(text)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_online_steps_that_are_all_warm_up_are_refused():
    with pytest.raises(ConfigError, match=r"online_steps is 60, all of it warm-up; .* online_warmup = 1000"):
        TrainConfig(online_steps=60)
    assert TrainConfig(online_steps=60, online_warmup=59).online_steps == 60


def test_a_range_describes_itself():
    words = {
        "above 0": Range(above=0),
        "above 0, at most 1": Range(above=0, most=1),
        "above 0, below 1": Range(above=0, below=1),
        "0 or more": Range(least=0),
        "0 or more, below 1": Range(least=0, below=1),
        "from 0 to 1": Range(least=0, most=1),
        "": Range(),
    }
    assert {str(value): value for value in words.values()} == words


def test_a_number_too_large_for_the_frameworks_is_refused_with_the_limit():
    assert TrainConfig(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ConfigError, match=r"seed is 9223372036854775808; expected .* 0 or more, below .* = 2\^63"):
        TrainConfig(seed=2**63)


HOW_IT_RUNS = {
    "device": "cpu",
    "threads": 1,
    "compile": True,
    "checkpoint_every": 7,
    "keep_checkpoints": 7,
    "log_every": 7,
    "loggers": ("tensorboard",),
    "evaluate_every": 7,
}


def test_how_a_run_is_executed_does_not_affect_its_result():
    plain = TrainConfig()
    for name, value in HOW_IT_RUNS.items():
        assert plain.changed(**{name: value}) != plain
        assert plain.changed(**{name: value}).deciding() == plain.deciding()
    evaluated = plain.changed(evaluate_every=7)
    assert evaluated.changed(evaluate_episodes=7).deciding() == plain.deciding()
    free = {"steps", "online_steps", "evaluate_episodes", *HOW_IT_RUNS}
    assert plain.deciding().keys() == {f.name for f in dataclasses.fields(TrainConfig)} - free
    for name, value in {"seed": 1, "batch_size": 8, "precision": "bf16", "learning_rate": 1.0}.items():
        assert plain.changed(**{name: value}).deciding() != plain.deciding()


def test_the_length_of_a_run_does_not_affect_the_weights_unless_stages_share_the_updates():
    plain = TrainConfig(pretrain_steps=3)
    assert plain.changed(steps=7, online_steps=5000).deciding() == plain.deciding()
    staged = plain.changed(mirror_stages=2)
    assert staged.changed(steps=7).deciding() != staged.deciding()
    assert staged.changed(online_steps=5000).deciding() == staged.deciding()


def test_how_a_run_goes_online_decides_from_when_it_has():
    online = TrainConfig(online_steps=5000)
    for name, value in {"online_warmup": 7, "updates_per_step": 7, "offline_share": 0.5}.items():
        assert online.changed(**{name: value}).deciding() != online.deciding()
        assert online.changed(**{name: value}).deciding(online=False) == online.deciding(online=False)


def test_what_loses_its_effect_by_a_change_goes_back_to_its_default():
    config = TrainConfig.preset("qam", sde="ancestral", sde_steps=5, evaluate_every=3, evaluate_episodes=2)
    assert config.changed(objective="reweighted", evaluate_every=0) == TrainConfig.preset("qam", objective="reweighted")
    with pytest.raises(ConfigError, match="sde_steps is 6, but has no effect"):
        config.changed(objective="reweighted", sde_steps=6)
    with pytest.raises(ConfigError, match='no training setting "sed". Did you mean seed?'):
        config.changed(sed=3)


def test_methods_share_settings_of_which_each_takes_what_has_an_effect_on_it():
    shared = {"num_critics": 2, "hidden_dims": (8,), "candidates": 16}
    assert TrainConfig.preset("bc", shared) == TrainConfig.preset("bc", hidden_dims=(8,))
    assert TrainConfig.preset("qam", shared) == TrainConfig.preset("qam", hidden_dims=(8,), num_critics=2)
    assert TrainConfig.preset("me-am", shared) == TrainConfig.preset("me-am", **shared)
    assert TrainConfig.preset("me-am", shared, num_critics=3).num_critics == 3
    with pytest.raises(ConfigError, match="num_critics is 3, but has no effect"):
        TrainConfig.preset("bc", shared, num_critics=3)
    with pytest.raises(ConfigError, match='no training setting "num_critic". Did you mean num_critics?'):
        TrainConfig.preset("bc", {"num_critic": 3})
    with pytest.raises(ConfigError, match="num_critics is 0; expected a whole number of 1 or more"):
        TrainConfig.preset("bc", {"num_critics": 0})


def test_settings_without_effect_of_an_earlier_version_are_reset():
    written = {**json.loads(TrainConfig().to_json()), "sde": "reference", "sde_steps": 5, "offline_share": 0.5}
    assert TrainConfig.from_json(json.dumps(written)) == TrainConfig()
    written = {**json.loads(TrainConfig.preset("bc").to_json()), "num_critics": 2, "objective": "adjoint"}
    assert TrainConfig.from_json(json.dumps(written)) == TrainConfig.preset("bc")


@pytest.mark.parametrize("method", ["bc", "qam", "qam-edit"])
def test_a_method_without_its_preset_names_the_preset(method):
    with pytest.raises(
        ConfigError, match=rf'Leave it out, or take me-am\. In Python, TrainConfig\.preset\("{method}"\)'
    ):
        TrainConfig(method=method)
