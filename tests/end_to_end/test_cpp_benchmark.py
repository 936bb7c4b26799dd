"""The script in benchmarks/cpp, with times made by hand."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def script():
    path = Path(__file__).parents[2] / "benchmarks" / "cpp" / "run.py"
    spec = importlib.util.spec_from_file_location("cpp_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_calls_of_the_network_and_queued_ones_are_told_apart_and_compared_round_by_round(script):
    # A round in which everything takes twice as long changes no ratio.
    cpp, python, bare = ([[-ran, queued, queued]] for ran, queued in ((42, 0.5), (100, 20), (40, -40)))
    taken = {
        name: np.array([*times, *(2 * np.array(times))], float)
        for name, times in zip(script.NAMES, (cpp, python, bare), strict=True)
    }
    lines = script.table(taken)
    assert lines[2:7] == [
        "| C++ `act` | queued action | 0.75 | 1.00 | 1 |",
        "| C++ `act` | with the network | 63.00 | 83.58 | 84 |",
        "| Python `act` | queued action | 30.00 | 40.00 | 40 |",
        "| Python `act` | with the network | 150.00 | 199.00 | 200 |",
        "| `Session::Run` alone |  | 60.00 | 80.00 | 80 |",
    ]
    assert "0.75 µs at p50. Goal below 1 µs: met." in lines[8]
    assert "C++ 1.050 (quartiles 1.050 to 1.050), Python 2.50. Goal for C++ at most 1.1: met." in lines[9]
