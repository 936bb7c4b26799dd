"""Plays a LEAPP bundle with the real leapp; run by check.py in a Python that has it. Prints one line of JSON."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from leapp import InferenceManager


def main() -> None:
    """Play the reference's episodes, each from a reset, and load damaged copies of the bundle."""
    bundle, reference = Path(sys.argv[1]), np.load(sys.argv[2])
    description = bundle / f"{bundle.name}.yaml"
    manager = InferenceManager(str(description))
    parts, names, copies = (json.loads(argument) for argument in sys.argv[3:6])
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
                "refused": {name: _refuses(file) for name, file in copies.items()},
            }
        )
    )


def _refuses(description: str) -> bool:
    """Whether leapp refuses to load a bundle, which it does by a ValueError."""
    try:
        InferenceManager(description)
    except ValueError:
        return True
    return False


if __name__ == "__main__":
    main()
