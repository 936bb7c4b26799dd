"""Looks at a policy that nobody trusts in a process with limits of memory and time.

Limits are no sandbox: what onnxruntime could be made to do by a fault of its own, it could still do. But a graph that
asks for all memory, never ends or brings its process down harms nobody here.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from meam_policy.console import terminal_width
from meam_policy.errors import ConfigError, DeviceError, FormatError

__all__ = ["OUT_OF_MEMORY", "Confined", "confine", "end_with", "run_confined"]

OUT_OF_MEMORY = 3
"""Exit status of a process that met its limit of memory."""

# Named, not imported: the command is built on this module.
_MODULE = "meam_policy.commands.confined_verify"
_SPARE_S = 60
_PR_SET_PDEATHSIG = 1
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class Confined(NamedTuple):
    """What came of a process that kept its limits.

    Attributes:
        code: Its exit status: 0, or 2 for one of the package's errors.
        output: What it printed to stdout.
        complaint: What it printed to stderr.
    """

    code: int
    output: str
    complaint: str


def run_confined(arguments: Sequence[str], policy: Path, memory_gb: float, cpu_seconds: int) -> Confined:
    """Run `meam verify` in a process of limited memory and time, which cannot write files and knows no token.

    Args:
        arguments: Its arguments but for the policy.
        policy: The policy folder.
        memory_gb: What it may allocate once its libraries are loaded, GB; above 0.
        cpu_seconds: CPU time that it may take from then on, seconds; 1 or more. One that waits is ended after
            four times that, and a minute.

    Raises:
        FormatError: it went beyond a limit, or the process died.
        ConfigError: a limit is out of range.
        DeviceError: this system cannot limit a process.
    """
    if not (0 < memory_gb <= 1024 and math.isfinite(memory_gb)):
        raise ConfigError(f"--memory-gb is {memory_gb:g}; expected a number above 0, up to 1024.")
    if not 1 <= cpu_seconds <= 86_400:
        raise ConfigError(f"--cpu-seconds is {cpu_seconds}; expected 1 to 86400.")
    if sys.platform != "linux":
        raise DeviceError(f"--untrusted needs Linux, and this is {sys.platform}. Use a container with limits.")
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": str(terminal_width())}
    limits = (str(os.getpid()), str(int(memory_gb * 1e9)), str(cpu_seconds))
    wall_s = _SPARE_S + 4 * cpu_seconds
    with subprocess.Popen(
        [sys.executable, "-m", _MODULE, *limits, str(policy.absolute()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        # Not the current folder: Python would import modules that lie in it, and it may be the policy's.
        cwd=Path(__file__).parents[2],
        env=environment,
    ) as process:
        try:
            output, complaint = process.communicate(timeout=wall_s)
        except subprocess.TimeoutExpired:
            raise _refusal(policy, f"was not done within {wall_s} s") from None
        finally:
            process.kill()
    if process.returncode == -signal.SIGXCPU:
        raise _refusal(policy, f"takes more than {cpu_seconds} s of CPU time", "--cpu-seconds")
    if process.returncode == OUT_OF_MEMORY:
        raise _refusal(policy, f"takes more than {memory_gb:g} GB of memory", "--memory-gb")
    if process.returncode not in (0, 2):
        code = process.returncode
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise _refusal(policy, f"brought its process down ({name})")
    return Confined(process.returncode, output, complaint)


def _refusal(policy: Path, happened: str, option: str = "") -> FormatError:
    more = f" If you trust its origin after all, allow more with {option}." if option else ""
    return FormatError(f"{policy}: verifying it, in a process with limits, {happened}. Do not load it.{more}")


def end_with(parent: int) -> None:
    """Have the system kill this process as soon as the one that started it ends, however that ends. Only on Linux.

    Args:
        parent: The id of the process that started this one.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def confine(memory: int, cpu_seconds: int) -> None:
    """Limit this process, whose libraries are all loaded.

    Args:
        memory: What it may allocate from here on, bytes.
        cpu_seconds: CPU time that it may take from here on, seconds.
    """
    import resource

    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: mapped + memory,
        resource.RLIMIT_CPU: math.ceil(time.process_time()) + cpu_seconds,
        resource.RLIMIT_FSIZE: 0,  # pipes are no files
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        _, hard = resource.getrlimit(limit)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # A process is told at the soft limit of CPU time, and killed without a name at the hard one.
        spare = 1 if limit == resource.RLIMIT_CPU and lowest == value and hard != value else 0
        resource.setrlimit(limit, (lowest, lowest + spare))
