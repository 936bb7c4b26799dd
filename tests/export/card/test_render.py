"""The model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from meam_export.card.export_record import ExportRecord
from meam_export.card.render import render_card
from meam_export.graph.parity import ParityRow
from meam_export.variants.ladder import FIGURES
from meam_policy import BoxSpec, PolicySpec
from meam_policy.robot import RobotContract
from meam_policy.robot.table import COLUMNS
from meam_policy.spec import Integration, VariantSpec

SPEC = PolicySpec(
    integration=Integration(nfe=8, solver="heun"),
    observation=(
        BoxSpec((2,), "float64", (-1.0, -2.0), (1.0, 2.0), "arm"),
        BoxSpec((14,), "float32", tuple(-1.0 - i for i in range(14)), (9.0,) * 14, "left|right"),
    ),
    action=BoxSpec((3,), "float32", (-1.0,) * 3, (1.0,) * 3),
    chunk_size=5,
    execute_steps=4,
    observation_mean=(0.0,) * 16,
    observation_std=(1.0,) * 16,
    action_offset=(0.0,) * 3,
    action_scale=(1.0,) * 3,
    method="me-am",
    environment_id="tests/Arm-v0",
    training_data="tests/arm-v0",
    control_rate_hz=100 / 3,
    license="Apache-2.0",
)
MEASURED = {"action_error": 0.0123, "sliced_w1": 0.00456, "latency_p50_ms": 0.12345, "latency_p99_ms": 0.6}
RETURNS = {"return_mean": -193.26, "return_low": -210.0, "return_high": -180.0, "success": 0.75}
VARIANTS = {
    "k3-grid": VariantSpec(
        "policy-k3-grid.onnx", integration=Integration(3, "ab2", (0.0, 0.2, 0.6, 1.0)), measured={**MEASURED, **RETURNS}
    ),
    "int8": VariantSpec("policy-int8.onnx", integration=Integration(8, "heun"), precision="int8", measured=MEASURED),
    "one-step": VariantSpec("policy-one-step.onnx", integration=Integration(1), one_step=True, measured=MEASURED),
    "best-of-4": VariantSpec(
        "policy-best-of-4.onnx", integration=Integration(8, "heun", best_of=4), measured={"latency_p50_ms": 2.0}
    ),
}
PARITY = (ParityRow("random", 1000, 3e-7, 1e-8, 2e-7), ParityRow("recorded", 640, 5e-7, 2e-8, 1e-7))
RECORD = ExportRecord(1234, "a slow processor", "0.1.0", PARITY)


def render(spec: PolicySpec = SPEC, record: ExportRecord | None = RECORD, **options: Any) -> str:
    return render_card(spec, record, **options)


def with_variants(variants: Mapping[str, VariantSpec] = VARIANTS, **changes: Any) -> PolicySpec:
    files = {variant.file: "0" * 64 for variant in variants.values()}
    return replace(SPEC, variants=variants, files=files, **changes)


def tables(card: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells; a pipe after a backslash is text."""
    found: list[list[list[str]]] = []
    before = ""
    for line in card.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
            found = [*found, []] if not before.startswith("|") else found
            found[-1].append([cell.replace("\0", "|") for cell in cells])
        before = line
    return found


def test_the_robots_contract_is_a_table_of_its_numbers() -> None:
    joint = {"kind": "target/joint/position", "unit": "rad", "joint": "el|bow"}
    limits = {"upper": 0.5, "max_rate": 2.0, "stiffness": 40.0, "damping": 2.0, "default": 0.25}
    robot = RobotContract.from_object(
        {"action": [{"name": "a|b", **joint, **limits}], "timing": {"on_failure": "home"}}
    )
    card = render(robot=robot)
    assert "which `MeamPolicy` and `ControlLoop` follow: 33.3333 actions a second; hold between actions; on" in card
    (table,) = (rows for rows in tables(card) if "gains" in rows[0])
    assert table[0] == list(COLUMNS)
    said = ["a|b", "el|bow", "target/joint/position", "rad", "", "absolute", "… to 0.5", "2", "40 / 2", "0.25"]
    assert table[2:] == [["out", "0", *said]]


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(render()).data.to_dict()
    assert data["license"] == "apache-2.0"  # the Hub has them in lower case
    assert data["library_name"] == "meam-policy"
    assert data["pipeline_tag"] == "robotics"
    assert data["tags"] == ["offline-rl", "flow-matching", "onnx", "me-am", "tests/Arm-v0"]
    assert "license" not in ModelCard(render(replace(SPEC, license=None))).data.to_dict()


@pytest.mark.parametrize("name", ["tests/arm-v0", "D4RL/pointmaze/umaze-v2", "/data/arm.hdf5", None])
def test_a_data_set_that_is_not_known_to_be_on_the_hub_is_named_in_the_text_alone(name: str | None) -> None:
    card = render(replace(SPEC, training_data=name))
    assert "datasets" not in ModelCard(card).data.to_dict()
    assert name is None or f"on `{name}`" in card


def test_a_data_set_whose_id_on_the_hub_is_given_is_in_the_front_matter() -> None:
    data = ModelCard(render(datasets=("owner/arm", "owner/more"))).data.to_dict()
    assert data["datasets"] == ["owner/arm", "owner/more"]


def test_only_a_policy_that_came_from_the_hub_is_a_base_model() -> None:
    start = {"policy": "owner/arm", "method": "bc", "weights": "0" * 64, "statistics": "kept"}
    card = render(replace(SPEC, started_from=start))
    assert "base_model" not in ModelCard(card).data.to_dict()  # it may have been a folder of that name
    card = render(replace(SPEC, started_from={**start, "commit": "c" * 40}))
    assert ModelCard(card).data.to_dict()["base_model"] == "owner/arm"
    assert f"weights of `owner/arm` at commit `{'c' * 40}` (bc;" in card


def test_inputs_and_outputs_are_a_table_whatever_their_names() -> None:
    (table,) = tables(render())
    assert table[2:] == [
        ["in", "arm", "[2]", "float64", "[-1, 1] [-2, 2]"],
        ["in", "left|right", "[14]", "float32", "within [-14, 9]; see config.json"],
        ["out", "action", "[3]", "float32", "[-1, 1]"],
    ]


def test_every_variant_is_a_row_with_its_figures() -> None:
    _, table = tables(render(with_variants()))
    assert table[2:] == [
        ["k3-grid", "3", "ab2, own grid", "fp32", "0.012", "0.0046", "-193.3 (-210 … -180)", "0.123", "0.600"],
        ["int8", "8", "heun", "int8", "0.012", "0.0046", "", "0.123", "0.600"],
        ["one-step", "1", "one step", "fp32", "0.012", "0.0046", "", "0.123", "0.600"],
        ["best-of-4", "8", "heun", "fp32", "", "", "", "2.000", ""],
    ]
    card = render(with_variants())
    assert 'variant="k3-grid"' in card
    assert "](ladder.png)" in card
    for name in ("action_error", "sliced_w1", "latency_p50_ms"):
        assert FIGURES[name] in card


def test_without_variants_there_is_no_word_of_them() -> None:
    assert "ariant" not in render()
    assert "ladder.png" not in render()


@pytest.mark.parametrize(
    "spec",
    [SPEC, with_variants(), with_variants(integration=replace(SPEC.integration, best_of=3))],
    ids=["plain", "variants", "best"],
)
def test_every_table_is_well_formed(spec: PolicySpec) -> None:
    card = render(spec)
    lines = card.splitlines()
    for table in tables(card):
        assert len({len(row) for row in table}) == 1
        assert set("".join(table[1])) == {"-"}
    for before, line in pairwise(lines):
        if line.startswith("|") and not before.startswith("|"):
            assert before == ""
        if before.startswith("|") and not line.startswith("|"):
            assert line == ""


@pytest.mark.parametrize("spec", [SPEC, with_variants(), replace(SPEC, environment_id=None, control_rate_hz=None)])
def test_nothing_of_the_template_is_left(spec: PolicySpec) -> None:
    card = render(spec)
    assert not [sign for sign in ("{{", "}}", "{%", "%}", "None", "Undefined") if sign in card.split("```json")[0]]
    assert card.count("```") % 2 == 0
    assert "\n\n\n" not in card


@pytest.mark.parametrize("method", ["bc", "qam", "me-am"])
def test_the_limits_are_one_sentence_that_judges_no_method(method: str) -> None:
    limits = render(replace(SPEC, method=method)).split("## Limits")[1].split("<!--")[0].strip()
    assert limits.count(".") == 1
    assert limits == render(replace(SPEC, method="qam-edit")).split("## Limits")[1].split("<!--")[0].strip()


def test_the_template_beside_the_cards_is_the_one_that_is_filled() -> None:
    root = Path(__file__).parents[3]
    assert (root / "model_cards/template.md").samefile(root / "export/meam_export/model_card_template.md")


def test_the_shape_of_the_noise_is_told() -> None:
    assert "[batch, 15] (standard normal)" in render()
    assert "disagreement" not in render()
    choosing = render(replace(SPEC, integration=replace(SPEC.integration, best_of=3)))
    assert "[batch, samples, 15] (standard normal)" in choosing
    assert "Of the samples, 3 by default, the one with the highest value is returned" in choosing
    assert "`value` [batch]" in choosing
    assert "`disagreement` [batch]" in choosing


def test_steps_rate_and_training_are_told() -> None:
    card = render()
    assert "unrolled to 8 network evaluations (heun method)" in card
    assert "predicts 5 actions, of which\n4 are executed before the next inference" in card
    assert "33.333 actions a second" in card
    assert "1,234 gradient steps" in card
    one = render(replace(SPEC, chunk_size=1, execute_steps=1))
    assert "predicts 1 action, of which\n1 is executed" in one


def test_the_comparison_is_told_with_what_it_left_out() -> None:
    card = render()
    assert (
        "Parity: on 1000 random and 640 recorded inputs, onnxruntime and PyTorch in float64 differed by at most 5.0e-07"
        in card
    )
    rows = tuple(replace(row, near_ties=ties) for row, ties in zip(PARITY, (2, 3), strict=True))
    tied = " ".join(render(record=replace(RECORD, parity=rows)).split())
    assert "640 recorded inputs (5 left out, whose best two chunks tie in float32), onnxruntime" in tied


def test_the_example_of_the_card_is_python() -> None:
    for spec in (SPEC, replace(SPEC, environment_id=None)):
        example = render(spec).split("```python\n")[1].split("```")[0]
        compile(example, "card", "exec")
        assert ("rollout(" in example) == (spec.environment_id is not None)
