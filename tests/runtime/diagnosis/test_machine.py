import os

import numpy as np
import pytest

from meam_policy import ConfigError
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


@pytest.fixture
def make_root(tmp_path):
    """A root of a file system with the given files."""

    def make(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: Intel(R) Core(TM)\nmodel\t: 3\n", "Intel(R) Core(TM)"),
        ("processor : 0\nBogoMIPS : 1\n\nHardware : BCM2835\nModel : Raspberry Pi 4\n", "BCM2835"),
        ("processor : 0\nModel : Raspberry Pi 5: B\n", "Raspberry Pi 5: B"),
    ],
)
def test_processor_is_named_as_the_system_names_it(make_root, text, name):
    assert cpu_model(make_root({"proc/cpuinfo": text})) == name


def test_systems_that_tell_nothing_are_no_error(tmp_path):
    assert cpu_model(tmp_path)
    assert (cpu_limit(tmp_path), memory_limit(tmp_path), available_memory(tmp_path)) == (None, None, None)
    assert governors(tmp_path) == []
    assert may_use_realtime(tmp_path) in (True, None)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "200000 100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "30000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            0.3,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/../../sibling\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
    ],
)
def test_share_of_the_cores_is_the_least_of_all_control_groups(make_root, files, limit):
    assert cpu_limit(make_root(files)) == limit


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "1000\n"}, 1000),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "2:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2000\n"}, 2000),
        ({"proc/self/cgroup": "2:memory:/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
    ],
)
def test_memory_is_limited_by_control_groups_of_either_version(make_root, files, limit):
    assert memory_limit(make_root(files)) == limit


def test_available_memory_is_in_bytes(make_root):
    root = make_root({"proc/meminfo": "MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:     7 kB\n"})
    assert available_memory(root) == 7 * 1024


def test_governors_of_all_cores_are_listed_once(make_root):
    cpus = "sys/devices/system/cpu"
    names = {0: "powersave", 1: "performance", 10: "powersave"}
    files = {f"{cpus}/cpu{core}/cpufreq/scaling_governor": f"{name}\n" for core, name in names.items()}
    assert governors(make_root(files)) == ["performance", "powersave"]


@pytest.mark.parametrize(
    ("limit", "capabilities", "allowed"),
    [
        (99, "0", True),
        (-1, "0", True),
        (0, "0000000000800000", True),
        (0, "000001ffffffffff", True),
        (0, "0000000000000000", False),
        (0, "ffffffffff7fffff", False),
    ],
)
def test_real_time_needs_a_limit_above_0_or_the_capability(make_root, monkeypatch, limit, capabilities, allowed):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: {resource.RLIMIT_RTPRIO: (limit, limit)}[which])
    root = make_root({"proc/self/status": f"Name:\tpython\nCapEff:\t{capabilities}\nCapBnd:\t000001ffffffffff\n"})
    assert may_use_realtime(root) is allowed


def test_usable_cores_are_those_of_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


class LateClock:
    """Time that passes only asleep; each sleep ends late by the next of the given milliseconds."""

    def __init__(self, late_ms):
        self.now, self.late = 100.0, iter(late_ms)

    def read(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds + next(self.late) / 1e3


def test_lateness_is_that_of_every_wake_up_after_its_tick():
    clock = LateClock([1.0, 0.0, 35.0, 0.0, 2.0, 0.5, 0.0, 0.25, 0.0, 0.0])
    # The third wake-up, at 65 ms, is after the ticks at 40, 50 and 60 ms.
    expected = [1.0, 0.0, 35.0, 25.0, 17.0, 7.5, 0.0, 0.25, 0.0, 0.0]
    np.testing.assert_allclose(tick_lateness_ms(100, 0.1, clock.read, clock.sleep), expected, atol=1e-9)


@pytest.mark.parametrize(("rate", "seconds", "ticks"), [(50, 0.2, 10), (1000, 0.02, 20), (100, 0.01, 5), (2.5, 2, 5)])
def test_ticks_are_as_many_as_fit_and_at_least_five(rate, seconds, ticks):
    clock = LateClock([0.0] * ticks)
    assert len(tick_lateness_ms(rate, seconds, clock.read, clock.sleep)) == ticks


def test_the_wake_ups_of_this_machine_are_measured():
    assert np.isfinite(tick_lateness_ms(500, 0.01)).all()


@pytest.mark.parametrize("rate", [0, 0.5, -1, 10_001, float("nan"), float("inf")])
def test_rate_that_no_loop_has_is_refused(rate):
    with pytest.raises(ConfigError, match="rate_hz is .*; expected 1 to 10000"):
        tick_lateness_ms(rate)


def test_this_machine_can_be_read():
    assert cpu_model()
    assert usable_cores() >= 1
    for limit in (cpu_limit(), memory_limit(), available_memory()):
        assert limit is None or limit > 0
    assert may_use_realtime() in (True, False, None)
