"""The device that PyTorch trains on, and its number of CPU threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from meam_policy.errors import ConfigError, DeviceError
from meam_training.setting_text import SettingText

__all__ = ["cpu_threads", "training_device"]


def training_device(name: str) -> torch.device:
    """Device named by `TrainConfig.device`. Under torchrun, each process takes a GPU of its own.

    Args:
        name: "auto" (CUDA if a GPU is available, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: the name is none of these.
        DeviceError: PyTorch does not see this GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: one GPU per process
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _unknown(name) from error
    if device.type not in ("cpu", "cuda"):
        raise _unknown(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        text = '{device} is "{0}", but torch sees {1} CUDA device(s) here. Use {device:"cpu"} or {device:"auto"}.'
        raise DeviceError(SettingText(text, name, seen))
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def _unknown(name: str) -> ConfigError:
    return ConfigError(SettingText('{device} is "{0}"; expected "auto", "cpu", "cuda" or "cuda:N".', name))


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with the given number of CPU threads within the context; None leaves the number unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
