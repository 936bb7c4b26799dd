"""Reading ONNX files byte by byte, and refusing what no policy needs."""
