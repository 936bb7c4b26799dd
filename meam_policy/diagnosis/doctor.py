"""Checks whether this machine is fit for acting, and what could be improved."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np
from huggingface_hub import constants as hub_constants

from meam_policy.diagnosis.machine import (
    available_memory,
    cpu_limit,
    cpu_model,
    governors,
    may_use_realtime,
    memory_limit,
    tick_lateness_ms,
    usable_cores,
)
from meam_policy.diagnosis.probe import probe_device
from meam_policy.errors import ConfigError, MeamError, MissingExtraError
from meam_policy.inference.providers import TELEMETRY_SWITCH, Device, import_onnxruntime, needs_gpu
from meam_policy.inference.versions import unreadable

__all__ = ["Finding", "Level", "diagnose"]

Level = Literal["ok", "note", "warning", "problem"]
"""A note may be worth knowing, a warning costs time or accuracy, a problem keeps policies from acting on the device."""

PACKAGES = ("meam-policy", "numpy", "gymnasium", "huggingface-hub")
_PROVIDERS: dict[Device, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_LITTLE_MEMORY = 256 * 2**20
_COARSE_CLOCK_S = 1e-3
_REINSTALL = "pip uninstall -y {}, then install one again: pip install 'meam-policy[cpu]' (or [gpu], never both)."


@dataclass(frozen=True)
class Finding:
    """One finding about this machine.

    Attributes:
        name: Subject of the check.
        level: How much it matters.
        seen: What was found.
        remedy: What to do about it; empty if nothing needs doing.
    """

    name: str
    level: Level
    seen: str
    remedy: str = ""


def diagnose(device: Device = "cpu", rate_hz: float = 50.0) -> list[Finding]:
    """Check everything about this machine that matters for acting; takes a second or two.

    An execution provider counts as working only after it has run a graph, in a session like a policy's. Nothing is
    changed, no network is used, and no libraries but onnxruntime's are loaded.

    Args:
        device: Device on which policies are to run; only this one has to work.
        rate_hz: Rate of the control loop, for the jitter of its ticks; 1 to 10,000.

    Returns:
        What was found, in an order for reading.

    Raises:
        ConfigError: the device is unknown, or the rate is out of range.
    """
    if device not in get_args(Device):
        raise ConfigError(f"device is {device!r}; expected one of {', '.join(get_args(Device))}.")
    lateness = tick_lateness_ms(rate_hz)  # first, while this process is at rest
    return [
        *_software(),
        *_onnxruntime(device),
        *_hardware(),
        *_scheduling(),
        *_clock(lateness, rate_hz),
        *_environment(),
    ]


def _software() -> Iterator[Finding]:
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.python_implementation()}")
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    if "torch" in sys.modules:
        remedy = "Acting does not need it: without it a process starts faster and takes less memory."
        yield Finding("torch", "note", "imported in this process", remedy)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "without a version"


def _telemetry(imported: bool) -> Finding:
    """Whether onnxruntime reports to its maker, given whether it had been imported before this package did."""
    value = os.environ.get(TELEMETRY_SWITCH)
    if value == "1" and not imported:
        return Finding("telemetry", "ok", "that of onnxruntime is off")
    remedy = f"Set {TELEMETRY_SWITCH}=1 before Python starts, or import meam_policy's policies before onnxruntime."
    seen = f"{TELEMETRY_SWITCH} is {value!r}" if not imported else "onnxruntime was imported before it was switched off"
    return Finding("telemetry", "note", f"{seen}: from 1.29 on it sends events and keeps a device identifier", remedy)


def _onnxruntime(device: Device) -> Iterator[Finding]:
    imported = "onnxruntime" in sys.modules and TELEMETRY_SWITCH not in os.environ
    wheels = sorted(set(importlib.metadata.packages_distributions().get("onnxruntime", ())))
    shown = ", ".join(f"{wheel} {_version(wheel)}" for wheel in wheels)
    try:
        onnxruntime = import_onnxruntime()
    except MissingExtraError as error:
        remedy = _REINSTALL.format(" ".join(wheels)) if wheels else "pip install 'meam-policy[cpu]' (or [gpu])."
        yield Finding("onnxruntime", "problem", f"cannot be imported: {error.__cause__}", remedy)
        return
    yield _telemetry(imported)
    if len(wheels) > 1:
        seen = f"{shown} have overwritten each other's files"
        yield Finding("onnxruntime", "problem", seen, _REINSTALL.format(" ".join(wheels)))
    else:
        yield Finding("onnxruntime", "ok", shown or f"{onnxruntime.__version__}, not installed by pip")
    yield _graphs(onnxruntime.__version__)
    yield from _providers(device, onnxruntime)


def _graphs(installed: str) -> Finding:
    """Whether an onnxruntime is new enough for what `meam export` writes."""
    lacking = unreadable(installed)
    if not lacking:
        return Finding("graphs", "ok", f"onnxruntime {installed} is new enough for all that `meam export` writes")
    seen = ", ".join(f"{kind} need {version}" for kind, version in lacking.items())
    remedy = "Upgrade onnxruntime, or take other variants; `meam info` shows what each of a policy's graphs needs."
    return Finding("graphs", "note", f"onnxruntime {installed} is too old for some: {seen}", remedy)


def _providers(device: Device, onnxruntime: ModuleType) -> Iterator[Finding]:
    offered = onnxruntime.get_available_providers()
    started = set()
    for tried, provider in _PROVIDERS.items():
        if provider not in offered and tried != device:
            continue
        try:
            probe = probe_device(tried)
        except MeamError as error:
            yield _failed_provider(tried, device, error)
            continue
        started.add(tried)
        yield Finding(tried, "ok", f"{probe.provider} works")
        if needs_gpu(tried):
            yield _tf32(tried, probe.exact)
    if _PROVIDERS["cuda"] in offered and sys.platform == "linux":
        yield from _cuda_libraries(onnxruntime, device, "cuda" in started)


def _failed_provider(tried: Device, device: Device, error: MeamError) -> Finding:
    seen = str(error).removeprefix(f'device="{tried}", but ')
    if tried in (device, "cpu"):
        return Finding(tried, "problem", seen, "" if needs_gpu(tried) else _REINSTALL.format("onnxruntime"))
    level: Level = "warning" if (tried, device) == ("cuda", "auto") else "note"
    remedy = 'Policies with device="auto" run on the CPU.' if level == "warning" else "Only matters if you want it."
    return Finding(tried, level, f"offered, but does not work here: {seen}", remedy)


def _tf32(tried: Device, exact: bool) -> Finding:
    if exact:
        return Finding("TF32", "ok", f"off: {tried} multiplies in float32")
    remedy = "Set NVIDIA_TF32_OVERRIDE=0 in the environment; check policies with `meam verify`."
    return Finding("TF32", "warning", f"on: {tried} rounds the inputs of float32 products to ten bits", remedy)


def _cuda_libraries(onnxruntime: ModuleType, device: Device, works: bool) -> Iterator[Finding]:
    major = str(getattr(onnxruntime, "cuda_version", "") or "").split(".")[0]
    wanted = {name: f"lib{name}.so" + (f".{major}" if major else "") for name in ("cudart", "cublas", "cublasLt")}
    missing = [file for name, file in {**wanted, "cudnn": "libcudnn.so.9"}.items() if not _is_found(name, file)]
    if not missing:
        yield Finding("CUDA libraries", "ok", f"found, CUDA {major or 'of any version'} and cuDNN 9")
        return
    level: Level = "note" if works or device == "cpu" else "warning" if device == "auto" else "problem"
    remedy = "" if works else "pip install 'onnxruntime-gpu[cuda,cudnn]', or put their folder into LD_LIBRARY_PATH."
    yield Finding("CUDA libraries", level, f"not found: {', '.join(missing)}", remedy)


def _is_found(name: str, file: str) -> bool:
    """Whether a library is where onnxruntime and the linker look; it is not loaded."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [
        folder for place in (spec and spec.submodule_search_locations) or () for folder in Path(place).glob("*/lib")
    ]
    paths = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    if any(folder.is_dir() and any(folder.glob(f"{file}*")) for folder in (*wheels, *paths)):
        return True
    return (ctypes.util.find_library(name) or "").startswith(file)


def _hardware() -> Iterator[Finding]:
    yield Finding("processor", "ok", cpu_model())
    yield _cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > usable_cores() + 0.5:
        seen = f"{load:.1f} processes want to run on {usable_cores()} cores"
        yield Finding(
            "load", "warning", seen, "Stop what else is running, or keep cores for the control loop (taskset)."
        )
    yield _memory()


def _cores() -> Finding:
    usable, limit = usable_cores(), cpu_limit()
    seen = f"{usable} of {os.cpu_count()} usable"
    if limit is None:
        return Finding("cores", "ok", seen)
    seen += f", of which a control group allows the time of {limit:g}"
    remedy = "A process that has used up its share stops until the next period: give it a cpuset rather than a quota."
    return Finding("cores", "warning" if limit < 1 else "note", seen, remedy)


def _memory() -> Finding:
    available, limit = available_memory(), memory_limit()
    seen = "unknown" if available is None else f"{available / 2**30:.1f} GiB available"
    if limit is not None:
        seen += f", limited to {limit / 2**30:.1f} GiB by a control group"
    least = min((size for size in (available, limit) if size is not None), default=_LITTLE_MEMORY)
    if least < _LITTLE_MEMORY:
        return Finding("memory", "warning", seen, "Free some: swapping stops a control loop for milliseconds.")
    return Finding("memory", "ok", seen)


def _scheduling() -> Iterator[Finding]:
    names = governors()
    if names == ["performance"]:
        yield Finding("clock speed", "ok", 'governor "performance"')
    elif names:
        remedy = "If ticks or answers are late: sudo cpupower frequency-set -g performance."
        yield Finding("clock speed", "note", f"governor {', '.join(names)}: the cores slow down at rest", remedy)
    if not hasattr(os, "sched_getscheduler"):
        return
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        yield Finding("real time", "ok", "this process has a real-time scheduler")
    elif may_use_realtime():
        yield Finding("real time", "ok", "allowed, not in use: chrt -f 50 python ... asks for it")
    else:
        remedy = "If ticks are late: allow rtprio in /etc/security/limits.conf, or the capability SYS_NICE."
        yield Finding("real time", "note", "this process may not ask for a real-time scheduler", remedy)


def _clock(lateness: np.ndarray, rate_hz: float) -> Iterator[Finding]:
    resolution = time.get_clock_info("monotonic").resolution
    if resolution > _COARSE_CLOCK_S:
        remedy = "Ticks cannot be better than that: use a system with a finer clock."
        yield Finding("clock", "warning", f"resolution {resolution * 1e3:g} ms", remedy)
    else:
        yield Finding("clock", "ok", f"resolution {resolution * 1e9:g} ns")
    p50, p99, largest = *np.percentile(lateness, (50, 99)), lateness.max()
    period = 1e3 / rate_hz
    seen = f"at {rate_hz:g} Hz (every {period:g} ms) late by {p50:.2f} ms, p99 {p99:.2f}, at most {largest:.2f}"
    if largest > period or p99 > period / 10:
        remedy = "Stop other load, take a real-time scheduler (chrt -f 50), keep a core free (isolcpus, taskset)."
        yield Finding("ticks", "warning", seen, remedy)
    else:
        yield Finding("ticks", "ok", seen)


def _environment() -> Iterator[Finding]:
    yield _threads()
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        remedy = "Remove it: policies lose accuracy."
        yield Finding("TF32", "warning", "NVIDIA_TF32_OVERRIDE=1 turns it on for every library", remedy)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding("GPUs", "note", "CUDA_VISIBLE_DEVICES hides all of them", "Remove it to use one.")
    yield _hub()


def _threads() -> Finding:
    prefixes = ("OMP_", "KMP_", "OPENBLAS_", "MKL_", "ORT_")
    found = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
    found.pop(TELEMETRY_SWITCH, None)  # has a line of its own
    seen = ", ".join(f"{name}={value}" for name, value in found.items())
    if found.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        return Finding("threads", "warning", seen, "Remove OMP_WAIT_POLICY: waiting threads burn their cores.")
    if not any(name.endswith("_NUM_THREADS") for name in found) and usable_cores() > 1:
        remedy = "Set OMP_NUM_THREADS=1 if your loop multiplies matrices; policies keep to their own `threads`."
        return Finding("threads", "note", seen or "NumPy may start one for every core", remedy)
    return Finding("threads", "ok", seen or "one core, one thread")


def _hub() -> Finding:
    cache = Path(hub_constants.HF_HUB_CACHE)
    if hub_constants.HF_HUB_OFFLINE:
        seen = f"HF_HUB_OFFLINE is set; cache {cache}"
        if cache.is_dir():
            return Finding("Hub", "ok", seen)
        return Finding("Hub", "note", f"{seen} does not exist", "Load policies from folders, or download them first.")
    folder = next((folder for folder in (cache, *cache.parents) if folder.exists()), cache)
    if not os.access(folder, os.W_OK):
        return Finding("Hub", "warning", f"cache {cache} cannot be written", "Set HF_HOME to a folder that can.")
    remedy = "Set HF_HUB_OFFLINE=1 once policies are downloaded, if the robot is to start without a network."
    return Finding("Hub", "note", f"online; cache {cache}", remedy)
