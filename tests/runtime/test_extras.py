"""Imports that fail: what is missing, what is broken, and Ctrl-C."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from meam_policy import ConfigError, MissingExtraError
from meam_policy.cli import Command, load_command
from meam_policy.extras import needs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Write a library of this code, to be imported by its name."""

    def make(code, name="ourlibrary"):
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()

    return make


def import_it():
    with needs("Flying", "ourlibrary", "wings", " (or [feathers])"):
        importlib.import_module("ourlibrary")


def test_a_library_that_is_missing_is_named_with_what_installs_it():
    with pytest.raises(MissingExtraError) as caught:
        import_it()
    assert (
        str(caught.value)
        == "Flying needs ourlibrary, which is not installed: pip install 'meam-policy[wings]' (or [feathers])."
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_what_a_library_lacks_itself_is_what_is_missing(library):
    library("import no_such_feathers")
    with pytest.raises(MissingExtraError, match=r"^Flying needs no_such_feathers, which is not installed: pip install"):
        import_it()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libwing.so.1: cannot open shared object file')", "libwing.so.1: cannot open shared"),
        ("raise ImportError('\\n\\nREAD THIS:\\n  broken')", "READ THIS: broken"),
        ("from json import no_such_name", "cannot import name 'no_such_name' from 'json'"),
        ("import json.no_such_part", "No module named 'json.no_such_part'"),
        ("raise ModuleNotFoundError(\"No module named '_ctypes'\", name='_ctypes')", "No module named '_ctypes'"),
    ],
)
def test_a_library_that_is_there_and_broken_is_not_called_missing(library, code, reason):
    library(code)
    with pytest.raises(MissingExtraError) as caught:
        import_it()
    told = str(caught.value)
    assert told.startswith(f"Flying needs ourlibrary, which cannot be imported: {reason}")
    assert "not installed" not in told
    assert told.endswith("install it again: pip install 'meam-policy[wings]' (or [feathers]).")


@pytest.mark.parametrize(
    "code",
    [
        "raise KeyboardInterrupt",
        "raise ImportError('initialization failed') from KeyboardInterrupt()",
        "try:\n  raise ImportError from KeyboardInterrupt()\nexcept ImportError as e:\n  raise ImportError from e",
        "raise ImportError('KeyboardInterrupt: <EMPTY MESSAGE>')",
    ],
)
def test_ctrl_c_during_an_import_stays_one(library, code):
    library(code)
    with pytest.raises(KeyboardInterrupt):
        import_it()


def test_our_own_errors_pass_as_they_are(library):
    library("from meam_policy import ConfigError\nraise ConfigError('ours')")
    with pytest.raises(ConfigError, match="ours"):
        import_it()


def test_a_command_whose_library_is_broken_says_so(library):
    library("raise ImportError('libwing.so.1: cannot open shared object file')")
    with pytest.raises(MissingExtraError, match=r"^`meam fly` needs a library, which cannot be imported: libwing\.so"):
        load_command(Command("ourlibrary", "", "wings"), "meam fly")
    library("from json import no_such_name")
    with pytest.raises(MissingExtraError, match=r"^`meam fly` needs json, which cannot be imported: cannot import"):
        load_command(Command("ourlibrary", "", "wings"), "meam fly")


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            2,
            "which cannot be imported: libcudart",
        ),
        ("", 2, "cannot import name 'InferenceSession' from 'onnxruntime'"),
        ("raise ImportError('initialization failed') from KeyboardInterrupt()", 130, "meam: interrupted"),
        ("raise KeyboardInterrupt", 130, "meam: interrupted"),
        ("import no_such_module", 2, "Acting needs no_such_module, which is not installed"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "eval"])
def test_an_onnxruntime_whose_import_fails_ends_a_command_with_one_line(
    run_python, make_policy, tmp_path, code, status, told, command
):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "onnxruntime.py").write_text(code)
    folder = str(make_policy(environment_id="Pendulum-v1").folder)
    start = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from meam_policy.cli import main; "
    result = run_python("-c", f"{start}sys.argv[1:] = [{command!r}, {folder!r}]; main()")
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.count("\n") == 1
    assert told in result.stderr
    assert "onnxruntime, which is not installed" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits need Linux")
def test_a_policy_is_not_blamed_for_an_onnxruntime_whose_import_fails(run_python, make_policy, tmp_path):
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libwing.so.1: cannot open it')")
    result = run_python(
        "-m", "meam_policy", "verify", str(make_policy().folder), "--untrusted", PYTHONPATH=str(tmp_path)
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert "onnxruntime, which cannot be imported: libwing.so.1" in result.stderr
    assert "Do not load it" not in result.stderr


def optional_imports():
    """Handlers of ImportError in the sources."""
    for folder in ("meam_policy", "training/meam_training", "export/meam_export"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ExceptHandler) and node.type is not None:
                    caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
                    if caught & {"ImportError", "ModuleNotFoundError"}:
                        yield str(path.relative_to(ROOT)), ast.unparse(node)


def test_every_import_that_may_fail_tells_what_is_broken_and_ctrl_c_from_what_is_missing():
    system = "meam_policy/diagnosis/machine.py"  # of Python itself, on other systems
    handlers = [(path, handler) for path, handler in optional_imports() if path != system]
    assert handlers
    assert [path for path, handler in handlers if "raise_interrupt(error)" not in handler] == []
