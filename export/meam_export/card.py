"""The model card of a policy folder."""

from __future__ import annotations

import json
from importlib.resources import files

from huggingface_hub import ModelCard, ModelCardData

from meam_export.graph.parity import ParityReport
from meam_export.variants.ladder import FIGURES
from meam_policy.errors import MissingExtraError
from meam_policy.spec import BoxSpec, PolicySpec, VariantSpec
from meam_training.runs.checkpoint import Checkpoint

__all__ = ["render_card"]

_METHODS = {
    "bc": "behaviour cloning with a flow policy",
    "qam": "Q-learning with Adjoint Matching (QAM)",
    "qam-edit": "QAM with a bounded residual edit policy (QAM-EDIT)",
    "trqam": "Trust Region Q Adjoint Matching (TRQAM)",
    "me-am": "Maximum Entropy Adjoint Matching (ME-AM)",
}


def render_card(spec: PolicySpec, checkpoint: Checkpoint, parity: ParityReport) -> str:
    """Fill in the model card's template: front matter, usage, inputs and outputs, variants and training.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    tags = ["offline-rl", "flow-matching", "onnx", spec.method]
    if spec.environment_id is not None:
        tags.append(spec.environment_id)
    data = ModelCardData(library_name="meam-policy", pipeline_tag="robotics", tags=tags, license=spec.license)
    try:
        card = ModelCard.from_template(
            data,
            template_str=(files("meam_export") / "model_card_template.md").read_text(encoding="utf-8"),
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
            steps=checkpoint.step,
            settings=json.dumps(dict(spec.hyperparameters), indent=2),
            parity=parity,
            acting=_acting_rows(spec),
            variants=[_variant_row(name, variant) for name, variant in spec.variants.items()],
            figures=FIGURES,
        )
    except ImportError as error:
        raise MissingExtraError("The model card needs jinja2: pip install 'meam-policy[export]'.") from error
    return str(card)


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
