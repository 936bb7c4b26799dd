"""Whether a graph was exported with the `config.json` beside it."""

from __future__ import annotations

from meam_policy.errors import IntegrityError
from meam_policy.graph.graph_check import GraphSummary

__all__ = ["SPEC_HASH", "check_identity"]

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
