"""Export trained policies to ONNX, with the ODE unrolled, as folders that meam_policy loads."""

from meam_export.export import Exported, export_policy

__all__ = ["Exported", "export_policy"]
