"""Plays a package with the real physicalai; run by check.py in a Python that has it. Prints one line of JSON."""

import json
import sys

import numpy as np
from physicalai.inference.model import InferenceModel


def main() -> None:
    """Play the reference's episodes."""
    model, reference = InferenceModel.from_pretrained(sys.argv[1]), np.load(sys.argv[2])
    differing = 0
    for rows, wanted in zip(reference["rows"], reference["actions"], strict=True):
        model.reset()
        for row, action in zip(rows, wanted, strict=True):
            differing += not np.array_equal(model.select_action({"state": row[None]}), action)
    print(json.dumps({"ticks": int(reference["rows"].shape[0] * reference["rows"].shape[1]), "differing": differing}))


if __name__ == "__main__":
    main()
