"""Feed damaged policy files to what reads them, and report all that is neither read nor refused by one of our errors.

    python benchmarks/fuzz/run.py policies/arm --mutants 100000

Four kinds of mutants: bytes of the graph changed, cut out or repeated; nodes of the graph with other operators, inputs,
outputs, attributes and weights; values of config.json replaced; bytes of the .safetensors files changed. A graph that
passes the gate is loaded and run by onnxruntime. Mutants are read in child processes of limited memory and time: a
child that dies or hangs is a finding, with the mutant kept under --output; so is an error that is none of this
package's.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from meam_policy import MeamError, PolicySpec
from meam_policy.folder.safetensors_reader import read_arrays
from meam_policy.graph.graph_check import check_graph
from meam_policy.graph.operators import SIGNATURES
from meam_policy.inference.session import PolicySession

KINDS = ("bytes", "nodes", "config", "tensors")
SECONDS = 5.0
"""Time for one mutant."""
MEMORY = 2 * 2**30
"""What a child may allocate beyond what it has when it starts, bytes."""
INTERESTING = (0, 1, -1, 2, 7, 255, 2**15, 2**20, 2**31, -(2**31), 2**40, 2**63 - 1, -(2**63))

Random = np.random.Generator


def mutant(kind: str, folder: Path, random: Random) -> tuple[str, bytes]:
    """A damaged file of a policy folder: its name, and its bytes."""
    if kind == "bytes":
        return "policy.onnx", _mutate_bytes((folder / "policy.onnx").read_bytes(), random)
    if kind == "nodes":
        return "policy.onnx", _mutate_nodes((folder / "policy.onnx").read_bytes(), random)
    if kind == "config":
        return "config.json", _mutate_json((folder / "config.json").read_bytes(), random)
    name = str(random.choice(["model.safetensors", "golden.safetensors"]))
    return name, _mutate_bytes((folder / name).read_bytes(), random, head=2000)


def read(name: str, data: bytes, spec: PolicySpec) -> None:
    """Read a file as loading a policy does; a graph is also run."""
    if name == "config.json":
        PolicySpec.from_json(data)
    elif name.endswith(".safetensors"):
        read_arrays(data, name)
    else:
        check_graph(data)
        session = PolicySession(data, spec)
        session.run(np.zeros((2, spec.observation_dim), np.float32), np.zeros((2, spec.noise_dim), np.float32))


def _mutate_bytes(data: bytes, random: Random, head: int | None = None) -> bytes:
    changed = bytearray(data)
    for _ in range(1 + random.geometric(0.5)):
        # Most of a file are weights; what says how to read them is at its ends.
        start = int(random.integers(len(changed))) if random.random() < 0.3 else int(random.integers(head or 4000))
        start = min(start, len(changed) - 1)
        if head is None and random.random() < 0.5:
            start = len(changed) - 1 - start
        length = int(random.geometric(0.2))
        action = random.integers(4)
        if action == 0:
            changed[start] ^= 1 << int(random.integers(8))
        elif action == 1:
            changed[start : start + length] = random.bytes(length)
        elif action == 2:
            del changed[start : start + length]
        else:
            changed[start:start] = changed[start : start + length]
        if not changed:
            break
    return bytes(changed)


def _mutate_nodes(data: bytes, random: Random) -> bytes:
    import onnx

    model = onnx.load_model_from_string(data)
    graph, operators = model.graph, sorted(SIGNATURES[b""])
    for _ in range(random.geometric(0.6)):
        node = graph.node[int(random.integers(len(graph.node)))]
        before = [name for other in graph.node for name in other.output] + [w.name for w in graph.initializer]
        action = random.integers(7)
        if action == 0:
            node.op_type = str(random.choice([o.decode() for o in operators]))
        elif action == 1 and node.input:
            node.input[int(random.integers(len(node.input)))] = str(random.choice([*before, "", "observation"]))
        elif action == 2:
            node.input.append(str(random.choice([*before, ""])))
        elif action == 3 and node.input:
            del node.input[int(random.integers(len(node.input)))]
        elif action == 4:
            node.output.append(f"more{random.integers(1000)}")
        elif action == 5:
            _mutate_attributes(node, operators, random)
        elif graph.initializer:
            _mutate_weight(graph.initializer[int(random.integers(len(graph.initializer)))], random)
    return model.SerializeToString()


def _mutate_attributes(node: Any, operators: Sequence[bytes], random: Random) -> None:
    from onnx import helper

    if node.attribute and random.random() < 0.5:
        del node.attribute[int(random.integers(len(node.attribute)))]
        return
    # One that the operator takes, or one of another.
    own = SIGNATURES[b""].get(node.op_type.encode())
    taken = (
        own if own is not None and own.attributes else SIGNATURES[b""][operators[int(random.integers(len(operators)))]]
    )
    if not taken.attributes:
        return
    names = sorted(taken.attributes)
    name = names[int(random.integers(len(names)))]
    number = int(random.choice(INTERESTING))
    values: Mapping[str, Any] = {
        "i": number,
        "f": float(number),
        "s": "x",
        "ints": [number] * int(random.integers(1, 5)),
    }
    value = values.get(taken.attributes[name], number)
    for old in [a for a in node.attribute if a.name == name.decode()]:
        node.attribute.remove(old)
    node.attribute.append(helper.make_attribute(name.decode(), value))


def _mutate_weight(weight: Any, random: Random) -> None:
    if weight.dims and random.random() < 0.5:
        weight.dims[int(random.integers(len(weight.dims)))] = int(random.choice(INTERESTING))
    elif random.random() < 0.5:
        weight.data_type = int(random.integers(1, 24))
    elif weight.raw_data:
        weight.raw_data = _mutate_bytes(weight.raw_data, random, head=len(weight.raw_data))


def _mutate_json(data: bytes, random: Random) -> bytes:
    config = json.loads(data)
    odd: list[Any] = [None, True, "", "x" * 1000, -1, 0, 1e308, 2**70, [], {}, [[]], "\x1b[2J", "../..", float("nan")]
    for _ in range(random.geometric(0.6)):
        place: Any = config
        parent: Any = None
        key: Any = None
        while isinstance(place, (dict, list)) and len(place) and (parent is None or random.random() < 0.7):
            parent = place
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = keys[int(random.integers(len(keys)))]
            place = place[key]
        if parent is not None:
            if random.random() < 0.2:
                del parent[key]
            else:
                parent[key] = copy.deepcopy(odd[int(random.integers(len(odd)))])
    text = json.dumps(config).encode()
    return _mutate_bytes(text, random, head=len(text)) if random.random() < 0.2 else text


def _child(folder: Path, seed: int, channel: Connection) -> None:
    """Make and read the mutants whose numbers come over the channel, and say what came of each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # onnxruntime reports every failure there too
    spec = PolicySpec.from_json((folder / "config.json").read_bytes())
    read("policy.onnx", (folder / "policy.onnx").read_bytes(), spec)  # all libraries are there
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    channel.send("ready")
    while True:
        job = channel.recv()
        if job is None:
            return
        number, kind = job
        name, data = mutant(kind, folder, np.random.default_rng([seed, number]))
        try:
            read(name, data, spec)
            outcome = "read"
        except MeamError:
            outcome = "refused"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"[:300]
        channel.send(outcome)


class _Worker:
    """A child process, started again after each death."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._arguments = folder, seed
        self.number, self.kind, self._since = -1, "", 0.0
        self._begin()

    def _begin(self) -> None:
        self.channel, other = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=_child, args=(*self._arguments, other))
        self._process.start()
        other.close()
        self.channel.recv()  # its libraries are imported: from here on time is the mutants'

    def give(self, number: int, kind: str) -> None:
        self.number, self.kind, self._since = number, kind, time.monotonic()
        self.channel.send((number, kind))

    def outcome(self) -> str | None:
        """What came of the mutant; None if it is still being read."""
        try:
            if self.channel.poll(0.02):
                return self.channel.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode or 0
            self._begin()
            return f"the process died: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
        if time.monotonic() - self._since > SECONDS:
            self._process.kill()
            self._process.join()
            self._begin()
            return f"no answer after {SECONDS:g} s"
        return None

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def fuzz(
    folder: Path, count: int, seed: int, jobs: int, kinds: Sequence[str] = KINDS
) -> Iterator[tuple[int, str, str]]:
    """Read `count` mutants of a policy folder; yields number, kind and outcome of each."""
    waiting = iter(range(count))
    workers = [_Worker(folder, seed) for _ in range(jobs)]
    busy: list[_Worker] = []
    try:
        for worker in workers:
            if (number := next(waiting, None)) is not None:
                worker.give(number, kinds[number % len(kinds)])
                busy.append(worker)
        while busy:
            for worker in list(busy):
                outcome = worker.outcome()
                if outcome is None:
                    continue
                yield worker.number, worker.kind, outcome
                if (number := next(waiting, None)) is None:
                    busy.remove(worker)
                else:
                    worker.give(number, kinds[number % len(kinds)])
    finally:
        for worker in workers:
            worker.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz from the command line; returns the exit code, 1 if there are findings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", type=Path, help="policy folder, small so that reading is quick")
    parser.add_argument("--mutants", type=int, default=100_000, help="default: 100000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--jobs", type=int, default=2, help="processes; default: 2")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--output", type=Path, help="folder for the mutants that were found; default: a temporary one")
    options = parser.parse_args(arguments)
    output = options.output or Path(tempfile.mkdtemp(prefix="fuzz-"))
    output.mkdir(parents=True, exist_ok=True)
    tally: Counter[tuple[str, str]] = Counter()
    found, began = 0, time.monotonic()
    for number, kind, outcome in fuzz(options.policy, options.mutants, options.seed, options.jobs, options.kind):
        known = outcome in ("read", "refused")
        tally[kind, outcome if known else "found"] += 1
        if not known:
            found += 1
            name, data = mutant(kind, options.policy, np.random.default_rng([options.seed, number]))
            kept = output / f"{number}-{name}"
            kept.write_bytes(data)
            print(f"{kept}: {outcome}", flush=True)
    seconds = time.monotonic() - began
    print(f"\n{options.mutants} mutants in {seconds:.0f} s\n\n| kind | read | refused | found |\n|---|---|---|---|")
    for kind in options.kind:
        print(f"| {kind} | {tally[kind, 'read']} | {tally[kind, 'refused']} | {tally[kind, 'found']} |")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
