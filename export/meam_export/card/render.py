"""The words and figures of a model card: the template, filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from meam_export.card.evaluation import Evaluation, Measured
from meam_export.card.export_record import ExportRecord
from meam_export.variants.ladder import FIGURES
from meam_policy.extras import needs
from meam_policy.folder.policy_folder import sha256
from meam_policy.robot import RobotContract
from meam_policy.robot.table import COLUMNS, contract_rows
from meam_policy.spec import BoxSpec, PolicySpec, VariantSpec

__all__ = ["is_unchanged", "render_card"]

_SEAL = re.compile(rb"\n<!-- Written by meam-policy: ([0-9a-f]{64}) -->\n\Z")

_SOMEWHERE = "path/or/repo-id"

_METHODS = {
    "bc": "behaviour cloning with a flow policy",
    "qam": "Q-learning with Adjoint Matching (QAM)",
    "qam-edit": "QAM with a bounded residual edit policy (QAM-EDIT)",
    "trqam": "Trust Region Q Adjoint Matching (TRQAM)",
    "me-am": "Maximum Entropy Adjoint Matching (ME-AM)",
}


def render_card(
    spec: PolicySpec,
    record: ExportRecord | None,
    evaluations: Sequence[Evaluation] = (),
    missing: Sequence[str] = (),
    datasets: Sequence[str] = (),
    robot: RobotContract | None = None,
) -> str:
    """Fill in the model card's template: front matter, usage, inputs and outputs, results, variants and training.

    Args:
        spec: The policy's spec, with its variants.
        record: How it was exported; None if it has no record of that.
        evaluations: What `meam eval` measured of it.
        missing: Files that were exported and are not in the folder.
        datasets: Ids on the Hub of the data sets that it was trained on. What the spec calls its data stands in the
            text alone: whether the Hub has something of that name, and whether it is this, nobody recorded.
        robot: What the numbers are on the robot; None if there is no contract.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    title = f"{spec.method} policy" + (f" for {spec.environment_id}" if spec.environment_id else "")
    policy = evaluations[0].policy if evaluations else _SOMEWHERE
    with needs("The model card", "jinja2", "export"):
        import jinja2  # noqa: F401  # by which ModelCard fills in templates
    card = ModelCard.from_template(
        _front_matter(spec, title, evaluations, datasets),
        template_str=(files("meam_export") / "model_card_template.md").read_text(encoding="utf-8"),
        title=title,
        policy=json.dumps(policy, ensure_ascii=False),
        spec=spec,
        method=_METHODS.get(spec.method, spec.method),
        boxes=[_box_row(box, "observation") for box in spec.observation],
        action=_box_row(spec.action, "action"),
        numbers=[
            {"index": n.index, "key": _cell(n.key), "name": _cell(n.name), "unit": _cell(n.unit), "side": side}
            for side, numbers in (("in", spec.observation_numbers), ("out", spec.action_numbers))
            for n in numbers
            if n.name is not None
        ],
        robot=None if robot is None else _robot(robot, spec),
        settings=json.dumps(dict(spec.hyperparameters), indent=2),
        record=record,
        missing=missing,
        acting=_acting_rows(spec),
        evaluations=evaluations,
        results=[_result_row(evaluation, rule) for evaluation in evaluations for rule in evaluation.rules],
        gains=any(rule.gain_low is not None for evaluation in evaluations for rule in evaluation.rules),
        variants=[_variant_row(name, variant) for name, variant in spec.variants.items()],
        figures=FIGURES,
    )
    text = f"{card}\n"
    return f"{text}\n<!-- Written by meam-policy: {sha256(text.encode())} -->\n"


def is_unchanged(card: bytes) -> bool:
    """Whether a model card is as `render_card` wrote it: its last line is the hash of what stands before."""
    seal = _SEAL.search(card)
    return seal is not None and sha256(card[: seal.start()]).encode() == seal[1]


def _front_matter(
    spec: PolicySpec, title: str, evaluations: Sequence[Evaluation], datasets: Sequence[str]
) -> ModelCardData:
    """What the Hub reads of a card.

    Results are a model index: the newer `.eval_results` are for benchmarks that the Hub has as data sets.
    """
    tags = ["offline-rl", "flow-matching", "onnx", spec.method]
    if spec.environment_id is not None:
        tags.append(spec.environment_id)
    results = [
        result for evaluation in evaluations for rule in evaluation.rules for result in _results(evaluation, rule)
    ]
    return ModelCardData(
        library_name="meam-policy",
        pipeline_tag="robotics",
        tags=tags,
        datasets=list(datasets) or None,
        # The Hub has its licences by their SPDX identifiers in lower case.
        license=spec.license.lower() if spec.license is not None else None,
        base_model=spec.started_from["policy"] if "commit" in spec.started_from else None,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _results(evaluation: Evaluation, rule: Measured) -> list[EvalResult]:
    how = {
        "acting": rule.acting,
        "variant": rule.variant,
        "episodes": rule.episodes,
        "seed": evaluation.seed,
        "version": evaluation.version,
    }
    about: dict[str, Any] = {
        "task_type": "reinforcement-learning",
        "dataset_type": evaluation.env_id,
        "dataset_name": evaluation.env_id,
    }
    graph = "" if rule.variant is None else f", variant {rule.variant}"
    interval = {"confidence": 0.95, "low": rule.ci_low, "high": rule.ci_high}
    found = [
        EvalResult(
            **about,
            metric_type="mean_reward",
            metric_name=f"mean return ({rule.acting}{graph})",
            metric_value=rule.return_mean,
            metric_args={name: value for name, value in (how | interval).items() if value is not None},
        )
    ]
    if rule.success is not None:
        found.append(
            EvalResult(
                **about,
                metric_type="success_rate",
                metric_name=f"share of episodes with success ({rule.acting}{graph})",
                metric_value=rule.success,
                metric_args={name: value for name, value in how.items() if value is not None},
            )
        )
    return found


def _result_row(evaluation: Evaluation, rule: Measured) -> dict[str, str]:
    last = evaluation.seed + rule.episodes - 1
    gain = "" if rule.gain_low is None else f"{rule.gain_low:.4g} … {rule.gain_high:.4g} over {evaluation.baseline}"
    return {
        "environment": _cell(evaluation.env_id),
        "acting": _cell(rule.acting),
        "variant": rule.variant or "policy",
        "episodes": f"{rule.episodes} (seeds {evaluation.seed} … {last})",
        "return": f"{rule.return_mean:.4g} ({rule.ci_low:.4g} … {rule.ci_high:.4g})",
        "gain": _cell(gain),
        "success": "" if rule.success is None else f"{rule.success:.0%}",
        "p50": f"{rule.latency_p50_ms:.3g}",
        "p99": f"{rule.latency_p99_ms:.3g}",
    }


def _acting_rows(spec: PolicySpec) -> list[dict[str, str]]:
    measured = spec.acting.measured
    return [
        {
            "rule": rule,
            "return": f"{f['return_mean']:.4g} ({f['return_low']:.4g} … {f['return_high']:.4g})",
            "gain": f"{f['gain_low']:.4g} … {f['gain_high']:.4g}" if "gain_low" in f else "",
            "success": f"{f['success']:.0%}" if "success" in f else "",
        }
        for rule, f in (measured.returns if measured else {}).items()
    ]


def _robot(robot: RobotContract, spec: PolicySpec) -> dict[str, Any]:
    """The timing of the robot's contract, and the table of its numbers."""
    rows = [[_cell(cell) for cell in row] for row in contract_rows(robot)]
    return {"timing": robot.describe(spec), "columns": COLUMNS, "rows": rows}


def _variant_row(name: str, variant: VariantSpec) -> dict[str, str]:
    def figure(key: str, form: str = ".2g") -> str:
        return format(variant.measured[key], form) if key in variant.measured else ""

    low, high = figure("return_low", ".4g"), figure("return_high", ".4g")
    return {
        "name": name,
        "evaluations": str(variant.integration.nfe),
        "solver": "one step"
        if variant.one_step
        else variant.integration.solver
        + (", own grid" if variant.integration.time_grid else "")
        + (", rtc" if variant.takes_prefix else ""),
        "precision": variant.precision,
        "action_error": figure("action_error"),
        "sliced_w1": figure("sliced_w1"),
        "return": figure("return_mean", ".4g") + (f" ({low} … {high})" if low else ""),
        "p50": figure("latency_p50_ms", ".3f"),
        "p99": figure("latency_p99_ms", ".3f"),
    }


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _box_row(box: BoxSpec, name: str) -> dict[str, str]:
    ranges = [f"[{low:g}, {high:g}]" for low, high in zip(box.low, box.high, strict=True)]
    if len(set(ranges)) == 1:
        ranges = ranges[:1]
    elif len(ranges) > 12:
        ranges = [f"within [{min(box.low):g}, {max(box.high):g}]; see config.json"]
    return {
        "name": _cell(box.key or name),
        "shape": str(list(box.shape)),
        "dtype": box.dtype,
        "range": " ".join(ranges),
    }
