"""Export trained policies to ONNX, with the ODE unrolled, as folders that meam_policy loads."""

from meam_export.export import export_policy

__all__ = ["export_policy"]
