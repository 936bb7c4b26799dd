"""Whether a graph was exported with the `config.json` beside it, and is what that says of it."""

from __future__ import annotations

from meam_policy.errors import FormatError, IntegrityError
from meam_policy.graph.graph_check import GraphSummary

__all__ = ["SPEC_HASH", "check_declared", "check_identity"]

SPEC_HASH = "spec_sha256"
"""Name of the entry of a graph's metadata that says with which spec it was exported."""


def check_identity(summary: GraphSummary, expected: str | None, name: str) -> None:
    """Refuse a graph that was exported with another `config.json`.

    A graph without the entry was not exported by this project, and is taken.

    Args:
        summary: The graph.
        expected: `Config.graph_identity` of the folder; None compares nothing.
        name: Name of the graph's file.

    Raises:
        IntegrityError: the graph carries another identity.
    """
    seen = summary.metadata.get(SPEC_HASH)
    if expected is None or seen is None or seen == expected:
        return
    raise IntegrityError(
        f"{name} was exported with another config.json: its {SPEC_HASH} is {seen[:16]}…, that of this config.json "
        f"{expected[:16]}…. One was edited, or belongs to another export. Download or export the policy again."
    )


def check_declared(summary: GraphSummary, takes_prefix: bool, precision: str, name: str) -> None:
    """Refuse a graph that is not what its entry in `config.json` says: its identity does not cover that.

    Args:
        summary: The graph.
        takes_prefix: What the entry says.
        precision: What the entry says: "fp32", "int8" or "fp16".
        name: Name of the graph's file.

    Raises:
        FormatError: the graph takes a prefix and the entry does not say so, or the reverse; or its weights are of
            another precision.
    """
    takes = "prefix" in summary.inputs
    if takes != takes_prefix:
        seen, said = f"takes {'a' if takes else 'no'} prefix", f"takes_prefix {str(takes_prefix).lower()}"
    elif _precision(summary) != precision:
        seen, said = f"has {_precision(summary)} weights", precision
    else:
        return
    raise FormatError(f"{name} {seen}, but config.json says {said}. Download or export the policy again.")


def _precision(summary: GraphSummary) -> str:
    types = set(summary.weight_types)
    if types & {"int8", "uint8", "int4", "uint4"}:
        return "int8"
    return "fp16" if types & {"float16", "bfloat16"} else "fp32"
