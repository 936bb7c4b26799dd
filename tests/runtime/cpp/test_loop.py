"""`Loop` of `meam_policy.hpp` follows the schedule of Python's `ControlLoop`: both run one table of cases."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meam_policy.loop.chunk_schedule import prefix_weights

sys.path.insert(0, str(Path(__file__).parent))
cases = importlib.import_module("cases")

CASES = cases.LOOP_CASES


@pytest.fixture(scope="module")
def folders(make_policy: Callable[..., Any]) -> dict[str, Path]:
    return cases.loop_folders(make_policy)


@pytest.fixture(scope="module")
def table(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = list(cases.loop_cases(folders))
    counters = ("failed_inferences", "overruns", "missed_deadlines", "stale_observations", "over_budget", "stopped")
    return cases.table_file(found, "loop_health", counters, tmp_path_factory.mktemp("table"))


def test_actions_and_health_equal_those_of_python_in_every_case(program, table):
    assert program("loop-cases", table).stdout == f"{CASES} cases, 0 failed\n"


def test_actions_and_health_equal_those_of_python_on_the_onnxruntime_of_debian(debian_program, table):
    assert debian_program("loop-cases", table).stdout == f"{CASES} cases, 0 failed\n"


def test_the_weights_of_a_prefix_are_those_of_python(program):
    for size, delay, executed in ((6, 0, 1), (6, 2, 3), (6, 9, 2), (10, 3, 10), (10, 0, 0), (50, 7, 11)):
        seen = np.array(program("weights", size, delay, executed).stdout.split(), np.float32)
        np.testing.assert_allclose(seen, prefix_weights(size, delay, executed), rtol=1e-6, atol=0)


def test_a_second_thread_computes_the_chunks(program, folders):
    assert program("threads", folders["free, float32"], "rtc", 2000).stdout == "3 loops\n"


@pytest.mark.slow
def test_no_sanitizer_finds_anything(sanitized_program, folders, table):
    assert sanitized_program("loop-cases", table).stdout == f"{CASES} cases, 0 failed\n"
    assert sanitized_program("threads", folders["free, float32"], "rtc", 500).stdout == "3 loops\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": 0.0}, "0 made"),
        ({"rate_hz": -1.0}, "rate_hz is -1; expected ticks a second, above 0"),
        ({"rate_hz": 11.0}, "rate_hz is 11; expected 10, the rate of the actions that the policy was trained on."),
        ({"rate_hz": 11.0, "any_rate": True}, "rate_hz is 11; expected at most 10, that of robot.json: its max_rate"),
        ({"rate_hz": 5.0, "any_rate": True}, "0 made"),
        ({"chunking": "realtime"}, "chunking is realtime, and the graph takes no prefix; expected naive"),
        ({"overrun": "home"}, "overrun is home; expected another one, since no robot.json says where home is"),
        ({"execute_steps": 7}, "execute_steps is 7; expected 1 to chunk_size, 6."),
        ({"simulated_delay": -1}, "A delay is below 0; expected whole ticks"),
        ({"simulated_delay": 6}, "A chunk has 6 actions and takes 6 ticks to arrive: none of it would be executed."),
        ({"expected_delay": 6}, "A chunk has 6 actions and takes 6 ticks to arrive: none of it would be executed."),
        ({"expected_delay": 6, "chunking": "blocking"}, "0 made"),
        ({"max_observation_age_s": 0.0}, "max_observation_age_s is 0; expected seconds above 0."),
        ({"blend_in_s": 1e300}, "blend_in_s is 1e+300; expected a number of seconds, 0 to 3600"),
        ({"blend_in_s": -1.0}, "blend_in_s is -1; expected a number of seconds, 0 to 3600"),
        ({"blend_in_s": 0.5}, "0 made"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(program, folders, changes, message):
    options = {"rate_hz": 10.0, "chunking": "naive", "overrun": "contract", **changes}
    seen = program("loop", folders["hold, float32"], json.dumps(options)).stdout
    assert message in seen
    assert seen.startswith("0 " if message == "0 made" else "7 ")
    assert seen.count("\n") == 1


def test_blending_in_needs_a_place_to_begin(program, make_policy):
    options = {"rate_hz": 10.0, "chunking": "naive", "overrun": "hold", "blend_in_s": 0.5}
    seen = program("loop", make_policy().folder, json.dumps(options)).stdout
    assert seen.startswith("7 blend_in_s is 0.5; expected 0, since robot.json does not say where every action begins")


def test_a_rate_that_nobody_says_is_refused(program, make_policy):
    options = {"rate_hz": 0.0, "chunking": "naive", "overrun": "hold"}
    seen = program("loop", make_policy().folder, json.dumps(options)).stdout
    assert seen.startswith("7 rate_hz is 0; expected ticks a second, above 0, since neither policy nor robot.json says")
