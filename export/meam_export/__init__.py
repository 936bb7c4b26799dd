"""Export trained policies to ONNX, with the ODE unrolled, as folders that meam_policy loads."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meam_export.export import Exported, export_policy
    from meam_export.variants.ladder import LadderTask

__all__ = ["Exported", "LadderTask", "export_policy"]

_MODULES = {
    "Exported": "meam_export.export",
    "LadderTask": "meam_export.variants.ladder",
    "export_policy": "meam_export.export",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: these need PyTorch, which `meam_export.deploy` does without.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
