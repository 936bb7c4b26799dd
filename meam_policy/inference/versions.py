"""The version of onnxruntime that a graph needs."""

from __future__ import annotations

from collections.abc import Mapping

from meam_policy.errors import FormatError, VersionError
from meam_policy.graph.graph_check import IR_VERSIONS, OPSETS, GraphSummary

__all__ = ["least_version", "load_failure", "requires_onnxruntime", "unreadable"]

Version = tuple[int, int]

# The newest opset, and the newest IR version, that each release loads: from 1.20 on by trying them, before that from
# onnxruntime's own table.
_NEWEST: Version = (1, 32)
_OPSETS = {(1, 17): 20, (1, 18): 21, (1, 21): 22, (1, 23): 23, (1, 24): 25, (1, 25): 26, _NEWEST: OPSETS[1]}
_IR_VERSIONS = {(1, 17): 9, (1, 18): 10, (1, 23): 11, (1, 24): 13, _NEWEST: IR_VERSIONS[1]}

_OPERATORS: Mapping[str, Version] = {"com.microsoft.MatMulNBits": (1, 22)}
"""Operators that came later than their opset: MatMulNBits is older, but not with the 8 bits that policies have."""

_WRITTEN: Mapping[str, Version] = {"policies": (1, 17), "graphs with 8-bit weights (int8)": max(_OPERATORS.values())}
"""What each kind of graph needs that `meam export` writes."""

_SIGNS = (
    "is not a registered function/op",
    "No Op registered for",
    "Unsupported model IR version",
    "under development and support for this is limited",
    "bits support is planned",
)


def least_version(graph: GraphSummary) -> Version:
    """The oldest onnxruntime that loads a graph, (major, minor)."""
    needed = [
        next(version for version, newest in releases.items() if newest >= wanted)
        for releases, wanted in ((_OPSETS, graph.opset), (_IR_VERSIONS, graph.ir_version))
    ]
    return max(*needed, *(_OPERATORS[name] for name in graph.operators if name in _OPERATORS), (0, 0))


def requires_onnxruntime(graph: GraphSummary) -> str:
    """The oldest onnxruntime that loads a graph, such as "1.22"."""
    return _shown(least_version(graph))


def unreadable(installed: str) -> dict[str, str]:
    """What an onnxruntime is too old for, of the graphs that `meam export` writes: the version that each needs.

    Args:
        installed: Version of the installed onnxruntime, e.g. "1.20.1".
    """
    return {kind: _shown(needed) for kind, needed in _WRITTEN.items() if _parsed(installed) < needed}


def load_failure(name: str, graph: GraphSummary, installed: str, reason: str, *, on_cpu: bool) -> FormatError:
    """What to raise for a graph that onnxruntime refuses.

    Args:
        name: Name of the graph's file.
        graph: Contents of the graph.
        installed: Version of the installed onnxruntime, e.g. "1.20.1".
        reason: The message of onnxruntime's error.
        on_cpu: Whether the graph was to run on the CPU, to which `least_version` applies.

    Returns:
        VersionError if the onnxruntime is too old for the graph, else FormatError.
    """
    said, needed = _shortened(reason), least_version(graph)
    too_old = _parsed(installed) < needed
    if not (too_old and on_cpu) and not any(sign in reason for sign in _SIGNS):
        return FormatError(f"{name} cannot be loaded by onnxruntime {installed}: {said}")
    wanted = f"onnxruntime {_shown(needed)} or newer" if too_old else "a newer onnxruntime"
    return VersionError(
        f"{name} needs {wanted}, and this is {installed}: take another graph of the policy by variant=, or upgrade "
        f"onnxruntime. It says: {said.removesuffix('.')}."
    )


def _shown(version: Version) -> str:
    return ".".join(map(str, version))


def _parsed(version: str) -> Version:
    major, minor, *_ = (*version.split("."), "0")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else _NEWEST


def _shortened(reason: str) -> str:
    """One line of at most 200 characters: onnxruntime begins with the kind of error, and ends with its cause."""
    line = reason.splitlines()[0] if reason else "no reason is given"
    return line if len(line) <= 200 else f"{line[:45]} … {line[-150:]}"
