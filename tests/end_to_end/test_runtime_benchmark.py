"""The scripts in benchmarks/runtime, with tiny sizes."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from meam_policy import BoxSpec, MeamPolicy, PolicySpec
from meam_policy.loop.control_loop import ControlLoop
from meam_policy.spec import Integration

RUNTIME = Path(__file__).parents[2] / "benchmarks" / "runtime"
sys.path.insert(0, str(RUNTIME))  # its scripts import each other by name, as a script's folder is on the path
NAMES = ("act_overhead", "memory_growth", "tick_loop", "vector_throughput", "untrained_policy")
overhead, memory, tick_loop, vector, untrained = (importlib.import_module(name) for name in NAMES)


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("runtime_benchmark", RUNTIME / "run.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.write_untrained_policy(tmp_path_factory.mktemp("runtime") / "policy", (8, 8), nfe=2)


class FakeTime:
    """A clock that only moves when somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(tick_loop, "time", SimpleNamespace(monotonic=fake.monotonic, sleep=fake.sleep))
    return fake


def test_the_untrained_policy_acts_in_its_environment(folder):
    policy = MeamPolicy.from_pretrained(folder)
    assert policy.spec.environment_id == "meam/Pockets-v0"
    assert policy.spec.execute_steps < policy.spec.chunk_size
    assert policy.act(np.zeros(4)).shape == (2,)


def test_overhead_is_the_median_of_differences_within_rounds():
    bare, act = np.array([[10.0], [50.0], [20.0]]), np.array([[24.0], [70.0], [33.0]])
    queued = np.full((3, 1), 15.5)
    found = overhead.Overhead({overhead.BARE: bare, overhead.EVERY: act, overhead.QUEUED: queued})
    np.testing.assert_array_equal(found.over_bare(50), [14.0, 20.0, 13.0])
    alone, waiting = found.table().splitlines()[-2:]
    assert "14.0 µs at p50" in alone
    assert alone.endswith("met.")
    assert "15.5 µs" in waiting
    assert waiting.endswith("**missed**.")


def test_every_contestant_of_the_overhead_is_timed(folder):
    found = overhead.measure_overhead(folder, rounds=2, calls=20).times
    contestants = [overhead.BARE, overhead.SESSION, overhead.EVERY, overhead.QUEUED, overhead.SELECTED, overhead.STEP]
    assert list(found) == contestants
    assert all(times.shape == (2, 20) and (times > 0).all() for times in found.values())
    assert np.median(found[overhead.EVERY]) > np.median(found[overhead.BARE])


def test_example_observations_of_a_dict_space_are_in_it():
    boxes = [
        BoxSpec((2,), "float64", (-np.inf,) * 2, (np.inf,) * 2, key="b"),
        BoxSpec((1,), "float32", (-np.inf,), (np.inf,), key="a"),
    ]
    spec = PolicySpec(
        integration=Integration(nfe=1),
        observation=tuple(boxes),
        action=BoxSpec((1,), "float32", (-1.0,), (1.0,)),
        chunk_size=1,
        execute_steps=1,
        observation_mean=(5.0, 6.0, 7.0),
        observation_std=(1e-3,) * 3,
        action_offset=(0.0,),
        action_scale=(1.0,),
        method="by hand",
    )
    for observation in overhead.example_observations(spec, 3, seed=0):
        assert spec.observation_space.contains(observation)
        np.testing.assert_allclose(np.concatenate([observation["b"], observation["a"]]), (5, 6, 7), atol=0.1)


def test_growth_is_what_the_most_is_above_the_first():
    assert memory.MemoryGrowth([0, 5, 10], [30.0, 55.0, 41.0], 1.0).growth == 25
    assert memory.MemoryGrowth([0, 5], [30.0, 55.0], 1.0).table().endswith("**missed**.")


def test_memory_is_looked_at_between_the_calls(folder):
    found = memory.measure_memory(folder, calls=250, samples=4)
    assert found.calls == [0, 62, 125, 187, 250]
    assert len(found.megabytes) == 5


def test_resident_memory_rises_with_what_is_kept():
    before = memory.resident_megabytes()
    kept = np.ones(25_000_000)  # 200 MB, far more than what other tests may give back meanwhile
    assert memory.resident_megabytes() - before > 100 * kept[0]


def test_ticks_are_late_by_what_they_began_after_their_deadline_and_skip_those_that_have_passed(fake_time):
    ticks = tick_loop.Ticks(rate_hz=10.0)
    for work in (3.0, 0.02, 0.25, 0.01):
        ticks.wait()
        ticks.begin()
        fake_time.now += work
        ticks.end()
    # The third ends 0.15 after the deadline of the fourth, which begins at once and so skips one.
    np.testing.assert_allclose(ticks.lateness, [0, 0, 150], atol=1e-6)
    np.testing.assert_allclose(ticks.latency, [20, 250, 10], atol=1e-6)
    assert ticks.missed == 2
    ticks.wait()
    assert fake_time.now == pytest.approx(103.5)


def test_ticks_count_the_deadlines_that_a_control_loop_misses(folder, fake_time):
    ticks, work = tick_loop.Ticks(rate_hz=10.0), [1.0, *np.random.default_rng(0).uniform(0, 0.3, 40)]

    def read():
        ticks.begin()
        return np.zeros(4)

    def send(_):
        ticks.end()
        fake_time.now += work.pop(0)

    policy = MeamPolicy.from_pretrained(folder)
    with ControlLoop(policy, 10.0, chunking="naive", clock=fake_time.monotonic, sleep=ticks.sleep) as loop:
        health = loop.run(read, send, steps=41)
    assert ticks.missed == health.missed_deadlines > 10
    assert len(ticks.lateness) == 40


@pytest.mark.slow
def test_the_loops_run_with_and_without_load(folder, monkeypatch):
    monkeypatch.setattr(tick_loop, "_SETTLE_S", 0.0)
    found = tick_loop.measure_loops(folder, rate_hz=200.0, seconds=0.1, rounds=2)
    assert len(found.ticks) == 6
    assert all(len(ticks.lateness) == len(ticks.latency) == 18 for ticks in found.ticks.values())
    assert len(found.table().splitlines()) == 2 + 6 * 3 + 2


def test_busy_processes_end_with_what_they_disturb(monkeypatch):
    monkeypatch.setattr(tick_loop, "_SETTLE_S", 0.0)
    with tick_loop.busy_cores() as processes:
        assert all(process.poll() is None for process in processes)
    assert all(process.poll() is not None for process in processes)


def test_one_policy_with_many_slots_acts_as_many_policies(folder):
    found = vector.measure_throughput(folder, slots=3, rounds=1, steps=25)
    assert list(found.policy) == ["one policy with 3 slots", "3 policies one by one"]
    assert all((found.policy[name] < found.whole[name]).all() for name in found.policy)


def test_the_command_writes_its_table_with_machine_and_load(folder, tmp_path, capsys):
    file = tmp_path / "table.md"
    sizes = ["--slots", "2", "--rounds", "1", "--steps", "3"]
    load_script().main(["vector", "--policy", str(folder), "--markdown", str(file), *sizes])
    text = file.read_text()
    assert text == capsys.readouterr().out
    assert "| 2 policies one by one |" in text
    assert "load average" in text


def test_the_commands_of_the_readme_are_understood():
    commands = re.findall(
        r"^python benchmarks/runtime/run\.py (.+)$", (RUNTIME / "README.md").read_text(), re.MULTILINE
    )
    parsed = [load_script().make_parser().parse_args(command.split()) for command in commands]
    assert {arguments.figure for arguments in parsed} == {"overhead", "memory", "loop", "vector"}
