"""Plays a tick graph with onnxruntime alone; run by check.py in Pythons with other versions. Prints a line of JSON."""

import json
import sys

import numpy as np
import onnxruntime


def main() -> None:
    """Play the reference's episodes, from zeros."""
    session, reference = onnxruntime.InferenceSession(sys.argv[1]), np.load(sys.argv[2])
    inputs = {node.name: node.shape for node in session.get_inputs()}
    outputs = [node.name for node in session.get_outputs()]
    error, ticks = 0.0, 0
    for rows, wanted in zip(reference["rows"], reference["actions"], strict=True):
        state = {name: np.zeros(shape, np.float32) for name, shape in inputs.items() if name.endswith("_in")}
        for row, action in zip(rows, wanted, strict=True):
            found = dict(zip(outputs, session.run(None, {"observation": row[None], **state}), strict=True))
            state = {name: found[f"{name[:-3]}_out"] for name in state}
            off = np.nan_to_num(np.abs(found["action"][0] - action), nan=np.inf)
            error, ticks = max(error, float(off.max())), ticks + 1
    print(json.dumps({"ticks": ticks, "error": error, "version": onnxruntime.__version__}))


if __name__ == "__main__":
    main()
