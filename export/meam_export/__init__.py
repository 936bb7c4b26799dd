"""Export trained policies to ONNX, with the ODE unrolled, as folders that meam_policy loads."""

from meam_export.export import Exported, export_policy
from meam_export.variants.ladder import LadderTask

__all__ = ["Exported", "LadderTask", "export_policy"]
