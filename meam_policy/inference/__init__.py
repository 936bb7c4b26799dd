"""Running graphs with onnxruntime."""
