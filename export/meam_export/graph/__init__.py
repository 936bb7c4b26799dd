"""The policy as one ONNX graph, and what it must compute."""
