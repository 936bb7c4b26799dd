"""Shape checks of the mathematics while testing; installed here, before any test imports meam_training."""

import os
import signal

import jaxtyping

SHAPE_CHECKED = ("adjoint", "algorithm", "flow", "heads", "networks", "q_maximizer", "sample_matching")
if "MEAM_WITHOUT_SHAPE_CHECKS" not in os.environ:  # torch.compile cannot trace them: see training/test_compilation.py
    jaxtyping.install_import_hook([f"meam_training.{name}" for name in SHAPE_CHECKED], "beartype.beartype")

# A shell starts its background jobs with SIGINT ignored, and they would hand that on to the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
