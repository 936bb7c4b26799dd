"""Times contestants in turn: each is a process that waits while the others work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meam_training.benchmark.settings import Setting

__all__ = ["Contestant", "Outcome", "Worker", "race", "turns"]

PAUSE = 0.1
"""Seconds between turns, in which the threads of the last worker stop spinning: OpenMP's spin for some 20 ms, or for
`KMP_BLOCKTIME`, XLA's for less."""


@dataclass(frozen=True)
class Contestant:
    """A contestant of a race.

    Attributes:
        name: Name in the tables.
        command: Command that starts its worker; contestants with the same command share one. The worker prints one line
            of JSON when it is warm, then answers each line `form N` with the seconds that N repetitions took.
        form: Kind of work requested from the worker.
        repetitions: Repetitions per turn.
    """

    name: str
    command: tuple[str, ...]
    form: str
    repetitions: int


@dataclass
class Outcome:
    """Measurements of a race; filled in by `race`, so that an interrupted race leaves those made so far.

    Attributes:
        setting: Sizes of the problem and the networks.
        contestants: The contestants, in the order of the table.
        rates: Repetitions per second in each round, by contestant.
        about: What the worker reported when it was ready, by contestant.
        failures: Why a contestant has no result, by contestant.
        peak_memory: Peak resident memory of the worker in bytes, by contestant; only if the system reports it.
    """

    setting: Setting
    contestants: Sequence[Contestant]
    rates: dict[str, list[float]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)


class Worker:
    """A process that repeats work on request, over standard input and output.

    Args:
        command: Command that starts it.
        environment: Environment variables of the process.

    Attributes:
        failure: Why it no longer answers; None while it does.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.failure: str | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # In its own session: Ctrl-C reaches only this process, which then ends the worker and all of its children.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        """Wait until it is warm, and return what it reports about itself; empty if it failed."""
        about = self._answer(json.loads)
        return about if isinstance(about, dict) else {}

    def ask(self, form: str, repetitions: int, parse: Callable[[str], Any] = float) -> Any:
        """Request work, and return the parsed answer, by default the seconds that it took; None if it failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; `_answer` will record the reason
            self._process.stdin.write(f"{form} {repetitions}\n")
            self._process.stdin.flush()
        return self._answer(parse)

    def peak_memory(self) -> int | None:
        """Peak resident memory so far, in bytes; None if the system does not report it."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        seen = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(seen[1]) if seen else None

    def stop(self) -> None:
        """Kill the process and all of its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        self._process.wait()
        self._errors.close()

    def _answer(self, parse: Callable[[str], Any]) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        try:
            return parse(line)
        except ValueError:
            self.failure = self._reason(line)
            return None

    def _reason(self, line: str) -> str:
        if line:
            return f"answered {line.strip()!r}"
        code = self._process.wait()
        self._errors.seek(0)
        lines = [text.strip() for text in self._errors if text.strip()]
        raised = [text for text in lines if re.match(r"[\w.]+(Error|Exception|Warning)\b", text)]
        return (raised or lines or [f"ended with exit code {code}"])[-1]


def race(
    outcome: Outcome,
    rounds: int,
    environment: Mapping[str, str],
    *,
    cores: int | None = None,
    on_turn: Callable[[str], None] = lambda _: None,
) -> None:
    """Start all workers, then let the contestants take turns.

    Args:
        outcome: Contestants of the race, to which the measurements are added.
        rounds: Number of turns of each contestant.
        environment: Environment variables of the workers.
        cores: Number of cores to which all workers are confined, if the system can do that; None for all.
        on_turn: Called with a description of what comes next, once for each contestant's start and each turn.
    """
    workers: dict[tuple[str, ...], Worker] = {}
    try:
        for contestant in outcome.contestants:
            on_turn(f"starting {contestant.name}")
            if contestant.command not in workers:
                with _confined(cores):
                    workers[contestant.command] = Worker(contestant.command, environment)
                about = workers[contestant.command].ready()
                same = [c.name for c in outcome.contestants if c.command == contestant.command]
                outcome.about.update(dict.fromkeys(same, about))
        for contestant in turns(outcome.contestants, rounds):
            on_turn(contestant.name)
            worker = workers[contestant.command]
            seconds = None if worker.failure else worker.ask(contestant.form, contestant.repetitions)
            if seconds is not None:
                outcome.rates.setdefault(contestant.name, []).append(contestant.repetitions / seconds)
                time.sleep(PAUSE)
    finally:
        _close(outcome, workers)


def turns(contestants: Sequence[Contestant], rounds: int) -> Iterator[Contestant]:
    """Yield each contestant once per round, in an order that is random for each round but the same in every run."""
    generator = random.Random(0)
    for _ in range(rounds):
        yield from generator.sample(contestants, len(contestants))


def _close(outcome: Outcome, workers: Mapping[tuple[str, ...], Worker]) -> None:
    for contestant in outcome.contestants:
        worker = workers.get(contestant.command)
        if worker is None:
            continue
        if worker.failure:
            outcome.failures[contestant.name] = worker.failure
        memory = worker.peak_memory()
        if memory is not None:
            outcome.peak_memory[contestant.name] = memory
    for worker in workers.values():
        worker.stop()


@contextlib.contextmanager
def _confined(cores: int | None) -> Iterator[None]:
    """Confine processes started in the context to the first cores, the only way to limit XLA's threads."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
