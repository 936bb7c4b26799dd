import ast
import importlib
import importlib.metadata
import importlib.resources
import inspect
import pkgutil
import re

import pytest

import meam_policy
from meam_policy import MeamError, errors

HEAVY = (
    "torch",
    "huggingface_hub.errors",
    "mcap",
    "onnxruntime",
    "onnx",
    "minari",
    "tyro",
    "rich",
    "mujoco",
    "ogbench",
    "matplotlib",
    "h5py",
    "pandas",
)


def test_importing_the_runtime_imports_nothing_heavy(run_python):
    code = f"import sys, meam_policy; print([name for name in {HEAVY} if name in sys.modules])"
    result = run_python("-W", "error::ImportWarning", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_importing_the_runtime_prints_and_logs_nothing(run_python):
    code = "import logging, meam_policy; assert not logging.getLogger().handlers"
    result = run_python("-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_acting_imports_neither_torch_nor_onnx(run_python, make_policy):
    linear = make_policy()
    code = (
        "import sys, meam_policy\n"
        f"policy = meam_policy.MeamPolicy.from_pretrained({str(linear.folder)!r})\n"
        "policy.act([0.0, 0.0, 0.0])\n"
        "print([name for name in ('torch', 'onnx', 'minari', 'tyro', 'rich') if name in sys.modules])"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("switch", [None, "1"])
def test_acting_writes_nothing_and_switches_onnxruntimes_telemetry_off(run_python, make_policy, tmp_path, switch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    code = (
        "import os, meam_policy\n"
        f"policy = meam_policy.MeamPolicy.from_pretrained({str(make_policy().folder)!r})\n"
        "policy.act([0.0, 0.0, 0.0])\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    places = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": str(work),
        "HF_HOME": str(home / "hf"),
    }
    if switch is not None:
        places["ORT_DISABLE_TELEMETRY"] = switch
    result = run_python("-B", "-c", code, **places)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1\n"
    assert set(tmp_path.rglob("*")) == {home, work}


def test_telemetry_that_is_asked_for_stays(run_python):
    code = (
        "import os, meam_policy.inference.providers as p; p.import_onnxruntime(); print(os.environ[p.TELEMETRY_SWITCH])"
    )
    assert run_python("-c", code, ORT_DISABLE_TELEMETRY="0", CI="1").stdout == "0\n"


def test_the_first_tick_imports_nothing(run_python, make_policy):
    linear = make_policy()
    code = (
        "import sys, meam_policy\n"
        "import onnxruntime\n"
        f"policy = meam_policy.MeamPolicy.from_pretrained({str(linear.folder)!r})\n"
        "loop = meam_policy.ControlLoop(policy, 50, chunking='naive', simulated_delay=0)\n"
        "before = set(sys.modules)\n"
        "policy.act([0.0, 0.0, 0.0])\n"
        "policy.sample([0.0, 0.0, 0.0])\n"
        "policy.predict([0.0, 0.0, 0.0])\n"
        "loop.step([0.0, 0.0, 0.0])\n"
        "policy.health(), loop.health()\n"
        "print(sorted(set(sys.modules) - before))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_measuring_latencies_imports_nothing(run_python):
    code = (
        "import sys\n"
        "from meam_policy.loop.loop_health import HealthRecorder\n"
        "recorder, before = HealthRecorder(), set(sys.modules)\n"
        "recorder.add_latency(0.001)\n"
        "recorder.read(delay_ticks=1, stopped=False)\n"
        "print(sorted(set(sys.modules) - before))"
    )
    result = run_python("-c", code)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def runtime_modules():
    folder = importlib.resources.files("meam_policy")
    return sorted(str(path) for path in folder.rglob("*.py"))  # pyright: ignore[reportAttributeAccessIssue]


def test_no_module_of_the_runtime_imports_training_export_or_torch():
    modules = runtime_modules()
    assert len(modules) > 10
    for path in modules:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(file.read())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "minari", "onnx", "meam_training", "meam_export"), path


def test_public_names_are_importable_sorted_and_complete():
    names = meam_policy.__all__
    constants = [name for name in names if name.isupper()]
    classes = [name for name in names if inspect.isclass(getattr(meam_policy, name))]
    functions = [name for name in names if inspect.isfunction(getattr(meam_policy, name))]
    assert names == sorted(constants) + sorted(classes) + sorted(functions)
    assert set(errors.__all__) <= set(names)
    public = {
        name for name, value in vars(meam_policy).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(names)


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.walk_packages(meam_policy.__path__, "meam_policy.") if "__main__" not in m.name]
)
def test_every_module_defines_the_names_it_lists(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    if not hasattr(loaded, "__path__"):  # a folder's own module may hand on nothing
        assert loaded.__all__
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name)


def documented_tree():
    """Name, parent and builtin of every error, as the docstring of meam_policy.errors draws them."""
    assert errors.__doc__ is not None
    parents = {-1: "MeamError"}
    for line in errors.__doc__.splitlines():
        match = re.match(r"( +[│ ]*)[├└]── (\w+)(?:\((\w+)\))?", line)
        if match:
            depth = len(match[1])
            parent = parents[max(d for d in parents if d < depth)]
            parents = {d: name for d, name in parents.items() if d < depth} | {depth: match[2]}
            yield match[2], parent, match[3]


def test_docstring_draws_every_error():
    assert {name for name, _, _ in documented_tree()} | {"MeamError"} == set(errors.__all__)


@pytest.mark.parametrize(("name", "parent", "builtin"), documented_tree())
def test_error_derives_from_what_the_docstring_says(name, parent, builtin):
    error = getattr(errors, name)
    assert issubclass(error, MeamError)
    assert getattr(errors, parent) in error.__bases__
    if builtin:
        assert issubclass(error, getattr(importlib.import_module("builtins"), builtin))


@pytest.mark.parametrize("package", ["meam_policy", "meam_training", "meam_export"])
def test_package_is_typed(package):
    if package != "meam_policy":
        pytest.importorskip("torch")
    assert importlib.resources.files(package).joinpath("py.typed").is_file()


def test_version_is_the_distributions():
    assert meam_policy.__version__ == importlib.metadata.version("meam-policy")


def test_help_needs_no_pytorch_and_training_names_what_brings_it(run_python, tmp_path):
    code = (
        "import contextlib, io, sys\n"
        "class WithoutTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, WithoutTorch())\n"
        "from meam_policy.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):\n"
        "    run(['train', '--help'])\n"
        "assert said.getvalue().startswith('usage: meam train'), said.getvalue()\n"
        "for given in (['--data', 'd'], ['--resume'], ['--data', 'd', '--from', 'p']):\n"
        f"    assert run(['train', '--output-dir', {str(tmp_path / 'run')!r}, *given]) == 2\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == 3 * (
        "meam: `meam train` needs torch, which is not installed: pip install 'meam-policy[train]'.\n"
    )
