"""Each warning with metrics that call for it, and with near ones that do not."""

import math
from typing import Any

import numpy as np
import pytest

from meam_policy.errors import ConfigError
from meam_training.config import TrainConfig
from meam_training.data.dataset import OfflineDataset
from meam_training.runs import watch as watch_module
from meam_training.runs.csv_file import read_rows
from meam_training.runs.options import as_flag
from meam_training.runs.watch import Watch, warnings_of
from meam_training.setting_text import as_argument
from meam_training.trainer import train

CONFIG = TrainConfig(steps=6000, pretrain_steps=2000)

HEALTHY = {
    "effective_samples": 0.85,
    "value_spread": 1.0,
    "calibration_value": 20.0,
    "policy_value": 22.0,
    "value_limit": 100.0,
    "td_bias": 0.01,
    "td_reward": 1.0,
    "return_floor": 15.0,
    "return_ceiling": 25.0,
    "calibration_return_std": 5.0,
    "calibration_tail": 0.1,
    "calibration_correlation": 0.8,
    "calibration_slope": 1.0,
    "return_smallest": 0.0,
    "return_largest": 30.0,
    "mixture_gain": 1.0,
    "mixture_disagreement": 0.5,
    "value_std": 0.2,
}


def history(config=CONFIG, every=100, **changed):
    """Rows of a whole run, the prior's loss settled, with the critics' calibration in each row after pretraining."""
    row = {**HEALTHY, **changed}
    rows = []
    for step in range(every, config.steps + 1, every):
        joint = row if step > config.pretraining else {}
        logged = {"step": step, "prior_loss": 0.5 + 0.001 * (step // every % 2), **joint}
        rows.append({name: value for name, value in logged.items() if value is not None})
    return rows


def test_a_healthy_run_is_warned_of_nothing():
    assert warnings_of(CONFIG, history()) == []


@pytest.mark.parametrize(
    ("name", "calls", "does_not"),
    [
        ("tau does nothing", {"effective_samples": 0.99}, {"effective_samples": 0.97}),
        (
            "tau does nothing",
            {"effective_samples": None, "value_spread": 0.09},
            {"effective_samples": None, "value_spread": 0.11},
        ),
        ("weights collapse", {"effective_samples": 0.18}, {"effective_samples": 0.2}),
        (
            "critics not at the scale of the returns",
            {"td_bias": -0.6, "calibration_value": 30.0},  # above 25 by more than half a standard deviation
            {"td_bias": -0.6, "calibration_value": 27.0},
        ),
        (  # and nothing about tau, whose values are still to come
            "critics not at the scale of the returns",
            {"td_bias": 0.6, "calibration_value": 10.0, "effective_samples": 0.99},
            {"td_bias": 0.6, "effective_samples": 0.99},
        ),
        (
            "critics not at the scale of the returns",
            {"td_bias": 0.6, "calibration_value": 10.0},
            {"td_bias": 0.4, "calibration_value": 10.0},
        ),
        (
            "critics not at the scale of the returns",
            {"td_bias": 0.6, "calibration_slope": 3.5},
            {"td_bias": 0.6, "calibration_slope": 3.5, "calibration_tail": 0.6},
        ),
        (
            "critics not at the scale of the returns",
            {"td_bias": 0.6, "calibration_slope": 3.5},
            {"td_bias": 0.6, "calibration_slope": 3.5, "calibration_correlation": 0.4},
        ),
        ("values too high", {"policy_value": 102.0}, {"policy_value": 44.0}),
        (
            "values too high",
            {"policy_value": 0.6, "value_limit": 0.0, "return_largest": None},
            {"policy_value": 0.4, "value_limit": 0.0, "return_largest": None},
        ),
        ("values too high", {"policy_value": 46.0}, {"policy_value": 46.0, "return_largest": None}),
        (
            "gain of the mixture not to be trusted",
            {"mixture_gain": 0.4, "mixture_disagreement": 0.5},
            {"mixture_gain": 0.6, "mixture_disagreement": 0.5},
        ),
        (
            "gain of the mixture not to be trusted",
            {"mixture_gain": 0.4, "mixture_disagreement": 0.5},
            {"mixture_gain": 0.4, "mixture_disagreement": 0.5, "value_std": 0.3},  # they disagree at the data too
        ),
        (
            "gain of the mixture not to be trusted",
            {"mixture_gain": 50.0, "mixture_disagreement": 5.0},
            {"mixture_gain": 50.0, "mixture_disagreement": 3.0},
        ),
    ],
)
def test_a_warning_is_given_where_it_is_called_for_and_not_nearby(name, calls, does_not):
    [warning] = warnings_of(CONFIG, history(**calls))
    assert warning.name == name
    assert warning.severity >= 1
    assert warnings_of(CONFIG, history(**does_not)) == []


@pytest.mark.parametrize(("fall", "warned"), [(0.05, True), (0.02, False), (0.0, False), (-0.1, False)])
@pytest.mark.parametrize("method", ["me-am", "bc"])
def test_a_prior_whose_loss_still_falls_has_not_converged(fall, warned, method):
    config = TrainConfig.preset(method, steps=4000, **({} if method == "bc" else {"pretrain_steps": 2000}))
    end = 2000 if method == "me-am" else 4000
    rows = [
        {"step": row["step"], "prior_loss": (1 - fall) * row["prior_loss"] if row["step"] > 0.75 * end else 0.5}
        for row in history(config)
    ]
    found = warnings_of(config, rows)
    assert [warning.name for warning in found] == ["prior not converged"] * warned
    assert [warning.step for warning in found] == [end] * warned


def test_a_fall_within_the_noise_of_the_loss_is_none():
    rows = [{**row, "prior_loss": 0.5 + 0.1 * math.cos(4 * row["step"])} for row in history()]
    third, last = (sum(row["prior_loss"] for row in rows if low < row["step"] <= low + 500) / 5 for low in (1000, 1500))
    assert third > 1.03 * last  # as much as would call for a warning
    assert warnings_of(CONFIG, rows) == []


def test_a_budget_that_is_not_used_is_warned_of():
    config = CONFIG.changed(kl_budget=0.5)
    [warning] = warnings_of(config, history(kl_average=0.05))
    assert warning.name == "KL budget missed"
    assert "10% of the KL budget of 0.5 nats per action are used" in warning.seen
    assert warnings_of(config, history(kl_average=0.1)) == warnings_of(config, history(kl_average=1.0)) == []
    assert [each.name for each in warnings_of(config, history(kl_average=1.5))] == ["KL budget missed"]


@pytest.mark.parametrize(
    ("gain", "penalty", "remedy"),
    [(-2.0, 0.1, "value_penalty"), (-2.0, 0.0, "steps"), (2.0, 0.1, "steps"), (-0.4, 0.1, "steps")],
)
def test_a_budget_that_the_penalty_takes_away_names_the_penalty(gain, penalty, remedy):
    config = CONFIG.changed(kl_budget=0.5, value_penalty=penalty)
    [warning] = warnings_of(config, history(kl_average=0.05, value_gain=gain))
    assert f"{{{remedy}}}" in warning.remedy


def test_critics_that_contradict_the_returns_are_warned_of():
    contrary: dict[str, Any] = {"calibration_correlation": -0.98}
    [warning] = warnings_of(CONFIG, history(**contrary))
    assert warning.name == "critics contradict the returns"
    assert "-0.98" in warning.seen
    others: list[dict[str, Any]] = [{"calibration_correlation": -0.2}, {**contrary, "calibration_tail": 0.6}]
    for other in others:
        assert warnings_of(CONFIG, history(**other)) == []


@pytest.mark.parametrize("value", [-187.0, -3e9], ids=["above", "below"])
def test_critics_without_a_scale_name_the_setting_that_gives_them_one(value):
    """At far-off rewards, whether values lie above or below what these allow."""
    far = {"td_bias": -1e6, "td_reward": 1e6, "return_floor": -3e8, "return_ceiling": -1e7, "calibration_value": value}
    for normalised in (False, True):
        config = CONFIG.changed(kl_budget=1.0, normalise_values=normalised)
        found = warnings_of(config, history(config, kl_average=0.05, policy_value=None, **far))
        assert [each.name for each in found] == ["critics not at the scale of the returns", "KL budget missed"]
        assert ["--normalise-values" in each.text(as_flag) for each in found] == [not normalised] * 2
        assert ["normalise_values=True" in each.text(as_argument) for each in found] == [not normalised] * 2
        assert "below" not in found[0].text(as_flag)


def test_a_published_dual_step_at_its_limit_names_the_other_one():
    config = CONFIG.changed(kl_budget=1.0, kl_dual="reference")
    limit = 1 / (3 * 0.01)
    [warning] = warnings_of(config, history(config, kl_average=0.05, inverse_temperature=limit))
    assert "tau is at its limit, 33.3" in warning.remedy
    assert "set --kl-dual log in a new run" in warning.text(as_flag)
    assert 'set kl_dual="log" in a new run' in warning.text(as_argument)
    [warning] = warnings_of(config, history(config, kl_average=0.05, inverse_temperature=0.9 * limit))
    assert "kl-dual" not in warning.text(as_flag)


def test_where_all_policies_are_worth_the_same_no_warning_names_a_remedy():
    wrong: dict[str, Any] = {"policy_value": 0.01, "effective_samples": 0.99, "kl_average": 0.01, "value_limit": 0.0}
    wrong["calibration_return_std"] = 0.0
    config = CONFIG.changed(kl_budget=1.0)
    assert warnings_of(config, history(config, value_floor=-1.0, **wrong))
    assert warnings_of(config, history(config, value_floor=0.0, **wrong)) == []


def test_a_temperature_that_is_found_in_training_is_the_one_that_is_judged():
    idle = {"effective_samples": None, "value_spread": 0.01}
    assert [each.name for each in warnings_of(CONFIG, history(**idle))] == ["tau does nothing"]
    assert warnings_of(CONFIG, history(**idle, inverse_temperature=100.0)) == []


def test_a_temperature_of_zero_asks_for_the_prior():
    config = CONFIG.changed(inverse_temperature=0.0)
    assert warnings_of(config, history(effective_samples=1.0, value_spread=0.0)) == []


def test_a_run_is_judged_once_it_has_made_enough_updates():
    rows = history(effective_samples=0.99)
    [warning] = warnings_of(CONFIG, rows)
    assert warning.step == CONFIG.pretraining + watch_module.LEAST_UPDATES
    short = CONFIG.changed(steps=2500)
    assert [each.step for each in warnings_of(short, history(short, effective_samples=0.99))] == [2500]


def test_a_warning_is_repeated_only_if_its_cause_became_worse():
    watch = Watch(CONFIG)
    given = [warning.step for row in history(effective_samples=0.15) for warning in watch.see(row["step"], row)]
    assert given == [3000]
    watch, rows = Watch(CONFIG), history(effective_samples=0.15)
    for row in rows:
        if row["step"] > 4500:
            row["effective_samples"] = 0.03
    given = [warning for row in rows for warning in watch.see(row["step"], row)]
    assert [warning.name for warning in given] == ["weights collapse"] * len(given)
    assert 2 <= len(given) <= 3
    assert given[-1].severity > 2 * given[0].severity


def test_a_resumed_watch_does_not_repeat_what_was_said_before():
    rows = history(effective_samples=0.99)
    resumed = Watch(CONFIG, rows[:40])
    assert [warning for row in rows[40:] for warning in resumed.see(row["step"], row)] == []


def test_the_remedy_is_told_as_it_is_typed():
    [warning] = warnings_of(CONFIG, history(effective_samples=0.99))
    assert "Raise --inverse-temperature, now 1, or set --kl-budget" in warning.text(as_flag)
    assert "Raise inverse_temperature, now 1" in warning.text(as_argument)
    assert "0.99" in warning.text(as_argument)
    assert "expected below 0.98" in warning.text(as_argument)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_critics": 1, "pessimism": 0.5},
        {"mixture_weight": 0.1},
        {"inverse_temperature": 1.0, "mixture_weight": 0.0},
    ],
)
def test_a_remedy_names_settings_that_have_an_effect(settings):
    temperature = "inverse_temperature" if "inverse_temperature" in settings else "kl_budget"
    config = TrainConfig.preset("me-am", {"steps": 6000, "pretrain_steps": 2000, **settings})
    changes = {"pessimism": 0.7, "num_critics": 3, "mixture_weight": 0.05, temperature: 0.5}
    [warning] = warnings_of(config, history(policy_value=102.0, mixture_gain=None))
    named = [name for name in changes if f"{{{name}}}" in warning.remedy]
    assert temperature in named
    for name in named:
        try:
            config.changed(**{name: changes[name]})
        except ConfigError as error:  # the remedy would be refused
            pytest.fail(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(("tau", "warned"), [(0.0001, True), (3.0, False)])
def test_a_run_with_hardly_any_temperature_is_warned_of(make_config, tmp_path, tau, warned):
    """One step of the reward a_1: critics learn it in no time, and with tau = 3 the policy follows."""
    generator = np.random.default_rng(0)
    actions = generator.uniform(-1, 1, (400, 1))
    dataset = OfflineDataset.from_arrays(
        observations=generator.normal(size=(400, 1)),
        next_observations=generator.normal(size=(400, 1)),
        actions=actions,
        rewards=actions[:, 0],
        terminations=[True] * 400,
        truncations=[False] * 400,
    )
    settings = {"chunk_size": 1, "learning_rate": 0.003, "batch_size": 64, "log_every": 20, "hidden_dims": (32, 32)}
    config = make_config(steps=250, pretrain_steps=130, inverse_temperature=tau, **settings)
    found = []
    train(config, dataset, tmp_path, on_warning=found.append)
    assert ("tau does nothing" in [warning.name for warning in found]) == warned
    assert found == warnings_of(config, read_rows(tmp_path / "metrics.csv"))
