import re
import shutil
from pathlib import Path

import pytest

from meam_policy.cli import run
from meam_policy.cpp import project
from meam_policy.cpp.project import SOURCES, wheel_library

HERE = Path(__file__).parent
POCKETS = HERE.parents[2] / "model_cards" / "pockets"


def test_a_project_is_written_once_and_names_the_policy_and_the_library(tmp_path, capsys):
    target = tmp_path / "robot arm"
    assert run(["cpp", str(POCKETS), "--output-dir", str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == sorted(SOURCES)
    assert f"cmake -S '{target}' -B '{target / 'build'}' && cmake --build" in capsys.readouterr().err
    text = (target / "CMakeLists.txt").read_text()
    assert f"[==[{POCKETS}]==]" in text
    assert f"[==[{wheel_library()}]==]" in text
    assert "@" not in text
    for name in SOURCES:
        if name != "CMakeLists.txt":
            assert (target / name).read_text() == (Path(project.__file__).parent / name).read_text()
    assert run(["cpp", str(POCKETS), "--output-dir", str(target)]) == 2
    assert "already holds something" in capsys.readouterr().err


def test_an_onnxruntime_without_a_library_leaves_its_place_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(project.importlib.util, "find_spec", lambda name: None)
    project.write_project(POCKETS, tmp_path / "new")
    assert "set(ONNXRUNTIME_LIBRARY [==[]==] CACHE" in (tmp_path / "new" / "CMakeLists.txt").read_text()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("none", "The policy folder none does not exist"),
        ("damaged", "policy.onnx"),
        ("odd]==]", "expected none, which"),
    ],
)
def test_a_policy_that_cannot_be_used_is_one_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, policy, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("damaged", "odd]==]"):
        shutil.copytree(POCKETS, name)
    Path("damaged/policy.onnx").write_bytes(b"")
    assert run(["cpp", policy, "--output-dir", "new"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("new").exists()


def test_the_blocks_of_the_page_compile_without_warnings(toolchain, include, tmp_path):
    page = (HERE.parents[2] / "docs" / "cpp.md").read_text(encoding="utf-8")
    blocks: dict[str, str] = {"cpp": "", "c": ""}
    for kind, body in re.findall(r"^```(cpp|c)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        blocks[kind] += body
    flags = [*toolchain.strict, "-fsyntax-only", "-I", toolchain.sources, "-isystem", include]
    for kind, standard in (("cpp", "-std=c++17"), ("c", "-std=c99")):
        assert "meam" in blocks[kind]
        (tmp_path / f"page.{kind}").write_text(blocks[kind])
        toolchain.run(
            toolchain.tool("g++"), "-x", {"cpp": "c++"}.get(kind, kind), standard, *flags, tmp_path / f"page.{kind}"
        )


def test_the_example_acts(program):
    lines = program("example", POCKETS).stdout.splitlines()
    assert len(lines) == 21
    assert lines[-1].startswith("20 actions, 4 inferences, ")


@pytest.mark.slow
def test_the_project_builds_and_passes_its_test(toolchain, include, tmp_path):
    cmake, build = toolchain.tool("cmake"), tmp_path / "build"
    project.write_project(POCKETS, tmp_path / "project")
    places = [f"-DONNXRUNTIME_INCLUDE_DIR={include / 'onnxruntime'}", f"-DNLOHMANN_JSON_INCLUDE_DIR={include}"]
    toolchain.run(cmake, "-S", tmp_path / "project", "-B", build, "-DCMAKE_CXX_FLAGS_RELEASE=-O0", *places)
    # The others' sources are part of the test program.
    toolchain.run(cmake, "--build", build, "--target", "golden_test")
    toolchain.run("ctest", "--test-dir", build)


@pytest.mark.slow
def test_a_project_without_headers_says_how_to_get_them(toolchain, include, tmp_path):
    project.write_project(POCKETS, tmp_path / "project")
    words = ["-S", tmp_path / "project", "-B", tmp_path / "build", f"-DNLOHMANN_JSON_INCLUDE_DIR={include}"]
    done = toolchain.runner(toolchain.tool("cmake"))(*words, check=False)
    if (Path("/usr/include/onnxruntime/onnxruntime_cxx_api.h")).is_file():
        assert done.returncode == 0
    else:
        assert "onnxruntime_cxx_api.h is not found. On Debian 13: apt-get install" in " ".join(done.stderr.split())
