"""Reads ONNX files byte by byte, and refuses what no policy needs."""
