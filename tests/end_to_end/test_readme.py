"""What the README shows is run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from meam_export import export_policy
from meam_training import OfflineDataset, TrainConfig, collect, train

README = Path(__file__).parents[2] / "README.md"


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the policies that the examples name."""
    folder = tmp_path_factory.mktemp("readme")
    dataset = OfflineDataset.from_minari(collect("meam/Pockets-v0", 100, root=folder / "data"))
    run = train(TrainConfig.preset("bc", steps=2, hidden_dims=(8,), chunk_size=4), dataset, folder / "run")
    export_policy(run, folder / "demo-output" / "policies" / "me-am")
    export_policy(run, folder / "policies" / "ladder", variants=("k3-grid",))
    return folder


def test_the_robot_example_runs_to_the_end_of_an_episode(folder: Path) -> None:
    assert execute(block("robot") + "print(len(observation), done)", folder) == "4 True\n"


def test_the_loop_example_reports_its_health(folder: Path) -> None:
    assert "ticks=20" in execute(block("loop"), folder)


def test_the_variants_example_loads_one_by_name_and_one_in_time(folder: Path) -> None:
    lines = block("variants").splitlines()
    named = next(index for index, line in enumerate(lines) if "variant=" in line)
    lines.insert(named + 1, "print(policy.variant, policy.spec.nfe)")
    assert execute("\n".join([*lines, "print(policy.variant)"]), folder) == "k3-grid 3\nNone\n"


@pytest.mark.slow
def test_the_lab_example_runs_with_fewer_updates(tmp_path: Path) -> None:
    shortened, count = re.subn(r"steps=5000, pretrain_steps=4000", "steps=30, pretrain_steps=20", block("lab"))
    assert count == 1
    assert "'return_mean'" in execute(shortened, tmp_path)
    assert (tmp_path / "policies" / "pockets" / "policy.onnx").is_file()


def test_every_file_and_command_named_in_the_readme_exists() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"^\| `([\w/]+/)` \|", text, re.MULTILINE):
        assert (README.parent / path).is_dir(), path
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\S+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
