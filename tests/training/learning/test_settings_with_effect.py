"""What a setting changes in a few updates, where it is accepted and, forced upon the settings, where it is refused."""

import copy
import functools
import json
from functools import partial
from typing import Any

import pytest
import torch

from meam_policy.errors import ConfigError
from meam_training.config import TrainConfig
from meam_training.config.declaration import fields_of
from meam_training.learning.chunk_source import make_chunk_source
from meam_training.learning.learner import Learner
from meam_training.setting_text import SettingText
from meam_training.trainer import data_statistics, make_spec

CPU = torch.device("cpu")
MIXED: dict[str, Any] = {"mixture_weight": 0.5}
ADJOINT: dict[str, Any] = {"objective": "adjoint"}
SCORE: dict[str, Any] = {"objective": "target_score"}
EFFECTIVE: dict[str, tuple[Any, str, dict[str, Any]]] = {  # field: a value, and with what it has an effect
    "critic_hidden_dims": ((7,), "me-am", {}),
    "num_critics": (3, "me-am", {}),
    "fourier_scale": (2.0, "bc", {"fourier_features": 4}),
    "pretrain_steps": (1, "me-am", {}),
    "pretrain_critics": (False, "me-am", {"pretrain_steps": 1}),
    "best_of": (2, "me-am", {}),
    "pad_chunks": (False, "me-am", {}),
    "discount": (0.5, "me-am", {}),
    "normalise_values": (False, "me-am", {}),
    "reward_offset": (1.0, "me-am", {}),
    "inverse_temperature": (3.0, "me-am", {"kl_budget": None}),
    "kl_dual": ("reference", "me-am", {"kl_budget": 1.0}),
    "objective": ("target_score", "me-am", {}),
    "switch_time": (0.5, "me-am", {}),
    "bridge_adjoint": ("scalar", "me-am", {"objective": "bridge"}),
    "sde": ("reference", "me-am", ADJOINT),
    "sde_steps": (7, "me-am", ADJOINT),
    "candidates": (16, "me-am", {}),
    "likelihood_steps": (3, "me-am", {}),
    "divergence_probes": (1, "me-am", {}),
    "mirror_stages": (2, "me-am", {}),
    "score_eps": (0.3, "qam", SCORE),
    "score_limit": (1e-3, "me-am", ADJOINT),
    "mixture_bandwidth": (0.3, "me-am", MIXED),
    "adaptive_mixture": (True, "me-am", MIXED),
    "ascent_starts": (2, "me-am", MIXED),
    "ascent_spread": (0.9, "me-am", MIXED),
    "ascent_steps": (1, "me-am", MIXED),
    "ascent_step_size": (0.3, "me-am", MIXED),
    "trust_radius": (1e-3, "me-am", MIXED),
    "edit_target_entropy": (3.0, "qam-edit", {}),
    "distill_coef": (1.0, "me-am", {}),
    "pessimism": (3.0, "me-am", {}),
    "value_penalty": (3.0, "me-am", {}),
    "joint_clip": (True, "me-am", {"gradient_clip": 0.01}),
    "polyak": (0.5, "me-am", {}),
}
FAILING: dict[str, tuple[str, dict[str, Any]]] = {  # a condition's field: with what it fails, and those before it hold
    "fourier_features": ("me-am", {}),
    "objective": ("me-am", {}),
    "entropy_coef": ("qam", {}),
    "mixture_weight": ("qam", {}),
    "ascent_starts": ("me-am", {**MIXED, "ascent_starts": 2}),
    "ascent_steps": ("me-am", {**MIXED, "ascent_steps": 0}),
    "num_critics": ("me-am", {**MIXED, "num_critics": 1}),
    "gradient_clip": ("me-am", {"gradient_clip": 0.0}),
    "evaluate_every": ("me-am", {}),
    "online_steps": ("me-am", {}),
    "pretrain_steps": ("me-am", {"pretrain_steps": 0}),
    "chunk_size": ("me-am", {"chunk_size": 1}),
}
SHIFTING = {
    (n, "method") for n in ("objective", "candidates", "divergence_probes", "best_of", "distill_coef", "value_penalty")
}
SHIFTING |= {("adaptive_mixture", "num_critics")}
"""Settings which without an effect still decide how much noise is drawn, by the field of the condition that fails."""

OF_A_RUN = {"evaluate_episodes": 3, "online_warmup": 7, "updates_per_step": 2, "offline_share": 0.5}
"""Settings that no single update sees, with a value."""

CONDITIONS = [(name, condition) for name, field in fields_of(TrainConfig).items() for condition in field.conditions]


def failing(name: str, other: str) -> tuple[str, dict[str, Any]]:
    if other == "kl_budget":
        return "me-am", {"kl_budget": 1.0 if name == "inverse_temperature" else None}
    if other == "method":
        return ("qam" if name == "edit_target_entropy" else "bc"), {}
    if name in ("candidates", "likelihood_steps", "divergence_probes", "switch_time"):
        return "me-am", {"objective": "reweighted"} if name == "switch_time" else ADJOINT
    return FAILING[other]


def value_of(name: str) -> Any:
    return EFFECTIVE[name][0] if name in EFFECTIVE else OF_A_RUN[name]


def forced(config: TrainConfig, name: str, value: Any) -> TrainConfig:
    """The settings with a value that they would refuse."""
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)
    return changed


@pytest.fixture(scope="module")
def learned(dataset, make_config):
    """The weights after two updates."""

    @functools.cache
    def learned(config):
        spec = make_spec(config, dataset)
        chunks = make_chunk_source(config, dataset, spec, CPU)
        learner = Learner(spec, config, CPU, statistics=data_statistics(config, dataset, spec))
        for step in (1, 2):
            learner.update(chunks, step)
        return learner.networks.state_dict()

    return learned


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first.keys() & second.keys())


def test_every_setting_with_a_condition_is_tested():
    assert {name for name, _ in CONDITIONS} == EFFECTIVE.keys() | OF_A_RUN.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EFFECTIVE)
def test_a_setting_that_is_accepted_changes_what_is_learned(make_config, learned, name):
    value, method, changes = EFFECTIVE[name]
    changes = changes if method == "bc" else {"pretrain_steps": 0, **changes}
    plain = make_config(method, steps=2, **changes)
    changed = make_config(method, steps=2, **{**changes, name: value})
    assert getattr(changed, name) == value
    assert not same(learned(plain), learned(changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"), [(n, c.other) for n, c in CONDITIONS if n in EFFECTIVE and (n, c.other) not in SHIFTING]
)
def test_a_setting_that_is_refused_would_change_nothing(make_config, learned, name, other):
    method, changes = failing(name, other)
    plain = make_config(method, steps=2, **changes)
    assert same(learned(plain), learned(forced(plain, name, value_of(name))))


@pytest.mark.parametrize(("name", "condition"), CONDITIONS, ids=[f"{n}-{c.other}" for n, c in CONDITIONS])
def test_a_setting_without_effect_is_refused_by_name(name, condition):
    method, changes = failing(name, condition.other)
    value, plain = value_of(name), TrainConfig.preset(method, **changes)
    there = getattr(plain, condition.other)
    shown, because = (f'"{v}"' if isinstance(v, str) else repr(v) for v in (value, there))
    with pytest.raises(ConfigError) as caught:
        TrainConfig.preset(method, **{**changes, name: value})
    assert str(caught.value) == (
        f"{name} is {shown}, but has no effect with {condition.other}={because}; leave it out, or "
        f"{SettingText(condition.remedy)}."
    )
    assert TrainConfig.preset(method, {**changes, name: value}) == plain
    assert TrainConfig.from_json(json.dumps({**vars(plain), name: value})) == plain


@pytest.mark.parametrize(("name", "condition"), CONDITIONS, ids=[f"{n}-{c.other}" for n, c in CONDITIONS])
def test_a_setting_that_is_given_at_its_default_without_effect_is_refused_too(name, condition):
    method, changes = failing(name, condition.other)
    plain = TrainConfig.preset(method, **changes)
    value = getattr(plain, name)
    given = {**changes, name: value}
    for settings in (partial(TrainConfig.preset, method, **given), partial(plain.changed, **given)):
        if value is None:  # leaves it to its default
            assert settings() == plain
        else:
            with pytest.raises(ConfigError, match=f"^{name} is .*, but has no effect with {condition.other}="):
                settings()
    assert TrainConfig.preset(method, {**changes, name: value}) == plain  # shared with other methods


@pytest.mark.parametrize(("name", "condition"), CONDITIONS, ids=[f"{n}-{c.other}" for n, c in CONDITIONS])
def test_a_condition_on_another_setting_includes_those_of_that_setting(name, condition):
    fields = fields_of(TrainConfig)
    assert set(fields[condition.other].conditions) <= set(fields[name].conditions)


def test_a_setting_is_named_with_what_would_give_it_an_effect():
    for method, changes, message in (
        (
            "me-am",
            {"sde_steps": 5},
            'sde_steps is 5, but has no effect with objective="two_scale"; leave it out, or set objective to adjoint.',
        ),
        (
            "me-am",
            {"offline_share": 0.5},
            "offline_share is 0.5, but has no effect with online_steps=0; leave it out, or set online_steps above 0.",
        ),
        (
            "bc",
            {"num_critics": 2},
            'num_critics is 2, but has no effect with method="bc"; leave it out, or take another method.',
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainConfig.preset(method, **changes)
        assert str(caught.value) == message
