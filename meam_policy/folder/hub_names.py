"""Names on the Hugging Face Hub: what a repository, a branch and a commit may be called."""

from __future__ import annotations

import re

__all__ = ["COMMIT", "REPO_ID", "is_ref_name", "is_repo_id"]

REPO_ID, COMMIT = re.compile(r"[\w.-]+/[\w.-]+"), re.compile(r"[0-9a-f]{40}")
"""What the id of a repository, and the full hash of a commit, look like."""

_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]|\.\.|@\{|//|/\.|\.lock(?:/|\Z)|\A[-/.]|\A@?\Z|[/.]\Z")
"""What makes a text no name of a branch or a tag: the rules of `git check-ref-format`, and a dash at its beginning."""


def is_repo_id(text: str) -> bool:
    """Whether the Hub's client allows a text for the id of a repository, "owner/name"."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return REPO_ID.fullmatch(text) is not None


def is_ref_name(text: str) -> bool:
    """Whether git allows a name for a branch or a tag; it allows commits, too."""
    return _NO_REF.search(text) is None
