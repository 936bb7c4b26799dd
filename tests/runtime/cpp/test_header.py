"""`meam_policy.hpp` acts as `MeamPolicy` does: both run one table of cases, which is made here."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from meam_policy.folder.policy_folder import sha256

sys.path.insert(0, str(Path(__file__).parent))
cases = importlib.import_module("cases")

ROOT = Path(__file__).parents[3]
POCKETS = ROOT / "model_cards" / "pockets"
CASES = cases.CASES


@pytest.fixture(scope="module")
def table(make_policy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = list(cases.policy_cases(cases.policy_folders(make_policy)))
    counters = ("bad_observations", "bad_actions", "out_of_bounds", "unfamiliar", "limited", "rate_limited")
    return cases.table_file(found, "health", counters, tmp_path_factory.mktemp("table"))


def test_actions_and_health_equal_those_of_python_in_every_case(program, table):
    assert program("cases", table).stdout == f"{CASES} cases, 0 failed\n"


def test_actions_and_health_equal_those_of_python_on_the_onnxruntime_of_debian(debian_program, table):
    assert debian_program("cases", table).stdout == f"{CASES} cases, 0 failed\n"


def test_the_program_sees_a_case_that_is_not_equal(program, table, tmp_path):
    few = json.loads(table.read_text())[:3]
    step = next(step for step in few[0]["steps"] if "action" in step)
    step["action"][0] += 2**-20
    few[1]["health"]["steps"] += 1
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(few))
    done = program("cases", changed, check=False)
    assert done.returncode == 1
    assert done.stdout == "3 cases, 2 failed\n"
    assert "case 0, plain, step" in done.stderr
    assert "case 1, float64: steps is" in done.stderr


def test_queued_actions_allocate_nothing(program, make_policy):
    folder = make_policy(chunk_size=100, execute_steps=100).folder
    assert program("allocations", folder).stdout.startswith("0 allocations in 1000000 queued actions")


def drawn(program, seed: int, scale: float, count: int) -> Any:
    return np.array(program("draw", seed, scale, count).stdout.split(), np.float32)


def test_noise_is_standard_normal_and_repeats_with_its_seed(program):
    draws = drawn(program, 1, 1.0, 20000)
    assert stats.kstest(draws, "norm").pvalue > 0.01
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    np.testing.assert_array_equal(drawn(program, 1, 1.0, 20000), draws)
    assert np.intersect1d(drawn(program, 2, 1.0, 1000), draws).size == 0
    np.testing.assert_array_equal(drawn(program, 1, 0.25, 1000), draws[:1000] * np.float32(0.25))
    np.testing.assert_array_equal(drawn(program, 1, 0.0, 10), np.zeros(10))


def test_golden_actions_are_those_of_pytorch(program, debian_program):
    for policy in ("pockets", "pointmaze"):
        for run in (program, debian_program):
            assert run("golden", ROOT / "model_cards" / policy).stdout.startswith("largest difference")


def test_golden_actions_of_another_policy_are_told(program, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(POCKETS, folder)
    config = json.loads((folder / "config.json").read_text())
    config["files"]["policy.onnx"] = config["files"]["policy-k1.onnx"]
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(folder / "policy-k1.onnx", folder / "policy.onnx")
    assert program("golden", folder, check=False).returncode == 1


def test_c_interface_acts_as_python_does(program, make_policy, tmp_path):
    linear = make_policy()
    policy, noise = linear.load(), np.zeros(8)
    noise[:3] = 0.5, -0.25, 0.125
    actions = [policy.select_action([0.25, -0.5, 0.75], noise) for _ in range(3)]
    lines = program("interface", linear.folder, tmp_path / "none").stdout.splitlines()
    assert lines[0] == (
        f"3 The policy folder {tmp_path / 'none'} does not exist. Give the folder that `meam export` wrote."
    )
    assert [[float(number) for number in line.split()] for line in lines[1:4]] == [list(each) for each in actions]
    assert lines[4].startswith("1 Observation is inf at index 1, beyond the finite numbers of float32.")
    assert lines[5] == f"3 2 1 {policy.health().unfamiliarity}"


# Folders that are not loaded. A change of config.json or of files, and what is said of it.


def changed_config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


def put(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def flip(folder: Path) -> None:
    data = bytearray((folder / "policy.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "policy.onnx").write_bytes(data)


def put_robot(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        cases.put_contract(folder, cases.CONTRACTS["hold"])
        data = json.loads((folder / "robot.json").read_text())
        text = json.dumps({**data, **fields}).encode()
        (folder / "robot.json").write_bytes(text)
        config = json.loads((folder / "config.json").read_text())
        config["files"]["robot.json"] = sha256(text)
        (folder / "config.json").write_text(json.dumps(config))

    return change


def vouch_for(graph: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "policy.onnx").write_bytes(graph)
        changed_config(files={"policy.onnx": sha256(graph)})(folder)

    return change


NUMBER = {"name": "a", "kind": "target/joint/position", "unit": "rad", "joint": "j"}
BROKEN: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "no graph": (lambda folder: (folder / "policy.onnx").unlink(), 3, "has no policy.onnx. Give the folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), 3, "has no config.json"),
    "folder in place of a file": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        4,
        "config.json is no regular file",
    ),
    "huge config": (put("config.json", b" " * (2**22 + 1)), 4, "config.json is too large; expected at most 4194304"),
    "no JSON": (put("config.json", b'{"format_version": 1,'), 4, "config.json is not JSON: parse error at line 1"),
    "no text": (put("config.json", b"\xff\xfe{}"), 4, "config.json is not JSON: "),
    "a list": (put("config.json", b"[]"), 4, "config.json is no object of fields"),
    "newer": (changed_config(format_version=2), 4, "format_version is 2; expected 1, which this header reads"),
    "variants": (changed_config(variants={"k1": {"precision": 3}, "k": 1}), 0, "loaded"),
    "key": (changed_config(observation=[{"key": 1, "shape": [3]}]), 4, "observation.key is 1; expected text"),
    "nothing observed": (changed_config(observation=[]), 4, "observation is []; expected a list of boxes"),
    "no size": (changed_config(chunk_size=0), 4, "chunk_size is 0; expected a whole number, 1 to 10000"),
    "half a step": (changed_config(execute_steps=1.5), 4, "execute_steps is 1.5; expected a whole number, 1 to 4"),
    "means": (changed_config(observation_mean=[0.0]), 4, "observation_mean is [0.0]; expected 3 numbers"),
    "text": (changed_config(observation_mean=["0", 0, 0]), 4, 'observation_mean holds "0"; expected finite numbers'),
    "null": (changed_config(observation_std=[1, None, 1]), 4, "observation_std holds null; expected finite numbers"),
    "still": (changed_config(observation_std=[1, 0, 1]), 4, "observation_std is [1,0,1]; expected numbers above 0"),
    "rule": (changed_config(acting={"noise_scale": 2}), 4, "expected a noise_scale from 0 to 1"),
    "no bounds": (
        changed_config(action={"key": None, "shape": [2], "dtype": "float32", "low": [None] * 2, "high": [1, 1]}),
        4,
        "config.json: action.low holds null; expected finite numbers",
    ),
    "type": (
        changed_config(action={"shape": [2], "dtype": "complex64", "low": [0, 0], "high": [1, 1]}),
        4,
        'dtype is "complex64"; expected NumPy\'s name of a type',
    ),
    "bounds": (
        changed_config(action={"shape": [2], "dtype": "float32", "low": [0, 2], "high": [1, 1]}),
        4,
        "the bounds of action number 1 are 2 and 1; expected",
    ),
    "too large": (
        changed_config(action={"shape": [2**40], "dtype": "float32", "low": [0, 2], "high": [1, 1]}),
        4,
        "shape is [1099511627776]; expected at most 2^20 numbers",
    ),
    "no hash": (changed_config(files={}), 5, "config.json records no hash of policy.onnx"),
    "damaged": (flip, 5, "it is damaged, or of another export. Copy the whole folder again."),
    "truncated": (put("policy.onnx", b""), 5, "policy.onnx has SHA-256 e3b0c44298fc1c14..., but config.json records"),
    "pointer": (put("policy.onnx", b"version https://git-lfs"), 4, "is a git-lfs pointer, not the file"),
    "no graph at all": (vouch_for(b"no ONNX"), 4, "policy.onnx cannot be loaded by onnxruntime"),
    "other policy": (
        vouch_for((POCKETS / "policy.onnx").read_bytes()),
        4,
        'policy.onnx: "observation" is [-1, 4] (-1 for any size); expected float32 [1, 3], as config.json says',
    ),
    "contract not recorded": (put("robot.json", b"{}"), 5, "config.json records no hash of robot.json"),
    "contract of a later version": (put_robot(format_version=2), 4, "robot.json: format_version is 2; expected 1"),
    "contract of another robot": (put_robot(action=[NUMBER]), 4, "action is [{"),
    "rate of 0": (put_robot(action=[{**NUMBER, "max_rate": 0}, NUMBER]), 4, "action[0].max_rate is 0; expected a num"),
    "nothing allowed": (
        put_robot(action=[NUMBER, {**NUMBER, "lower": 0.5, "upper": 0.25}]),
        4,
        "robot.json: action[1] has nothing between 0.5 and 0.25; expected limits that leave values",
    ),
    "other rate": (put_robot(timing={"rate_hz": 20}), 4, "timing.rate_hz is 20; expected 10, the rate that the policy"),
    "holding a speed": (
        put_robot(action=[{**NUMBER, "representation": "delta_to_last"}, NUMBER]),
        4,
        'on_failure is "hold"; expected neutral or disable, since a repeated action would go on moving',
    ),
    "unknown failure": (put_robot(timing={"on_failure": "run"}), 4, 'on_failure is "run"; expected hold, neutral,'),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_one_sentence_and_a_status(program, make_policy, name):
    change, status, message = BROKEN[name]
    folder = make_policy(control_rate_hz=10.0).folder
    change(folder)
    seen = program("load", folder, "").stdout
    assert seen.startswith(f"{status} ")
    assert message in seen
    assert seen.count("\n") == 1
    assert len(seen) < 400 + len(str(folder))


def test_variants_are_loaded_by_name(program, make_policy, light_graph):
    linear = make_policy()
    linear.add_variant("int8", light_graph(), precision="int8")
    linear.add_variant("same", linear.graph)
    assert program("load", linear.folder, "same").stdout == "0 loaded\n"
    assert program("load", linear.folder, "int8").stdout == "0 loaded\n"
    assert 'The policy has no variant "k1"; expected none, or' in program("load", linear.folder, "k1").stdout


def test_variant_that_needs_a_newer_onnxruntime_is_refused_with_one_that_does_not(
    debian_program, make_policy, light_graph
):
    linear = make_policy()
    linear.add_variant("int8", light_graph(), precision="int8")
    linear.add_variant("k1", linear.graph)
    assert debian_program("load", linear.folder, "int8").stdout == (
        "6 int8.onnx has 8-bit weights, which need onnxruntime 1.22 or newer; this is 1.21.0. Take the policy itself, "
        "without a variant, or one of its variants k1, or a newer onnxruntime.\n"
    )


def test_clang_has_nothing_to_say_either(toolchain, include):
    flags = ["-std=c++17", "-fsyntax-only", *toolchain.strict, "-I", toolchain.sources, "-isystem", include]
    toolchain.run(toolchain.tool("clang++"), *flags, Path(__file__).with_name("program.cpp"))


@pytest.mark.slow
def test_no_sanitizer_finds_anything(sanitized_program, table, make_policy, tmp_path):
    assert sanitized_program("cases", table).stdout == f"{CASES} cases, 0 failed\n"
    sanitized_program("golden", POCKETS)
    for change, *_ in BROKEN.values():
        folder = make_policy(control_rate_hz=10.0).folder
        change(folder)
        sanitized_program("load", folder, "")
    sanitized_program("interface", make_policy().folder, tmp_path)


def test_hashes_are_those_of_sha256_at_every_length(program, tmp_path):
    data = bytes(range(200))
    (tmp_path / "data").write_bytes(data)
    expected = [hashlib.sha256(data[:size]).hexdigest() for size in range(len(data) + 1)]
    assert program("hash", tmp_path / "data").stdout.split() == expected
