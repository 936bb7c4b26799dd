"""Plays a LEAPP bundle with the real leapp; run by check.py in a Python that has it. Prints one line of JSON."""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from leapp import InferenceManager


def main() -> None:
    """Play the reference's episodes, twice from a reset, and damage copies of the bundle."""
    bundle, reference = Path(sys.argv[1]), np.load(sys.argv[2])
    description = bundle / f"{bundle.name}.yaml"
    manager = InferenceManager(str(description))
    parts, names = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    differing = 0
    for rows, wanted in zip(reference["rows"], reference["actions"], strict=True):
        manager.reset()
        for row, action in zip(rows, wanted, strict=True):
            fed = {f"policy/{name}": torch.from_numpy(row[None, indices]) for name, indices in parts.items()}
            found = manager(fed)
            flat = np.concatenate([found[f"policy/{name}"].numpy()[0] for name in names])
            differing += not np.array_equal(flat, action)
    print(
        json.dumps(
            {
                "ticks": int(reference["rows"].shape[0] * reference["rows"].shape[1]),
                "differing": differing,
                "refused": _refused(bundle),
            }
        )
    )


def _refused(bundle: Path) -> dict[str, bool]:
    """Whether leapp refuses a bundle with this damage."""
    text = (bundle / f"{bundle.name}.yaml").read_text()
    graph = (bundle / f"{bundle.name}.onnx").read_bytes()
    damages = {
        "another graph": (text, graph + b"\0"),
        "wrong md5": (text.replace(hashlib.md5(graph).hexdigest(), "0" * 32), graph),
        "no md5": ("\n".join(line.replace("md5sum", "md5") for line in text.splitlines()), graph),
        "unknown kind": (text.replace("state/joint/velocity", "state/joint/velocities"), graph),
        "no system information": (text.replace("system information", "system"), graph),
    }
    found = {}
    for name, (description, data) in damages.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / bundle.name
            shutil.copytree(bundle, copy)
            (copy / f"{bundle.name}.yaml").write_text(description)
            (copy / f"{bundle.name}.onnx").write_bytes(data)
            try:
                InferenceManager(str(copy / f"{bundle.name}.yaml"))
                found[name] = False
            except Exception:
                found[name] = True
    return found


if __name__ == "__main__":
    main()
