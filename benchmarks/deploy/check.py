"""Runs a policy in the runtimes of others, as far as they can be had here, and writes the table of docs/deployment.md.

    python benchmarks/deploy/check.py                # as `make deploy-check`
    python benchmarks/deploy/check.py --output out/deploy --table docs/deployment.md

Needs neither ROS nor a GPU. Libraries of others come from the package registry into environments of their own under
OUTPUT, beside this Python's packages. A row that cannot be run here says why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from meam_export.deploy.exploy import write_exploy
from meam_export.deploy.leapp import write_leapp_bundle
from meam_export.deploy.leapp_check import check_leapp_bundle
from meam_export.deploy.manifest import write_manifest
from meam_export.deploy.source import Source, read_source
from meam_export.deploy.tick_graph import Form, TickSettings, build_plain, build_tick, noise_table
from meam_export.deploy.tick_player import drawn_observations, noise_by_tick, policy_actions, write_tick
from meam_policy import FormatError, MeamError
from meam_policy.commands.robot import add
from meam_policy.diagnosis.machine import cpu_model

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
POLICY = ROOT / "model_cards/pockets"
EXPLOY_TABLE = ROOT / "tests/export/deploy/exploy.json"
"""Names and metadata that exploy reads, from its sources."""
EPISODES, TICKS = 3, 400
BEGIN, END = "<!-- made by `make deploy-check` -->", "<!-- until here -->"

LEAPP, PHYSICALAI, OLD_RUNTIME = "leapp==0.7.2", "physicalai==0.3.0", "onnxruntime==1.21.1"
BESIDE = {
    LEAPP: ("onnxscript", "fast-sugiyama", "Pillow"),
    PHYSICALAI: ("loguru", "jsonargparse", "opencv-python-headless", "num2words", "typeshed-client"),
    OLD_RUNTIME: (),
}
"""What they import and this environment may lack. Their own pins would pull gigabytes."""


class Row(NamedTuple):
    """A row of the table."""

    stack: str
    form: str
    state: str
    what: str


def main() -> int:
    """Run every row, print the table, and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "out/deploy", help="folder for bundles and environments")
    parser.add_argument("--table", type=Path, help="page to write the table into")
    options = parser.parse_args()
    output = options.output.resolve()
    shutil.rmtree(output / "forms", ignore_errors=True)
    (output / "forms").mkdir(parents=True)
    check = _Check(output)
    rows = [row for step in check.steps() for row in _attempt(*step)]
    text = _table(rows)
    print(text)
    missing = [row.form for row in rows if row.state == "not run"]
    if options.table is not None and missing:
        print(f"{options.table} keeps its table, since {', '.join(missing)} could not be run.", file=sys.stderr)
    elif options.table is not None:
        _write_into(options.table, text)
    return int(any(row.state == "failed" for row in rows))


def _attempt(stack: str, form: str, step: Callable[[], Row]) -> list[Row]:
    print(f"{stack}: {form} …", file=sys.stderr, flush=True)
    try:
        return [step()]
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        return [Row(stack, form, "failed", said[-1] if said else str(error))]
    except MeamError as error:  # such as a graph that does not act like the policy
        return [Row(stack, form, "failed", str(error))]
    except Unavailable as error:
        return [Row(stack, form, "not run", str(error))]


class Unavailable(Exception):
    """Something that a row needs cannot be had here."""


class _Check:
    def __init__(self, output: Path) -> None:
        self.output, self.forms = output, output / "forms"
        robot = self.forms / "robot-policy"
        add(str(POLICY), HERE / "robot.toml", robot)
        self.source = read_source(robot, variant=None)
        self.free = read_source(POLICY, variant=None)
        self.reference = self._reference(self.source, "reference.npz")
        self.free_reference = self._reference(self.free, "free.npz")
        self.zero_reference = self._reference(self.free, "zero.npz", zero=True)

    def steps(self) -> list[tuple[str, str, Callable[[], Row]]]:
        """Stack, form, and what makes its row."""
        here = f"onnxruntime {_version('onnxruntime')}"
        forms: tuple[Form, ...] = ("where", "if")
        return [
            *((here, f"tick graph, `{form}`", lambda form=form: self.tick(here, form)) for form in forms),
            *(
                ("onnxruntime 1.21", f"tick graph, `{form}`", lambda form=form: self.old_runtime(form))
                for form in forms
            ),
            *((LEAPP, f"LEAPP bundle, `{form}`", lambda form=form: self.leapp(form)) for form in forms),
            ("Isaac ROS Deploy 4.5", "LEAPP bundle", self.isaac),
            ("C++17, C", "[`meam_policy.hpp`](cpp.md)", self.cpp),
            (PHYSICALAI, "`manifest.json`", self.physicalai),
            ("exploy 0.1", "tick graph with its names", self.exploy),
            ("ros2_control_demos, example_18", "plain graph", self.plain),
            *self.fixed(),
        ]

    def fixed(self) -> list[tuple[str, str, Callable[[], Row]]]:
        """What this machine cannot run, and where else it is tested."""
        rows = (
            Row("ROS 2", "[node](ros2.md)", "names checked", "run by the tests with stand-ins of ROS's classes"),
            Row(
                "LeRobot 0.4.4",
                "[plugin](lerobot.md)",
                "names checked",
                "ran with it before, not in this check: see that page",
            ),
            Row("NVIDIA Triton", "[repository](export.md#triton)", "names checked", "files compared with its schema"),
        )
        return [(row.stack, row.form, lambda row=row: row) for row in rows]

    def tick(self, stack: str, form: Form) -> Row:
        """The tick graph in this Python's onnxruntime, in the form without a contract."""
        file, found = write_tick(self.free, self.forms / f"tick-{form}.onnx", TickSettings(form))
        seen = _play("play_onnxruntime.py", sys.executable, file, self.free_reference)
        return _exact(
            stack, f"tick graph, `{form}`", seen["ticks"], seen["error"] == 0, f"{found.p50_ms:.3f} ms a tick"
        )

    def old_runtime(self, form: Form) -> Row:
        """The same in the onnxruntime that Debian 13 and ROS have."""
        python = self._environment(OLD_RUNTIME, alone=True)
        seen = _play("play_onnxruntime.py", python, self.forms / f"tick-{form}.onnx", self.free_reference)
        small = seen["error"] <= 1e-5
        state = "run here" if small else "failed"
        what = f"{seen['ticks']} ticks, largest difference {seen['error']:.1e}"
        return Row(f"onnxruntime {seen['version']}", f"tick graph, `{form}`", state, what)

    def leapp(self, form: Form) -> Row:
        """The bundle in the real leapp, and what it refuses beside what this project does."""
        bundle, _ = write_leapp_bundle(self.source, self.forms / f"leapp_{form}", TickSettings(form))
        tick = build_tick(self.source.graph, self.source.spec, self.source.robot, in_parts=True)
        parts = json.dumps({part.name: list(part.indices) for part in tick.observation})
        names = json.dumps([part.name for part in tick.action])
        damaged = _damaged(bundle, self.forms / f"damaged_{form}")
        copies = json.dumps({name: str(file) for name, file in damaged.items()})
        seen = _play("play_leapp.py", self._environment(LEAPP), bundle, self.reference, parts, names, copies)
        theirs, ours = seen["refused"], {name: _refuses(file) for name, file in damaged.items()}
        if theirs.pop(INTACT) or ours.pop(INTACT):
            return Row(LEAPP, f"LEAPP bundle, `{form}`", "failed", "an undamaged copy is refused")
        more = f"of {len(ours)} damages it refuses {sum(theirs.values())}, `check_leapp_bundle` {sum(ours.values())}"
        return _exact(LEAPP, f"LEAPP bundle, `{form}`", seen["ticks"], seen["differing"] == 0, more)

    def isaac(self) -> Row:
        """Keys that Isaac ROS Deploy reads; it needs ROS, CUDA and Triton to run."""
        bundle = self.forms / "leapp_where" / "leapp_where.yaml"
        check_leapp_bundle(bundle)
        text = bundle.read_text(encoding="utf-8")
        both = all(key in text for key in ("feedback_connections:", "feedback_flow:", "semantic:", "dt: 0.1"))
        what = "`feedback_connections`, `semantic.scene.dt`, `element_names` by axis"
        return Row("Isaac ROS Deploy 4.5", "LEAPP bundle", "names checked" if both else "failed", what)

    def physicalai(self) -> Row:
        """The package in the real physicalai."""
        folder, _ = write_manifest(self.free, self.forms / "physicalai")
        seen = _play("play_physicalai.py", self._environment(PHYSICALAI), folder, self.zero_reference)
        return _exact(PHYSICALAI, "`manifest.json`", seen["ticks"], seen["differing"] == 0, "zero noise; experimental")

    def cpp(self) -> Row:
        """The header's own tests: golden actions, and cases that it shares with Python."""
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/runtime/cpp"]
        done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        counts = re.sub(r" in [0-9.]+s.*", "", last.strip("= "))
        if "skipped" in counts and "passed" not in counts:
            raise Unavailable("no compiler, or no headers of ONNX Runtime")
        what = f"its tests, 540 cases shared with Python among them, on pip's library and Debian's 1.21: {counts}"
        state = "failed" if done.returncode else "run here"
        return Row("C++17, C", "[`meam_policy.hpp`](cpp.md)", state, what)

    def exploy(self) -> Row:
        """The graph with exploy's names; the controller is on no package registry."""
        file, _ = write_exploy(self.source, self.forms / "exploy.onnx")
        model, table = onnx.load(file), json.loads(EXPLOY_TABLE.read_text())
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        seen = {
            "inputs": sorted(value.name for value in model.graph.input),
            "outputs": sorted(value.name for value in model.graph.output),
            "metadata": {key: _fields(metadata[key]) for key in table["metadata"] if key in metadata},
        }
        what = "names and metadata against a table of its sources; the graph itself acts like the policy"
        return Row("exploy 0.1", "tick graph with its names", "names checked" if seen == table else "failed", what)

    def plain(self) -> Row:
        """What example_18 asks of a graph: one input and one output, with no open axis. It needs ROS to run."""
        graph = onnx.load_model_from_string(build_plain(self.free.graph, self.free.spec).graph).graph
        shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
        fits = shapes == [[1, self.free.spec.observation_dim], [1, self.free.spec.action_dim]]
        what = "one input, one output, no open axis"
        return Row("ros2_control_demos, example_18", "plain graph", "names checked" if fits else "failed", what)

    def _reference(self, source: Source, name: str, zero: bool = False) -> Path:
        """Observations [episodes, ticks, n], and the actions of `select_action` with the table's noise, or none."""
        spec, policy = source.spec, source.acting()
        noises = noise_by_tick(spec, noise_table(spec, TickSettings()), TICKS) * np.float32(not zero)
        rows = np.stack([drawn_observations(spec, TICKS, 20 + episode) for episode in range(EPISODES)])
        actions = np.stack([policy_actions(policy, episode, noises) for episode in rows])
        np.savez(self.forms / name, rows=rows, actions=actions)
        return self.forms / name

    def _environment(self, requirement: str, alone: bool = False) -> Path:
        """A Python with a library of others, and with this one's packages unless it is to be alone with NumPy."""
        folder = self.output / requirement.replace("==", "-")
        python = folder / "bin/python"
        if (folder / "ready").is_file():
            return python
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if not alone:
            (Path(_purelib(python)) / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        wanted = [requirement, *(("numpy",) if alone else ("--no-deps", *BESIDE[requirement]))]
        installed = subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *wanted], capture_output=True, text=True
        )
        if installed.returncode:
            lines = [line for line in installed.stderr.splitlines() if line.startswith("ERROR")]
            raise Unavailable(f"cannot be installed: {(lines or ['pip failed'])[-1].removeprefix('ERROR: ')}")
        (folder / "ready").touch()
        return python


INTACT = "none"
"""The copy of a bundle that has no damage, which must be accepted."""


def _damaged(bundle: Path, folder: Path) -> dict[str, Path]:
    """Copies of a bundle with one thing wrong each: their descriptions, by what it is."""
    text = (bundle / f"{bundle.name}.yaml").read_text(encoding="utf-8")
    graph = (bundle / f"{bundle.name}.onnx").read_bytes()
    damages = {
        INTACT: (text, graph),
        "another graph": (text, graph + b"\0"),
        "wrong md5": (text.replace(hashlib.md5(graph).hexdigest(), "0" * 32), graph),
        "no md5": (text.replace("md5sum", "md5"), graph),
        "unknown kind": (text.replace("state/joint/velocity", "state/joint/velocities"), graph),
        "no system information": (text.replace("system information", "system"), graph),
    }
    for number, (name, damage) in enumerate(damages.items()):
        assert name == INTACT or damage != damages[INTACT], name
        copy = folder / str(number) / bundle.name
        shutil.copytree(bundle, copy)
        (copy / f"{bundle.name}.yaml").write_text(damage[0], encoding="utf-8")
        (copy / f"{bundle.name}.onnx").write_bytes(damage[1])
    return {name: folder / str(n) / bundle.name / f"{bundle.name}.yaml" for n, name in enumerate(damages)}


def _refuses(description: Path) -> bool:
    """Whether this project's own check refuses a bundle."""
    try:
        check_leapp_bundle(description)
    except FormatError:
        return True
    return False


def _play(script: str, python: Path | str, *arguments: Path | str) -> dict[str, Any]:
    """What a player printed."""
    command = [str(python), str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _exact(stack: str, form: str, ticks: int, equal: bool, more: str) -> Row:
    state, how = ("run here", "bit-equal to") if equal else ("failed", "not equal to")
    return Row(stack, form, state, f"{ticks} ticks {how} `select_action`; {more}")


def _fields(text: str) -> list[str]:
    """Fields of a JSON object, or none of another value."""
    value = json.loads(text)
    return sorted(value) if isinstance(value, dict) else []


def _purelib(python: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| stack | form | | what |", "|---|---|---|---|"]
    lines += [f"| {row.stack} | {row.form} | **{row.state}** | {row.what} |" for row in rows]
    machine = f"{cpu_model()}, {platform.system()}, Python {platform.python_version()}"
    return "\n".join([*lines, "", f"{machine}; {EPISODES} episodes of {TICKS} ticks each."])


def _write_into(page: Path, text: str) -> None:
    """Put the table between the page's marks."""
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not found or not ends:
        raise SystemExit(f"{page} has no {BEGIN} … {END} to write between.")
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
