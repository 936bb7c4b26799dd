"""The policy as one ONNX graph, and the check of what it computes."""
