"""Where onnxruntime runs a graph: execution providers, strictly chosen, and the options that make them predictable."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

from meam_policy.errors import ConfigError, DeviceError
from meam_policy.extras import needs

__all__ = ["TELEMETRY_SWITCH", "Device", "import_onnxruntime", "needs_gpu", "provider_list", "require_provider"]

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
"""Where to run: "cpu"; "cuda" or "tensorrt", which fail rather than fall back; "auto", CUDA where it works."""

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
"""Environment variable that onnxruntime reads when it is imported; 1 switches its telemetry off."""

_CPU, _CUDA, _TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_ONE_AT_A_TIME = threading.Lock()  # or stdout stays redirected
_PROVIDER: dict[str, str] = {"cpu": _CPU, "cuda": _CUDA, "tensorrt": _TENSORRT, "auto": _CUDA}


def import_onnxruntime() -> ModuleType:
    """The installed onnxruntime, its telemetry switched off unless `ORT_DISABLE_TELEMETRY` says otherwise.

    From 1.29 on its official builds send events over the network and keep a device identifier in the user's cache,
    beginning with the import, before any call could switch that off.

    Raises:
        MissingExtraError: there is none, or it cannot be imported.
    """
    os.environ.setdefault(TELEMETRY_SWITCH, "1")
    with needs("Acting", "onnxruntime", "cpu", " (or [gpu], never both)"):
        import onnxruntime
        from onnxruntime import InferenceSession  # noqa: F401  # not there once one of two wheels was removed
    return onnxruntime


def needs_gpu(device: Device) -> bool:
    """Whether a device other than the CPU is requested by name."""
    return device in ("cuda", "tensorrt")


def provider_list(device: Device, *, fixed_batch: bool, tf32: bool) -> list[Any]:
    """Execution providers with their options, in order of preference, as `InferenceSession` takes them.

    CUDA rounds the inputs of float32 products to TF32 by default, which keeps ten bits: the integration amplifies that
    error, so it is off unless asked for. TensorRT has no such option: set NVIDIA_TF32_OVERRIDE=0 before Python starts.
    With a fixed batch, CUDA captures the whole run as a CUDA graph at fixed addresses, and replays it afterwards.

    Args:
        device: Device to run on.
        fixed_batch: Whether the batch size is fixed.
        tf32: Allow TF32.

    Raises:
        ConfigError: an unknown device.
        DeviceError: the device is asked for by name, and this onnxruntime does not offer it.
        MissingExtraError: onnxruntime is not installed.
    """
    if device not in get_args(Device):
        raise ConfigError(f"device is {device!r}; expected one of {', '.join(get_args(Device))}.")
    onnxruntime = import_onnxruntime()
    available, wanted = onnxruntime.get_available_providers(), _PROVIDER[device]
    if wanted not in available and needs_gpu(device):
        raise DeviceError(
            f'device="{device}", but onnxruntime offers only {available} here. '
            'Install meam-policy[gpu] in an environment without [cpu], or use device="cpu".'
        )
    if wanted == _CPU or wanted not in available:
        return [_CPU]
    if hasattr(onnxruntime, "preload_dlls"):  # since onnxruntime 1.21
        with _ONE_AT_A_TIME, contextlib.redirect_stdout(sys.stderr):  # it prints what it cannot find
            onnxruntime.preload_dlls()
    cuda = {"use_tf32": str(int(tf32)), "enable_cuda_graph": str(int(fixed_batch))}
    # A name alone may fall back to the CPU, which `require_provider` finds out afterwards.
    if wanted == _TENSORRT:
        return [(_TENSORRT, {"trt_cuda_graph_enable": str(fixed_batch)}), (_CUDA, {**cuda, "enable_cuda_graph": "0"})]
    return [(_CUDA, cuda)] if device == "cuda" else [(_CUDA, cuda), _CPU]


def require_provider(device: Device, seen: Sequence[str]) -> None:
    """Refuse, or for "auto" report, a session that does not run on the requested device.

    onnxruntime itself falls back to the CPU with no more than a line on stderr, and lists providers that cannot work.

    Args:
        device: The requested device.
        seen: `get_providers()` of the session.

    Raises:
        DeviceError: the device was asked for by name.
    """
    if device == "cpu" or seen[0] == _PROVIDER[device]:
        return
    if needs_gpu(device):
        raise DeviceError(
            f'device="{device}", but onnxruntime could only create {list(seen)}. '
            'Check the CUDA and cuDNN libraries, or use device="cpu".'
        )
    if _CUDA in import_onnxruntime().get_available_providers():
        warnings.warn(
            f'device="auto" runs on {seen[0]}: this onnxruntime was built for CUDA, but could not start it. Check the '
            'CUDA and cuDNN libraries, or use device="cpu".',
            RuntimeWarning,
            stacklevel=2,
        )
