"""Times contestants in turn: each is a process that waits while another one works."""

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
"""Seconds between turns, in which the threads of the last worker stop spinning: OpenMP's do so for some 20 ms, or for
`KMP_BLOCKTIME`; XLA's for less."""


@dataclass(frozen=True)
class Contestant:
    """What takes turns.

    Attributes:
        name: What the tables call it.
        command: What starts its worker; contestants of the same command share one. The worker prints one line of JSON
            when it is warm, then answers every line `form N` with the seconds that N repetitions took.
        form: What the worker is asked for.
        repetitions: Of one turn.
    """

    name: str
    command: tuple[str, ...]
    form: str
    repetitions: int


@dataclass
class Outcome:
    """What was measured; filled by `race`, so that an interrupted one leaves what it has.

    Attributes:
        setting: What the contestants work on.
        contestants: In the order of the table.
        rates: Repetitions per second of every round, by contestant.
        about: What the worker said when it was ready, by contestant.
        failures: Why a contestant has no result.
        peak_memory: Largest resident memory of the contestant's worker, in bytes; where the system tells.
    """

    setting: Setting
    contestants: Sequence[Contestant]
    rates: dict[str, list[float]] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)


class Worker:
    """A process that repeats work on request, on standard input and output.

    Args:
        command: What starts it.
        environment: Its environment variables.

    Attributes:
        failure: Why it can no longer be asked; None while it can.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.failure: str | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # Its own session: Ctrl-C reaches only this process, which then ends it and all that it started.
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
        """Wait until it is warm; returns what it says about itself, nothing if it failed."""
        about = self._answer(json.loads)
        return about if isinstance(about, dict) else {}

    def ask(self, form: str, repetitions: int, parse: Callable[[str], Any] = float) -> Any:
        """Seconds that the repetitions took, or what else the answer is parsed to; None if it failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: no answer will come, and `_answer` says why
            self._process.stdin.write(f"{form} {repetitions}\n")
            self._process.stdin.flush()
        return self._answer(parse)

    def peak_memory(self) -> int | None:
        """Largest resident memory so far, in bytes; None where the system does not tell."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        seen = re.search(r"VmHWM:\s+(\d+) kB", status)
        return 1024 * int(seen[1]) if seen else None

    def stop(self) -> None:
        """End the process and all that it started."""
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
    """Start every worker, then let the contestants take turns.

    Args:
        outcome: Its contestants race; what they do is added to it.
        rounds: How often everyone has a turn.
        environment: Environment variables of the workers.
        cores: Cores that all workers share, where the system can confine them; None for all.
        on_turn: Called with what is about to happen, once for every contestant's start and turn.
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
    """Everyone once per round, in a new random order every round, which is the same in every run."""
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
    """Confine to the first cores: what is started meanwhile inherits it. XLA knows no other limit on its threads."""
    if cores is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
