"""Times matrix products, and counts the operations in those of one update.

A worker of `race`, started as `python -m meam_training.benchmark.matmul_worker SETTINGS_JSON`. Its forms are the
precisions; one repetition is one product of the setting's dominant shape.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from meam_training.benchmark.learner_worker import make_update, prepare_torch, serve, timed
from meam_training.benchmark.settings import Setting

__all__ = ["count_flops"]

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def count_flops(setting: Setting, method: str, **overrides: Any) -> int:
    """Count the floating-point operations in the matrix products of an uncompiled update, two per multiply-add."""
    update = make_update(setting, method=method, device="cpu", **overrides)
    with FlopCounterMode(display=False) as counter:
        update()
    return counter.get_total_flops()


def main() -> None:
    """Time the products described by the settings."""
    settings = json.loads(sys.argv[1])
    setting, device = Setting.from_json(settings["setting"]), settings["device"]
    prepare_torch(settings["threads"], tf32=settings["tf32"])
    rows, inner, columns = setting.product
    forms = {}
    for precision in settings["precisions"]:
        left = torch.randn(rows, inner, device=device, dtype=_DTYPES[precision])
        right = torch.randn(inner, columns, device=device, dtype=_DTYPES[precision])
        out = torch.empty(rows, columns, device=device, dtype=_DTYPES[precision])
        forms[precision] = timed(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), device)
        forms[precision](10)
    serve(
        forms,
        {"flops": {label: count_flops(setting, **update) for label, update in settings["updates"].items()}},
        device,
    )


if __name__ == "__main__":
    main()
