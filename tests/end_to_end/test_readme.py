"""What the README shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
RUNTIME_ONLY = "import sys; sys.modules.update(dict.fromkeys(('torch', 'mujoco', 'minari', 'onnx', 'scipy')))\n"
"""Importing what `pip install '.[cpu]'` does not bring fails from here on."""


def block(name: str) -> str:
    found = re.search(rf"<!-- test: {name} -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"README.md has no tested block {name}"
    return found[1]


def execute(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_robot_example_needs_nothing_but_the_runtime(documented_world: Path) -> None:
    code = RUNTIME_ONLY + block("robot") + "print(tick, action.shape, policy.health().steps)"
    assert execute(code, documented_world) == "49 (2,) 50\n"


@pytest.mark.slow
def test_what_the_demo_leaves_is_evaluated(documented_world: Path) -> None:
    (command,) = re.findall(r"`meam (eval demo-output[^`]*)`", README.read_text(encoding="utf-8"))
    code = f"from meam_policy.cli import run; run({[*command.split(), '--episodes', '1', '--json']})"
    assert '"episodes": 1,' in execute(code, documented_world)


@pytest.mark.slow
def test_the_lab_example_runs_with_fewer_updates(tmp_path: Path) -> None:
    shortened, count = re.subn(r"steps=5000, pretrain_steps=4000", "steps=30, pretrain_steps=20", block("lab"))
    assert count == 1
    assert "'return_mean'" in execute(shortened, tmp_path)
    assert (tmp_path / "policies" / "pockets" / "policy.onnx").is_file()
    assert (tmp_path / "data" / "lab" / "robot-v0").is_dir()


def test_the_readme_is_at_most_a_hundred_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 100
