"""Where PyTorch computes, and with how many threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from meam_policy.errors import ConfigError, DeviceError

__all__ = ["cpu_threads", "training_device"]


def training_device(name: str) -> torch.device:
    """The device of `TrainConfig.device`. Started by torchrun, every process takes a GPU of its own.

    Args:
        name: "auto", which is CUDA where there is a GPU and the CPU elsewhere; "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: it is no such name.
        DeviceError: PyTorch sees no such GPU here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun: every process its own
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f'device is "{name}"; expected "auto", "cpu", "cuda" or "cuda:N".') from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device is "{name}"; expected "auto", "cpu", "cuda" or "cuda:N".')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count() or "no"
        raise DeviceError(f'device is "{name}", but torch sees {seen} CUDA device(s) here. Use device="cpu" or "auto".')
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with so many CPU threads for a while; None leaves PyTorch's number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
