"""What a machine offers a control loop: cores, memory, scheduling, and how punctually it wakes a sleeping process.

Everything is read, nothing is changed. What a system does not report is None, or empty. `root` is the root of the file
system.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meam_policy.errors import ConfigError

__all__ = [
    "MAX_RATE_HZ",
    "available_memory",
    "cpu_limit",
    "cpu_model",
    "governors",
    "may_use_realtime",
    "memory_limit",
    "tick_lateness_ms",
    "usable_cores",
]

MAX_RATE_HZ = 10_000.0
_LEAST_TICKS = 5
_CAP_SYS_NICE = 23
_ROOT = Path("/")


def cpu_model(root: Path = _ROOT) -> str:
    """Name of the processor, or of its architecture if that is all the system reports."""
    for key in ("model name", "Hardware", "Model"):
        for line in _read(root / "proc/cpuinfo").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores on which this process may run."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_limit(root: Path = _ROOT) -> float | None:
    """Number of cores whose time control groups (e.g. a container) allow this process; None for no limit."""
    limits = []
    for folder in _control_groups(root, "cpu"):
        quota, period = (_read(folder / "cpu.max").split() or [""] * 2)[:2]
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdecimal() and period.isdecimal():  # "max", or -1, is none
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit(root: Path = _ROOT) -> int | None:
    """Bytes that control groups allow this process; None for no limit."""
    texts = (
        _read(folder / name)
        for folder in _control_groups(root, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    )
    limits = [int(text) for text in texts if text.strip().isdecimal()]
    return min((limit for limit in limits if limit < 2**60), default=None)  # the old way to write none


def available_memory(root: Path = _ROOT) -> int | None:
    """Bytes available without swapping."""
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def governors(root: Path = _ROOT) -> list[str]:
    """Names of the cores' CPU frequency governors, each once."""
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return sorted({_read(file).strip() for file in files} - {""})


def may_use_realtime(root: Path = _ROOT) -> bool | None:
    """Whether this process may use a real-time scheduler."""
    try:
        import resource

        if resource.getrlimit(resource.RLIMIT_RTPRIO)[0] != 0:
            return True
    except (ImportError, AttributeError):  # systems that have no such limit
        return None
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_NICE & 1)
    return None


def tick_lateness_ms(
    rate_hz: float,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> NDArray[np.float64]:
    """Sleep to the ticks of a control loop that does nothing else, and measure how late each wake-up was.

    Args:
        rate_hz: Ticks per second, 1 to 10,000.
        seconds: Duration of the measurement; at least five ticks are measured.
        clock: Time in seconds, from any origin.
        sleep: Sleeps for the given seconds.

    Returns:
        Lateness of each wake-up, milliseconds, in order.

    Raises:
        ConfigError: the rate is out of range.
    """
    if not 1 <= rate_hz <= MAX_RATE_HZ:
        raise ConfigError(f"rate_hz is {rate_hz}; expected 1 to {MAX_RATE_HZ:g}.")
    ticks = max(_LEAST_TICKS, math.ceil(rate_hz * seconds))
    lateness = np.zeros(ticks)
    start = clock()
    for tick in range(ticks):
        due = start + (tick + 1) / rate_hz
        sleep(max(due - clock(), 0.0))
        lateness[tick] = clock() - due
    return lateness * 1e3


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups, and of those above them, in either version of control groups."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mount = mounts
        elif controller in controllers.split(","):
            mount = mounts / controller
        else:
            continue
        folder = mount / path.lstrip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent == mount or mount in parent.parents)


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text(errors="replace")
    return ""
