import importlib.metadata
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from meam_policy import ActionError, ConfigError, DeviceError
from meam_policy.commands.doctor import run
from meam_policy.diagnosis import doctor
from meam_policy.diagnosis.doctor import Finding, diagnose
from meam_policy.diagnosis.probe import Probe

onnxruntime = pytest.importorskip("onnxruntime")
DISTRIBUTIONS = importlib.metadata.packages_distributions()  # takes a third of a second
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.fixture(autouse=True)
def calm(monkeypatch):
    """A machine at rest, whose clock takes no second to look at, with no variables that are looked at."""
    monkeypatch.setattr(doctor, "tick_lateness_ms", lambda rate_hz: np.full(50, 0.1))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 4)
    monkeypatch.setattr(doctor, "cpu_limit", lambda: None)
    monkeypatch.setattr(doctor, "memory_limit", lambda: None)
    monkeypatch.setattr(doctor, "available_memory", lambda: 2**32)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: DISTRIBUTIONS)
    for name in list(os.environ):
        if name.startswith(("OMP_", "KMP_", "OPENBLAS_", "MKL_", "ORT_", "NVIDIA_", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")


@pytest.fixture
def offer(monkeypatch):
    """Stand-ins for an onnxruntime that offers providers, and for what each does: a Probe, or an error."""

    def change(**outcomes):
        names = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
        outcomes = {"cpu": Probe(CPU, exact=True), **outcomes}
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [names[name] for name in outcomes])

        def probe_device(device):
            outcome = outcomes.get(device, DeviceError(f'device="{device}", but onnxruntime offers only {[CPU]} here.'))
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(doctor, "probe_device", probe_device)

    return change


@pytest.fixture
def libraries(monkeypatch):
    """Which CUDA libraries are there, by name."""

    def change(*names):
        monkeypatch.setattr(doctor, "_is_found", lambda name, file: name in names)

    change("cudart", "cublas", "cublasLt", "cudnn")
    return change


def named(findings, name):
    found = [finding for finding in findings if finding.name == name]
    assert len(found) == 1, findings
    return found[0]


def levels(findings):
    return {finding.name: finding.level for finding in findings}


def test_machine_at_rest_has_no_problem_and_no_warning_about_itself(offer):
    offer()
    findings = diagnose()
    assert {"ok", "note"} >= {f.level for f in findings if f.name not in ("Hub", "clock")}
    for name in ("Python", "system", "packages", "onnxruntime", "cpu", "processor", "cores", "memory", "ticks"):
        assert named(findings, name).level == "ok"


def test_every_finding_that_matters_has_a_remedy_and_all_have_something_seen(offer, libraries, monkeypatch):
    offer(cuda=DeviceError("no"), tensorrt=Probe(TENSORRT, exact=False))
    libraries()
    monkeypatch.setattr(doctor, "available_memory", lambda: 1)
    monkeypatch.setattr(doctor, "cpu_limit", lambda: 0.5)
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 0.0, 0.0))
    for finding in diagnose("auto"):
        assert finding.seen
        if finding.level != "ok":
            assert finding.remedy.endswith((".", "python ...")), finding


def test_versions_are_those_that_are_installed():
    seen = named(diagnose(), "packages").seen
    for name in ("numpy", "gymnasium", "meam-policy"):
        assert f"{name} {importlib.metadata.version(name)}" in seen
    wheel = named(diagnose(), "onnxruntime").seen
    assert onnxruntime.__version__ in wheel


def test_an_onnxruntime_that_is_too_old_for_some_graphs_is_a_note(offer, monkeypatch):
    offer()
    assert named(diagnose(), "graphs").level == "ok"
    monkeypatch.setattr(onnxruntime, "__version__", "1.21.0")
    finding = named(diagnose(), "graphs")
    assert finding.level == "note"
    assert finding.seen == ("onnxruntime 1.21.0 is too old for some: graphs with 8-bit weights (int8) need 1.22")
    assert "`meam info` shows what each of a policy's graphs needs" in finding.remedy


def switching_import():
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return onnxruntime


@pytest.mark.parametrize(
    ("value", "modules", "level", "seen"),
    [
        (None, {}, "ok", "is off"),
        ("1", {"onnxruntime": sys}, "ok", "is off"),
        ("0", {}, "note", "is '0'"),
        (None, {"onnxruntime": sys}, "note", "imported before"),
    ],
)
def test_telemetry_is_off_unless_somebody_wants_it_or_imported_onnxruntime_first(
    offer, monkeypatch, value, modules, level, seen
):
    offer()
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    if value is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", value)
    monkeypatch.setattr(doctor, "import_onnxruntime", switching_import)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    finding = named(diagnose(), "telemetry")
    assert finding.level == level
    assert seen in finding.seen


def test_two_wheels_of_onnxruntime_are_a_problem_and_named_with_the_way_out(offer, monkeypatch):
    offer()
    wheels = ["onnxruntime-gpu", "onnxruntime", "onnxruntime"]
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": wheels, "numpy": ["x"]})
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    finding = named(diagnose(), "onnxruntime")
    assert finding.level == "problem"
    assert finding.seen == "onnxruntime 1.2.3, onnxruntime-gpu 1.2.3 have overwritten each other's files"
    assert finding.remedy.startswith("pip uninstall -y onnxruntime onnxruntime-gpu, then install one again")


def test_missing_onnxruntime_is_a_problem_and_all_else_is_still_looked_at(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "packages_distributions", dict)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    findings = diagnose()
    assert named(findings, "onnxruntime").level == "problem"
    assert "pip install 'meam-policy[cpu]'" in named(findings, "onnxruntime").remedy
    assert {"cores", "ticks", "Hub"} <= set(levels(findings))
    assert "cpu" not in levels(findings)


def test_half_removed_onnxruntime_is_a_problem(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime"]})
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    finding = named(diagnose(), "onnxruntime")
    assert finding.level == "problem"
    assert "cannot import name 'InferenceSession'" in finding.seen
    assert "pip uninstall -y onnxruntime," in finding.remedy


@pytest.mark.parametrize(
    ("device", "level"), [("cpu", "note"), ("auto", "warning"), ("cuda", "problem"), ("tensorrt", "note")]
)
def test_provider_that_is_offered_and_does_not_start_matters_as_much_as_it_is_wanted(offer, libraries, device, level):
    offer(
        cuda=DeviceError('device="cuda", but onnxruntime could only create [].'), tensorrt=Probe(TENSORRT, exact=True)
    )
    finding = named(diagnose(device), "cuda")
    assert finding.level == level
    assert "onnxruntime could only create []." in finding.seen


def test_provider_that_starts_and_cannot_run_a_graph_is_a_problem(offer, libraries):
    offer(cuda=ActionError("the probe graph failed while it ran"))
    assert named(diagnose("cuda"), "cuda").level == "problem"


def test_device_that_is_not_offered_is_a_problem_only_if_it_is_asked_for(offer):
    offer()
    assert "cuda" not in levels(diagnose())
    assert "cuda" not in levels(diagnose("auto"))
    finding = named(diagnose("cuda"), "cuda")
    assert finding == Finding("cuda", "problem", f"onnxruntime offers only {[CPU]} here.")


def test_cpu_that_does_not_work_is_always_a_problem(offer):
    offer(cpu=ActionError("illegal instruction"))
    assert named(diagnose(), "cpu").level == "problem"


@pytest.mark.parametrize(("exact", "level"), [(True, "ok"), (False, "warning")])
def test_tf32_is_what_the_products_say(offer, libraries, exact, level):
    offer(cuda=Probe(CUDA, exact=exact))
    findings = diagnose("cuda")
    assert (named(findings, "cuda").level, named(findings, "TF32").level) == ("ok", level)


@pytest.mark.parametrize(
    ("device", "works", "level"),
    [("cpu", False, "note"), ("auto", False, "warning"), ("cuda", False, "problem"), ("cuda", True, "note")],
)
@pytest.mark.skipif(sys.platform != "linux", reason="libraries have other names elsewhere")
def test_cuda_libraries_that_are_missing_are_named(offer, libraries, device, works, level, monkeypatch):
    monkeypatch.setattr(onnxruntime, "cuda_version", "12.8", raising=False)
    offer(cuda=Probe(CUDA, exact=True) if works else DeviceError("no"))
    libraries("cudart", "cublasLt")
    finding = named(diagnose(device), "CUDA libraries")
    assert (finding.level, finding.seen) == (level, "not found: libcublas.so.12, libcudnn.so.9")


@pytest.mark.skipif(sys.platform != "linux", reason="libraries have other names elsewhere")
def test_cuda_libraries_that_are_all_there_are_fine_and_nobody_looks_where_cuda_is_not_offered(offer, libraries):
    offer(cuda=Probe(CUDA, exact=True))
    assert named(diagnose(), "CUDA libraries").level == "ok"
    offer()
    assert "CUDA libraries" not in levels(diagnose())


def test_libraries_are_found_in_wheels_in_library_paths_and_by_the_linker(tmp_path, monkeypatch):
    wheel, folder = tmp_path / "nvidia/cublas/lib", tmp_path / "cuda"
    wheel.mkdir(parents=True)
    folder.mkdir()
    (wheel / "libcublas.so.12").touch()
    (folder / "libcudart.so.12.4").touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor.ctypes.util, "find_library", {"cudnn": "libcudnn.so.9"}.get)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/missing{os.pathsep}{folder}{os.pathsep}")
    wanted = ["cublas.so.12", "cublas.so.13", "cublasLt.so.12", "cudart.so.12", "cudnn.so.9", "cudnn.so.8"]
    found = [name for name in wanted if doctor._is_found(name.split(".")[0], f"lib{name}")]
    assert found == ["cublas.so.12", "cudart.so.12", "cudnn.so.9"]


@pytest.mark.parametrize(("limit", "level"), [(None, "ok"), (0.5, "warning"), (2.5, "note")])
def test_quota_of_a_control_group_is_told(offer, monkeypatch, limit, level):
    offer()
    monkeypatch.setattr(doctor, "cpu_limit", lambda: limit)
    finding = named(diagnose(), "cores")
    assert finding.level == level
    assert limit is None or f"the time of {limit:g}" in finding.seen


@pytest.mark.parametrize(
    ("available", "limit", "level"),
    [(2**30, None, "ok"), (2**20, None, "warning"), (2**30, 2**20, "warning"), (None, None, "ok"), (None, 2**33, "ok")],
)
def test_little_memory_is_a_warning(offer, monkeypatch, available, limit, level):
    offer()
    monkeypatch.setattr(doctor, "available_memory", lambda: available)
    monkeypatch.setattr(doctor, "memory_limit", lambda: limit)
    assert named(diagnose(), "memory").level == level


def test_load_above_the_cores_is_a_warning(offer, monkeypatch):
    offer()
    assert "load" not in levels(diagnose())
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 0.0, 0.0))
    finding = named(diagnose(), "load")
    assert (finding.level, finding.seen) == ("warning", "7.0 processes want to run on 4 cores")


@pytest.mark.parametrize(
    ("names", "level"), [(["performance"], "ok"), (["powersave"], "note"), (["performance", "ondemand"], "note")]
)
def test_governor_other_than_performance_is_a_note(offer, monkeypatch, names, level):
    offer()
    monkeypatch.setattr(doctor, "governors", lambda: names)
    finding = named(diagnose(), "clock speed")
    assert finding.level == level
    assert all(name in finding.seen for name in names)


def test_governor_that_cannot_be_read_is_not_mentioned(offer, monkeypatch):
    offer()
    monkeypatch.setattr(doctor, "governors", list)
    assert "clock speed" not in levels(diagnose())


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no schedulers to choose from")
@pytest.mark.parametrize(
    ("policy", "allowed", "level", "seen"),
    [
        ("SCHED_FIFO", False, "ok", "has a real-time scheduler"),
        ("SCHED_OTHER", True, "ok", "allowed, not in use"),
        ("SCHED_OTHER", False, "note", "may not ask"),
        ("SCHED_OTHER", None, "note", "may not ask"),
    ],
)
def test_real_time_scheduling_is_in_use_allowed_or_not(offer, monkeypatch, policy, allowed, level, seen):
    offer()
    monkeypatch.setattr(os, "sched_getscheduler", lambda pid: getattr(os, policy))
    monkeypatch.setattr(doctor, "may_use_realtime", lambda: allowed)
    finding = named(diagnose(), "real time")
    assert finding.level == level
    assert seen in finding.seen


@pytest.mark.parametrize(
    ("rate", "late", "level"),
    [
        (50, [0.1] * 50, "ok"),
        (50, [0.1] * 45 + [3.0] * 5, "warning"),
        (50, [0.1] * 999 + [21.0], "warning"),
        (50, [0.1] * 999 + [19.0], "ok"),
        (1000, [0.2] * 50, "warning"),
    ],
)
def test_ticks_are_judged_by_their_period(offer, monkeypatch, rate, late, level):
    offer()
    monkeypatch.setattr(doctor, "tick_lateness_ms", lambda rate_hz: np.array(late))
    finding = named(diagnose(rate_hz=rate), "ticks")
    assert finding.level == level
    assert f"at {rate} Hz (every {1000 / rate:g} ms)" in finding.seen
    assert f"at most {max(late):.2f}" in finding.seen


@pytest.mark.parametrize(("resolution", "level"), [(1e-9, "ok"), (0.0156, "warning")])
def test_coarse_clock_is_a_warning(offer, monkeypatch, resolution, level):
    offer()
    clock = types.SimpleNamespace(get_clock_info=lambda name: types.SimpleNamespace(resolution=resolution))
    monkeypatch.setattr(doctor, "time", clock)
    assert named(diagnose(), "clock").level == level


@pytest.mark.parametrize(
    ("variables", "level", "seen"),
    [
        ({}, "note", "NumPy may start one for every core"),
        ({"OMP_NUM_THREADS": "1"}, "ok", "OMP_NUM_THREADS=1"),
        ({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}, "warning", "OMP_NUM_THREADS=1, OMP_WAIT_POLICY=active"),
        ({"ORT_SOMETHING": "x"}, "note", "ORT_SOMETHING=x"),
    ],
)
def test_variables_of_thread_pools_are_shown(offer, monkeypatch, variables, level, seen):
    offer()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = named(diagnose(), "threads")
    assert (finding.level, finding.seen) == (level, seen)


def test_variables_that_change_the_gpu_are_told(offer, monkeypatch):
    offer()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = levels(diagnose())
    assert (found["TF32"], found["GPUs"]) == ("warning", "note")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not {"TF32", "GPUs"} & set(levels(diagnose()))


def test_hub_offline_needs_a_cache_and_online_one_that_can_be_written(offer, monkeypatch, tmp_path):
    offer()
    constants = doctor.hub_constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "does not exist" in named(diagnose(), "Hub").seen
    (tmp_path / "hub").mkdir()
    assert named(diagnose(), "Hub").level == "ok"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert named(diagnose(), "Hub").level == "note"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert named(diagnose(), "Hub").level == "warning"


def test_tokens_are_never_shown(offer, monkeypatch):
    offer()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(diagnose())


@pytest.mark.parametrize(("modules", "level"), [([], None), (["torch"], "note")])
def test_torch_is_a_note_if_it_is_imported(offer, monkeypatch, modules, level):
    offer()
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert levels(diagnose()).get("torch") == level


@pytest.mark.parametrize(("arguments", "message"), [(("gpu",), "device is 'gpu'"), (("cpu", 0), "rate_hz is 0")])
def test_arguments_that_cannot_be_are_refused(monkeypatch, arguments, message):
    from meam_policy.diagnosis.machine import tick_lateness_ms

    monkeypatch.setattr(doctor, "tick_lateness_ms", tick_lateness_ms)
    with pytest.raises(ConfigError, match=message):
        diagnose(*arguments)


def test_command_as_json_is_one_line_with_every_finding(offer, capfd):
    offer()
    run(["--json", "--rate-hz", "100"], "meam doctor")
    output = capfd.readouterr()
    assert (output.out.count("\n"), output.err) == (1, "")
    data = json.loads(output.out)
    assert (data["device"], data["rate_hz"]) == ("cpu", 100)
    assert [finding["name"] for finding in data["findings"]] == [finding.name for finding in diagnose()]


def test_command_shows_every_finding_within_80_columns_and_fails_for_a_problem(offer, libraries, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    offer(cuda=DeviceError('device="cuda", but it is not [there].'))
    with pytest.raises(DeviceError, match=r"^cuda keeps policies from acting here: it is not \[there\]\.$"):
        run(["--device", "cuda"], "meam doctor")
    output = capfd.readouterr()
    assert output.err == ""
    assert max(map(len, output.out.splitlines())) <= 80
    assert "it is not [there]." in output.out
    for finding in diagnose("cuda"):
        assert any(line.split()[:1] == [finding.level] and finding.name in line for line in output.out.splitlines())


def test_command_succeeds_with_warnings(offer, capfd, monkeypatch):
    offer()
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    run([], "meam doctor")
    assert "warning" in capfd.readouterr().out


@pytest.mark.slow
def test_looking_at_a_machine_imports_neither_torch_nor_onnx(run_python):
    code = (
        "import sys, meam_policy.diagnosis.doctor as d\n"
        "d.diagnose(rate_hz=1000)\n"
        "print([name for name in ('torch', 'onnx', 'tyro', 'rich') if name in sys.modules])"
    )
    result: subprocess.CompletedProcess[str] = run_python("-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"
