"""The built wheel, installed without torch in an environment of its own, acts in MuJoCo."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from meam_export import export_policy
from meam_policy.cpp.project import SOURCES
from meam_training import OfflineDataset, TrainConfig, collect, train

ROOT = Path(__file__).parents[2]

ACT = """
import json, sys
import meam_policy
policy = meam_policy.MeamPolicy.from_pretrained(sys.argv[1])
result = meam_policy.rollout(policy, meam_policy.make_environment(policy.spec.environment_id), episodes=2, seed=0)
try:
    import torch
except ImportError:
    print(json.dumps({"lengths": result.lengths.tolist(), "provider": policy.provider}))
"""


def succeed(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_acts_in_mujoco_without_torch(tmp_path: Path) -> None:
    succeed(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"meam_policy/cpp/{name}" for name in SOURCES} <= names
    assert {f"{package}/py.typed" for package in ("meam_policy", "meam_training", "meam_export")} <= names
    assert "meam_command.py" in names
    assert {
        "meam_export/model_card_template.md",
        "meam_export/demo/report.html",
        "meam_export/report/page.html",
    } <= names

    dataset = OfflineDataset.from_minari(collect("meam/Pockets-v0", 100, root=tmp_path / "data"))
    config = TrainConfig.preset("bc", steps=2, hidden_dims=(8,), chunk_size=2)
    policy = export_policy(train(config, dataset, tmp_path / "run"), tmp_path / "policy").folder

    python = tmp_path / "venv" / "bin" / "python"
    succeed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet")
    succeed(*pip, "install", "--no-compile", "--constraint", ROOT / "constraints.txt", f"{wheel}[cpu]", "mujoco")
    found = json.loads(succeed(python, "-c", ACT, policy))
    assert found == {"lengths": [20, 20], "provider": "CPUExecutionProvider"}

    meam = python.with_name("meam")
    summary = json.loads(succeed(meam, "eval", policy, "--episodes", "2", "--json"))
    assert summary["episodes"] == 2
    refused = subprocess.run([meam, "train", "bc"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "pip install 'meam-policy[train]'" in refused.stderr
