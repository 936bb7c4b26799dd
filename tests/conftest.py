"""Shape checks of the mathematics while testing; installed here, before any test imports meam_training."""

import os
import signal

import jaxtyping

SHAPE_CHECKED = ("meam_training.flow", "meam_training.networks", "meam_training.algorithm")
"""Packages; every module in them is checked."""

if (
    "MEAM_WITHOUT_SHAPE_CHECKS" not in os.environ
):  # torch.compile cannot trace them: see training/learning/test_compilation.py
    jaxtyping.install_import_hook(SHAPE_CHECKED, "beartype.beartype")

# A shell starts its background jobs with SIGINT ignored, and they would hand that on to the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)
