"""Choosing how an exported policy acts, in environments where the better rule is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

from meam_export import export_policy
from meam_export.variants.acting import ACTING_SEED
from meam_export.variants.ladder import LadderTask
from meam_policy import ConfigError, MeamPolicy, NotFoundError, rollout
from meam_policy.spec import ActingRule
from meam_training import Checkpoint, OfflineDataset, TrainConfig, train

TINY = {"steps": 2, "hidden_dims": (8,), "critic_hidden_dims": (8,), "num_critics": 2, "batch_size": 8, "chunk_size": 1}
OBSERVATION = np.zeros(3, np.float32)
EPISODES = 12


class Bandit(gymnasium.Env[Any, Any]):
    """One step at one observation; the reward depends on how far the action is from one place."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-1.0, 1.0, (2,))

    def __init__(self, place: NDArray[Any], wants_noise: bool) -> None:
        self._place, self._wants_noise = place, wants_noise

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[Any], dict[str, Any]]:
        super().reset(seed=seed)
        return OBSERVATION, {}

    def step(self, action: NDArray[Any]) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        distance = float(np.linalg.norm(action - self._place))
        return OBSERVATION, distance if self._wants_noise else -distance, True, False, {}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    generator, rows, idle = np.random.default_rng(0), 60, np.zeros(60)
    observations, actions = generator.normal(size=(rows, 3)), generator.uniform(-1, 1, (rows, 2))
    ends = {"rewards": generator.normal(size=rows), "terminations": idle, "truncations": np.arange(rows) % 20 == 19}
    moves = {"observations": observations, "next_observations": observations, "actions": actions}
    dataset = OfflineDataset.from_arrays(**moves, **ends, dataset_id="tests/bandit-v0")
    return train(TrainConfig.preset("me-am", **TINY), dataset, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def mode(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> NDArray[Any]:
    """The action from zero noise."""
    plain = export_policy(checkpoint, tmp_path_factory.mktemp("plain") / "policy")
    return MeamPolicy.from_pretrained(plain).act(OBSERVATION, deterministic=True)


def task(place: NDArray[Any], wants_noise: bool = False, episodes: int = EPISODES) -> LadderTask:
    return LadderTask(Bandit(place, wants_noise), episodes, seed=0)


def test_zero_noise_is_recorded_where_the_mode_is_best_and_the_loaded_policy_follows(
    checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path
) -> None:
    where = task(mode)
    exported = export_policy(checkpoint, tmp_path / "policy", acting="auto", task=where)
    policy = MeamPolicy.from_pretrained(exported)
    assert policy.spec.acting == exported.spec.acting
    assert policy.spec.acting_name == "zero"
    np.testing.assert_array_equal(policy.act(OBSERVATION), mode)
    measured = policy.spec.acting.measured
    assert measured is not None
    assert (measured.environment_id, measured.episodes, measured.seed) == ("Bandit", EPISODES, ACTING_SEED)
    assert list(measured.returns) == ["sample", "0.5", "zero"]
    assert measured.returns["sample"]["return_mean"] < measured.returns["0.5"]["return_mean"] < -0.01
    assert measured.returns["zero"]["return_mean"] == pytest.approx(0, abs=1e-6)
    assert measured.returns["zero"]["gain_low"] > 0
    for rule, scale in (("sample", 1.0), ("0.5", 0.5), ("zero", 0.0)):  # on the same episodes, as anybody measures it
        again = rollout(MeamPolicy.from_pretrained(exported, noise_scale=scale), where.env, EPISODES, ACTING_SEED)
        assert measured.returns[rule]["return_mean"] == again.return_mean


def test_sampling_is_recorded_where_noise_pays(checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path) -> None:
    exported = export_policy(checkpoint, tmp_path / "policy", acting="auto", task=task(mode, wants_noise=True))
    measured = exported.spec.acting.measured
    assert exported.spec.acting_name == "sample"
    assert measured is not None
    assert measured.returns["sample"]["return_mean"] > measured.returns["0.5"]["return_mean"] > 0
    assert measured.returns["zero"]["gain_high"] < 0


def test_best_of_n_competes_where_it_is_exported_and_the_graph_is_that_of_the_rule(
    checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"best_of": 8, "acting": "auto", "variants": ("k1",)}
    near_mode = export_policy(checkpoint, tmp_path / "zero", task=task(mode), **arguments)
    assert list(near_mode.spec.acting.measured.returns) == ["sample", "0.5", "zero", "best-of-8"]  # pyright: ignore[reportOptionalMemberAccess]
    assert (near_mode.spec.acting_name, near_mode.spec.integration.best_of) == ("zero", 1)
    assert near_mode.spec.variants["k1"].integration.best_of == 1
    assert MeamPolicy.from_pretrained(near_mode, variant="k1").spec.acting == ActingRule(0.0)
    # Far in the direction in which the critics pull, the best of several is ahead.
    plain = export_policy(checkpoint, tmp_path / "plain", best_of=8)
    chosen = MeamPolicy.from_pretrained(plain).sample(np.tile(OBSERVATION, (200, 1)), seed=0).mean(axis=(0, 1))
    sampled = MeamPolicy.from_pretrained(near_mode).sample(np.tile(OBSERVATION, (200, 1)), seed=0).mean(axis=(0, 1))
    far = mode + 100 * (chosen - sampled)
    by_value = export_policy(checkpoint, tmp_path / "best", task=task(far, episodes=60), **arguments)
    assert (by_value.spec.acting_name, by_value.spec.integration.best_of) == ("best-of-8", 8)
    policy = MeamPolicy.from_pretrained(by_value, seed=0)
    policy.act(OBSERVATION)
    assert policy.health().value is not None


def test_a_rule_that_is_given_is_recorded_and_measured_where_there_is_an_environment(
    checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path
) -> None:
    unmeasured = {"sample": 1.0, "zero": 0.0, "0.25": 0.25, 0.75: 0.75}
    for number, (acting, scale) in enumerate(unmeasured.items()):
        exported = export_policy(checkpoint, tmp_path / str(number), acting=acting)
        assert exported.spec.acting == ActingRule(scale)
    exported = export_policy(checkpoint, tmp_path / "measured", acting=0.5, task=task(mode, episodes=3))
    measured = exported.spec.acting.measured
    assert measured is not None
    assert (list(measured.returns), measured.episodes) == (["0.5"], 3)
    assert export_policy(checkpoint, tmp_path / "plain").spec.acting == ActingRule()


def test_variants_are_measured_as_they_act(checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path) -> None:
    where = task(mode, episodes=4)
    exported = export_policy(checkpoint, tmp_path / "policy", acting="zero", variants=("k2", "best-of-4"), task=where)
    for name in ("k2", "best-of-4"):
        result = rollout(MeamPolicy.from_pretrained(exported, variant=name), where.env, 4, where.seed)
        assert exported.spec.variants[name].measured["return_mean"] == result.return_mean
        assert (len(set(result.returns)) == 1) == (name == "k2")


def test_the_card_names_the_rule_and_its_measurement(
    checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path
) -> None:
    exported = export_policy(checkpoint, tmp_path / "policy", acting="auto", task=task(mode))
    card = (exported / "README.md").read_text(encoding="utf-8")
    text = " ".join(card.split())
    assert "By the rule `zero`: whoever draws the noise multiplies it by 0" in text
    assert f"Measured over {EPISODES} episodes in Bandit from seed {ACTING_SEED}" in text
    measured = exported.spec.acting.measured
    assert measured is not None
    for rule, f in measured.returns.items():
        assert f"| {rule} | {f['return_mean']:.4g} ({f['return_low']:.4g} … {f['return_high']:.4g}) |" in card
    plain = export_policy(checkpoint, tmp_path / "plain")
    text = " ".join((plain / "README.md").read_text(encoding="utf-8").split())
    assert "By the rule `sample`" in text
    assert "It was not measured against others." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"acting": "auto"}, 'acting is "auto", and the data names no environment.*Give a rule'),
        ({"acting": "loud"}, 'no acting rule "loud"; expected sample, zero'),
        ({"acting": 1.5}, r"noise_scale is 1.5; expected a number from 0"),
        ({"acting": "best-of-4"}, r"best_of is 1; expected the same number. Export with best_of=4 \(--best-of 4\)"),
        ({"acting": "zero", "best_of": 4}, r"a rule for one sample per decision, and best_of is 4; expected best_of=1"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_the_remedy_and_nothing_is_written(
    checkpoint: Checkpoint, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_policy(checkpoint, tmp_path / "policy", **arguments)
    assert not list(tmp_path.iterdir())


def test_few_episodes_are_refused_for_a_choice(checkpoint: Checkpoint, mode: NDArray[Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='episodes is 9; expected 10 or more with acting "auto"'):
        export_policy(checkpoint, tmp_path / "policy", acting="auto", task=task(mode, episodes=9))


def test_without_a_task_the_environment_of_the_data_is_made(checkpoint: Checkpoint, tmp_path: Path) -> None:
    named = replace(checkpoint, spec=replace(checkpoint.spec, environment_id="tests/Nowhere-v0"))
    with pytest.raises(NotFoundError, match='no environment "tests/Nowhere-v0".*Give a rule .*task=LadderTask'):
        export_policy(named, tmp_path / "policy", acting="auto")
    assert not list(tmp_path.iterdir())
