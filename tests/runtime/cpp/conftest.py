"""The program that the tests of `meam_policy.hpp` run, compiled once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from meam_policy.cpp.project import wheel_library

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "meam_policy" / "cpp"
OBJECTS = ("program.o", "interface.o")
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")

Program = Callable[..., "subprocess.CompletedProcess[str]"]


def headers(*arguments: str) -> Path:
    """A folder with usr/include, or the test is skipped, and says what is missing."""
    done = subprocess.run(
        [sys.executable, HERE / "headers.py", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(done.stderr.strip())
    return Path(done.stdout.strip())


def tool(name: str) -> str:
    """The path of a program, or the test is skipped."""
    found = shutil.which(name)
    if found is None:
        package = {"clang++": "clang"}.get(name, name)
        pytest.skip(f"{name} is missing, which compiles meam_policy.hpp. On Debian: apt-get install {package}")
    return found


def compiled(cxx: str, include: Path, folder: Path, *flags: str) -> list[Path]:
    """The object files of the test program."""
    program, interface = (folder / name for name in OBJECTS)
    common = ["-I", SOURCES, "-c", *STRICT, *flags]
    system = ["-isystem", include]
    run(cxx, "-std=c++17", *common, *system, HERE / "program.cpp", "-o", program)
    run(cxx, "-xc", "-std=c99", *common, HERE / "interface.c", "-o", interface)
    return [program, interface]


def linked(cxx: str, objects: list[Path], folder: Path, *flags: object) -> Path:
    """The test program with the library of the installed onnxruntime wheel."""
    library = wheel_library()
    if library is None:
        pytest.skip("The installed onnxruntime has no libonnxruntime.so: pip install onnxruntime, of 1.26 or newer")
    (folder / "libonnxruntime.so.1").symlink_to(library)
    program = folder / "program"
    run(cxx, *objects, library, *flags, "-pthread", f"-Wl,-rpath,{folder}", "-o", program)
    return program


def run(*words: object) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def runner(*start: object, **environment: str) -> Program:
    """Runs a program with arguments; what it does not expect fails the test."""

    def call(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in (*start, *arguments)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        assert not check or done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done

    return call


@pytest.fixture(scope="session")
def toolchain() -> SimpleNamespace:
    """What finds and runs compilers, and their flags."""
    return SimpleNamespace(tool=tool, run=run, runner=runner, strict=STRICT, sources=SOURCES)


@pytest.fixture(scope="session")
def include() -> Path:
    """The folder that has the headers of onnxruntime and nlohmann-json."""
    return headers() / "usr" / "include"


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], Any]) -> Path:
    """A folder that the first of the processes that run the tests fills, for all of them."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"cpp-{name}"
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            place.mkdir()
            try:
                build(place)
            except BaseException:
                shutil.rmtree(place)
                raise
    return place


@pytest.fixture(scope="session")
def objects(include: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The object files of the test program."""
    cxx = tool("g++")
    place = once(tmp_path_factory, "objects", lambda folder: compiled(cxx, include, folder, "-O1"))
    return [place / name for name in OBJECTS]


@pytest.fixture(scope="session")
def program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The test program on the wheel's onnxruntime."""
    return runner(linked(tool("g++"), objects, tmp_path_factory.mktemp("program")))


@pytest.fixture(scope="session")
def debian_program(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The same object files on Debian 13's onnxruntime 1.21, under Debian 13's loader."""
    root = headers("--library")
    folder = root / "usr" / "lib" / "x86_64-linux-gnu"
    loader = root / "usr" / "lib64" / "ld-linux-x86-64.so.2"
    if not loader.is_file():
        pytest.skip(f"{loader.name} is missing: Debian's library is run on x86-64 only")
    made = tmp_path_factory.mktemp("debian") / "program"
    library = folder / "libonnxruntime.so.1.21"
    run(tool("g++"), *objects, library, "-pthread", "-Wl,--allow-shlib-undefined", "-o", made)
    return runner(loader, "--library-path", folder, made)


@pytest.fixture(scope="session")
def sanitized_program(include: Path, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The same, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    cxx, flags = tool("g++"), ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

    def build(folder: Path) -> None:
        linked(cxx, compiled(cxx, include, folder, *flags), folder, *flags)

    return runner(once(tmp_path_factory, "sanitized", build) / "program", ASAN_OPTIONS="detect_leaks=1")
