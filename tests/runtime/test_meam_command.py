import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def meam(tmp_path):
    """The command as an installation makes it."""
    entry = re.search(r'^meam = "(\w[\w.]*):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert entry
    module, name = entry.groups()
    script = tmp_path / "meam"
    script.write_text(f"import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n")
    return [sys.executable, str(script)]


@pytest.mark.parametrize(
    ("slow", "arguments"),
    [
        ("numpy", ["--help"]),
        ("gymnasium", ["train", "bc"]),
        ("gymnasium", ["eval", "policies/arm"]),
        ("torch", ["train", "bc", "--data", "d", "--output-dir", "r"]),
        ("tyro", ["eval", "policies/arm"]),
    ],
)
def test_ctrl_c_during_an_import_ends_with_one_line(meam, tmp_path, slow, arguments):
    if slow in ("torch", "tyro"):
        pytest.importorskip(slow)
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / f"{slow}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen(
        [*meam, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(fake)},
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal
        try:
            output, errors = process.communicate(timeout=50)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert (first, output, process.returncode) == ("importing\n", "", 130)
    assert errors.startswith("meam: interrupted")
    assert errors.count("\n") == 1


def test_the_command_is_that_of_the_package(meam):
    result = subprocess.run([*meam, "--version"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("meam-policy ")
    assert subprocess.run([*meam, "evil"], capture_output=True, check=False).returncode == 2
