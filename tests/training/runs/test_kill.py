"""What `benchmarks/training/kill.py` does fifty times, a few times."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "training" / "kill.py"


@pytest.mark.slow
def test_a_run_killed_at_random_loses_no_checkpoint_and_ends_as_one_that_was_left_alone(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("kill", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    kill = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kill", kill)
    spec.loader.exec_module(kill)
    report = kill.stress(tmp_path, kills=3, seed=1)
    assert len(report.steps) == 3
    assert report.steps == sorted(report.steps)
    assert report.found["updates"] >= report.steps[-1] + 7
    assert report.found["loaded"] > 0
