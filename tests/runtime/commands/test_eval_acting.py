"""`meam eval --acting`: rules in one table, on the same episodes."""

import json

import numpy as np
import pytest

from meam_policy import BoxSpec, make_environment
from meam_policy.cli import run
from meam_policy.rollouts.comparison import gain_interval
from meam_policy.rollouts.episodes import rollout
from meam_policy.spec import ActingMeasurement, ActingRule

PENDULUM = BoxSpec((3,), "float32", (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0))
TORQUE = BoxSpec((1,), "float32", (-2.0,), (2.0,))
BOXES = {"observation": [PENDULUM], "action": TORQUE}


@pytest.fixture
def swinger(make_policy):
    """Acts with its noise, by half of it as recorded; a variant chooses among samples, another takes more steps."""
    policy = make_policy(
        **BOXES, noise_weight=np.eye(4), environment_id="Pendulum-v1", execute_steps=4, acting=ActingRule(0.5)
    )
    policy.add_variant("k4", policy.graph, nfe=4)
    policy.add_variant("best-of-3", make_policy(**BOXES, best_of=3).graph, best_of=3)
    return policy


def figures(capfd, *arguments):
    assert run(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def refused(capfd, *arguments):
    assert run(["eval", *map(str, arguments)]) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    return output.err


def returns(policy, seed=4, episodes=2, **how):
    return rollout(policy.load(**how), make_environment("Pendulum-v1"), episodes, seed)


def test_every_rule_is_measured_on_the_same_episodes_with_its_gain_over_sampling(capfd, swinger):
    rules = ["zero", "0.5", "sample", "best-of-2", "best-of-3"]
    found = figures(capfd, swinger.folder, "--episodes", 2, "--seed", 4, "--acting", *rules)
    ways = [{"noise_scale": 0}, {"noise_scale": 0.5}, {"noise_scale": 1}]
    ways += [{"variant": "best-of-3", "best_of": count} for count in (2, 3)]
    results = {rule: returns(swinger, **way) for rule, way in zip(rules, ways, strict=True)}
    assert [row["acting"] for row in found["rules"]] == rules
    assert (found["baseline"], found["env_id"], found["seed"]) == ("sample", "Pendulum-v1", 4)
    for row in found["rules"]:
        result = results[row["acting"]]
        assert row["return_mean"] == result.return_mean
        assert (row["ci_low"], row["ci_high"]) == result.return_interval
        gain = gain_interval(result, results["sample"]) if row["acting"] != "sample" else (None, None)
        assert (row["gain_low"], row["gain_high"]) == gain
        assert row["variant"] == ("best-of-3" if row["acting"].startswith("best") else None)
    assert len({row["return_mean"] for row in found["rules"]}) == 5


def test_the_table_has_a_row_for_every_rule(capfd, swinger, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(["eval", str(swinger.folder), "--episodes", "1", "--acting", "sample", "zero", "0", "1.0"]) == 0
    rows = [[cell.strip() for cell in line.split("│")] for line in capfd.readouterr().out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["sample", "zero"]  # other spellings are the same rules
    assert rows[0][1] == f"{returns(swinger, 0, 1, noise_scale=1).return_mean:.4g}"
    assert (rows[0][3], rows[1][3] != "") == ("", True)


def test_plain_eval_follows_the_recorded_rule_and_says_so(capfd, swinger):
    found = figures(capfd, swinger.folder, "--episodes", 2, "--seed", 4)
    assert (found["acting"], found["return_mean"]) == ("0.5", returns(swinger, noise_scale=0.5).return_mean)
    assert run(["eval", str(swinger.folder), "--episodes", "1"]) == 0
    assert "0.5 (noise scale 0.5), not measured" in " ".join(capfd.readouterr().out.split())
    variant = figures(capfd, swinger.folder, "--episodes", 1, "--variant", "best-of-3")
    assert variant["acting"] == "best-of-3"


def test_one_rule_gives_the_figures_of_a_plain_eval_under_its_name(capfd, swinger):
    found = figures(capfd, swinger.folder, "--episodes", 2, "--seed", 4, "--acting", "zero")
    assert (found["acting"], found["return_mean"]) == ("zero", returns(swinger, noise_scale=0).return_mean)
    assert "rules" not in found


def test_a_rule_for_one_sample_finds_the_graph_that_draws_one(capfd, swinger):
    found = figures(capfd, swinger.folder, "--episodes", 1, "--variant", "best-of-3", "--acting", "best-of-3", "sample")
    assert [row["variant"] for row in found["rules"]] == ["best-of-3", None]


def test_a_graph_that_chooses_takes_any_number_of_samples(capfd, make_policy):
    policy = make_policy(**BOXES, best_of=3, environment_id="Pendulum-v1")
    found = figures(capfd, policy.folder, "--episodes", 1, "--acting", "best-of-3", "best-of-2", "zero")
    assert [row["acting"] for row in found["rules"]] == ["best-of-3", "best-of-2", "zero"]
    assert found["baseline"] == "best-of-3"
    text = refused(capfd, policy.folder, "--acting", "sample")
    assert 'The acting rule "sample" needs a graph that draws one sample per decision' in text
    assert "export with --variants best-of-1." in text


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--acting", "loud"], ['no acting rule "loud"; expected sample, zero']),
        (["--acting", "1.5"], ['no acting rule "1.5"']),
        (
            ["--variant", "k4", "--acting", "best-of-4"],
            ["needs a graph that chooses by value", "like k4.onnx", "--variants k4-best-of-4", "trained critics"],
        ),
        (
            ["--acting", "sample", "zero", "--record", "walk/data-v0"],
            ["--acting names 2 rules; expected one with --record"],
        ),
        (["--acting", "sample", "zero", "--video", "films"], ["--acting names 2 rules; expected one with --video"]),
        (["--acting", "sample", "--variant", "k9"], ['no variant "k9"']),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_remedy(capfd, swinger, arguments, fragments):
    if "--record" in arguments:
        pytest.importorskip("torch")
    text = refused(capfd, swinger.folder, *arguments)
    for fragment in fragments:
        assert fragment in text


def test_info_and_verify_show_the_rule_with_its_measurement(capfd, make_policy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shown = {"return_mean": -6.9, "return_low": -7.9, "return_high": -5.9}
    measured = ActingMeasurement("Pendulum-v1", 50, 7, {"sample": {**shown, "return_mean": -7.5}, "zero": shown})
    policy = make_policy(**BOXES, acting=ActingRule(0.0, measured))
    rule = (
        "zero (noise scale 0): return -6.9 (-7.9 … -5.9) over 50 episodes of Pendulum-v1 from seed 7; "
        "compared with sample -7.5 (-7.9 … -5.9)"
    )
    assert run(["info", str(policy.folder)]) == 0
    assert rule in capfd.readouterr().out
    run(["verify", str(policy.folder)])  # it has no golden actions, which is a fault
    assert f"acts by: {rule}" in capfd.readouterr().out
    run(["verify", str(policy.folder), "--json"])
    assert json.loads(capfd.readouterr().out)["acting"] == rule
