"""Threads, shape checks, disk and order of the tests; set here, before a test imports numpy, torch or meam_training."""

import os
import signal
from pathlib import Path

# As many processes as cores run tests (see the Makefile): threads of their own would only get in each other's way.
# The commands that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest

SHAPE_CHECKED = ("meam_training.flow", "meam_training.networks", "meam_training.algorithm")
"""Packages; every module in them is checked: see training/test_shape_checks.py."""

# torch.compile cannot trace them: see training/learning/test_compilation.py
if "MEAM_WITHOUT_SHAPE_CHECKS" not in os.environ:
    jaxtyping.install_import_hook(SHAPE_CHECKED, "shape_checks.when_called")

# A shell starts its background jobs with SIGINT ignored, and they would hand that on to the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test depends on a clock; the first call of many a torch operation would take longer than Hypothesis allows.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=25)
hypothesis.settings.load_profile("tests")

LONGEST = (
    "training/learning/test_compilation.py",
    "export/graph/test_policy_graph.py",
    "training/collection/test_oracles.py",
    "training/runs/test_sweep.py",
    "runtime/cpp/test_loop.py",
    "training/learning/test_distributed.py",
    "runtime/cpp/test_header.py",
    "export/benchmark/test_bench_infer.py",
    "training/test_trainer.py",
    "training/benchmark/test_accuracy_suite.py",
    "end_to_end/test_demo.py",
    "training/collection/test_collect.py",
    "end_to_end/test_wheel.py",
    "training/runs/test_kill.py",
    "end_to_end/test_readme.py",
    "runtime/commands/test_eval_command.py",
    "training/commands/test_train_command.py",
    "training/flow/test_solvers.py",
    "training/learning/test_evaluation.py",
    "training/learning/test_online.py",
    "training/algorithm/test_objectives.py",
)
"""The files that take longest, longest first. A file is one worker's: begun last, it would keep the others waiting."""


CHECKED = [
    Path(__file__).parent / "training" / name
    for name in (*(package.split(".")[1] for package in SHAPE_CHECKED), "test_shape_checks.py")
]
"""Where their tests are, which call everything in them."""


SYNCED = [Path(__file__).parent / name for name in ("runtime/test_atomic_files.py", "training/runs/test_checkpoint.py")]
"""Where files are on the disk before a test goes on; so they are in the commands that tests start."""

FSYNC = os.fsync


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Waiting for the disk takes a quarter of a short training's time; fstat refuses the same descriptors.
    os.fsync = FSYNC if item.path in SYNCED else os.fstat
    # The checks take three quarters of a training's time.
    checked = any(map(item.path.is_relative_to, CHECKED)) and not item.get_closest_marker("slow")
    jaxtyping.config.update("jaxtyping_disable", not checked)
    if item.get_closest_marker("gpu"):
        import torch

        if "MEAM_WITHOUT_SHAPE_CHECKS" not in os.environ or not torch.cuda.is_available():
            pytest.skip("on a machine with a CUDA GPU, `make gpu-check` runs this")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(LONGEST)}
    gone = [str(file) for file in rank if not file.is_file()]
    if gone:
        raise pytest.UsageError(f"LONGEST in {__file__} names files that are gone: {', '.join(gone)}")
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def no_waiting():
    """What would wait for ever, such as for somebody to write into a named pipe, fails instead."""

    def fail(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
