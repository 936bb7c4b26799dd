"""`meam verify --untrusted`: in a process with limits, which says what it ran into."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper

from meam_policy import ConfigError, DeviceError, FormatError, cli
from meam_policy.commands.verify import run
from meam_policy.diagnosis import confinement
from meam_policy.folder.policy_folder import sha256

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits need Linux")


def vouch(folder, **files):
    """Put files into a policy folder, with a config.json that has their hashes."""
    spec = json.loads((folder / "config.json").read_text())
    for name, data in files.items():
        name = name.replace("_", ".")
        (folder / name).write_bytes(data)
        spec["files"][name] = sha256(data)
    (folder / "config.json").write_text(json.dumps(spec))


@pytest.fixture
def complete(make_policy):
    """A policy folder with golden actions."""
    linear = make_policy()
    rows = np.random.default_rng(0).integers(-4, 5, (5, 3)).astype(np.float32) / 4
    noise = np.zeros((5, 8), np.float32)
    actions = linear.chunks(rows).astype(np.float32)
    golden = {"observation": rows, "noise": noise, "actions": actions}
    vouch(linear.folder, golden_safetensors=safetensors.numpy.save(golden))
    return linear


def hostile(weights, *nodes):
    """A graph of the policy format, with work between its inputs and its outputs: nodes that make `work` from `row`."""
    constants = {"row_shape": np.array([-1, 3, 1]), "zero": np.float32(0), "shape": np.array([-1, 4, 2]), **weights}
    everything = [
        helper.make_node("Unsqueeze", ["observation", "last"], ["row"]),
        *nodes,
        helper.make_node("ReduceMax", ["work", "axes"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "zero"], ["nothing"]),
        helper.make_node("Unsqueeze", ["nothing", "last_one"], ["column"]),
        helper.make_node("Add", ["noise", "column"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["chunks"]),
        helper.make_node("Clip", ["chunks", "low", "high"], ["actions"]),
    ]
    constants |= {"last": np.array([2]), "axes": np.array([1, 2]), "last_one": np.array([1])}
    constants |= {"low": np.float32(-1), "high": np.float32(1)}
    shapes = {"observation": ["batch", 3], "noise": ["batch", 8], "actions": ["batch", 4, 2]}
    *inputs, output = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items())
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(everything, "hostile", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def verify(folder, *options):
    run([str(folder), "--untrusted", *options], "meam verify")


def test_good_policy_passes_within_the_limits_and_its_report_is_printed(complete, capsys):
    verify(complete.folder, "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert report["graphs"][0]["compared"]


def test_what_verify_refuses_is_refused_with_its_own_words(complete, capsys):
    (complete.folder / "policy.onnx").write_bytes(b"other")
    assert cli.run(["verify", str(complete.folder), "--untrusted"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("meam: ")
    assert "SHA-256" in message
    assert message.count("\n") == 1


def test_graph_that_takes_more_memory_is_named(complete):
    nodes = [helper.make_node("Expand", ["row", "large"], ["work"])]
    vouch(complete.folder, policy_onnx=hostile({"large": np.array([1, 3, 2**22])}, *nodes))
    with pytest.raises(FormatError, match=r"takes more than 0\.1 GB of memory.*--memory-gb") as caught:
        verify(complete.folder, "--memory-gb", "0.1")
    assert str(complete.folder) in str(caught.value)


def test_graph_that_takes_more_time_is_named(complete):
    weights = {"wide": np.array([1, 3, 1024]), "w": np.zeros((1024, 1024), np.float32)}
    weights["tall"] = np.array([1, 200, 1])
    nodes = [helper.make_node("Expand", ["row", "wide"], ["e"]), helper.make_node("Tile", ["e", "tall"], ["v0"])]
    nodes += [helper.make_node("MatMul", [f"v{i}", "w"], [f"v{i + 1}"]) for i in range(100)]
    nodes += [helper.make_node("Identity", ["v100"], ["work"])]
    vouch(complete.folder, policy_onnx=hostile(weights, *nodes))
    with pytest.raises(FormatError, match=r"takes more than 2 s of CPU time.*--cpu-seconds"):
        verify(complete.folder, "--cpu-seconds", "2")


@pytest.fixture
def other_child(complete, tmp_path, monkeypatch):
    """Have a module of these lines run in place of `meam verify`."""

    def put(text):
        (tmp_path / "other_child.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(confinement, "_MODULE", "other_child")
        return complete.folder

    return put


def test_graph_that_brings_the_process_down_is_named_by_the_signal(other_child):
    with pytest.raises(FormatError, match=r"brought its process down \(SIGABRT\)"):
        verify(other_child("import os; os.abort()"))


def test_graph_that_never_returns_ends_at_a_wall_time(other_child, monkeypatch):
    monkeypatch.setattr(confinement, "_SPARE_S", -3)
    with pytest.raises(FormatError, match="not done within 1 s"):
        verify(other_child("import time; time.sleep(100)"), "--cpu-seconds", "1")


def test_process_ends_with_the_one_that_started_it_even_if_that_is_killed(run_python):
    sleep = "import os, time; from meam_policy.diagnosis.confinement import end_with; end_with(os.getppid()); "
    sleep += "print(os.getpid(), flush=True); time.sleep(100)"
    start = "import os, signal, subprocess, sys; "
    start += f"child = subprocess.Popen([sys.executable, '-c', {sleep!r}], stdout=subprocess.PIPE); "
    start += "print(child.stdout.readline().decode(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    child = int(run_python("-c", start).stdout)
    for _ in range(200):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # nobody has waited for it
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it lives on")


def test_process_whose_starter_is_gone_already_ends_at_once(run_python):
    ended = run_python("-c", "from meam_policy.diagnosis.confinement import end_with; end_with(1 << 30)")
    assert ended.returncode == -signal.SIGKILL


def test_named_pipe_in_the_folder_is_refused_and_not_waited_for(complete):
    (complete.folder / "golden.safetensors").unlink()
    os.mkfifo(complete.folder / "golden.safetensors")
    with pytest.raises(FormatError, match="golden.safetensors cannot be read: it is a named pipe"):
        verify(complete.folder)


def test_process_cannot_write_files_and_knows_no_token(other_child, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = tmp_path / "written"
    lines = [
        "import os",
        "from meam_policy.diagnosis.confinement import confine",
        "confine(10**9, 10)",
        "print([name for name in os.environ.items() if 'hf_secret' in name])",
        "try:",
        f"    os.write(os.open({str(file)!r}, os.O_WRONLY | os.O_CREAT), b'x')",
        "except OSError as error:",
        "    print(error.strerror)",
    ]
    verify(other_child("\n".join(lines)))
    assert capsys.readouterr().out == "[]\nFile too large\n"
    assert file.read_bytes() == b""


def test_modules_beside_the_policy_are_not_imported(complete, tmp_path, monkeypatch):
    for name in ("numpy", "onnxruntime", "json", "meam_policy"):
        (complete.folder / f"{name}.py").write_text("import os; os.abort()")
    monkeypatch.chdir(complete.folder)
    verify(".")


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        (("--memory-gb", "0"), "--memory-gb is 0"),
        (("--memory-gb", "nan"), "--memory-gb is nan"),
        (("--memory-gb", "1e9"), r"--memory-gb is 1e\+09"),
        (("--cpu-seconds", "0"), "--cpu-seconds is 0"),
        (("--cpu-seconds", "1000000000000"), "--cpu-seconds is 1000000000000"),
        (("--device", "cuda"), "--device is cuda"),
    ],
)
def test_limits_out_of_range_are_refused(complete, options, seen):
    with pytest.raises(ConfigError, match=seen):
        verify(complete.folder, *options)


def test_other_systems_are_told_that_it_needs_linux(complete, monkeypatch):
    monkeypatch.setattr(confinement.sys, "platform", "win32")
    with pytest.raises(DeviceError, match="needs Linux, and this is win32"):
        confinement.run_confined([], complete.folder, 1.0, 1)
