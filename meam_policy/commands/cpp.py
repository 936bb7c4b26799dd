"""`meam cpp`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from meam_policy.commands import parse
from meam_policy.console import say
from meam_policy.cpp.project import write_project

__all__ = ["cpp", "run"]


def cpp(
    policy: Annotated[str, tyro.conf.Positional],
    output_dir: Path,
    revision: str | None = None,
    subfolder: str | None = None,
) -> None:
    """Write a C++ project that acts with a policy folder: one header, an example, a test, and a C interface.

    It needs a C++17 compiler, CMake, nlohmann-json and the headers of onnxruntime 1.17 or newer; the library may be
    that of the Python wheel.

    Example: meam cpp policies/arm --output-dir arm-cpp

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        output_dir: Folder to write; must be empty or not exist.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder of the repository that the policy is in.
    """
    write_project(policy, output_dir, revision=revision, subfolder=subfolder)
    place, build = quote(str(output_dir)), quote(str(output_dir / "build"))
    say(f"Wrote {output_dir}. Then: cmake -S {place} -B {build} && cmake --build {build} && ctest --test-dir {build}")


def run(arguments: list[str], prog: str) -> None:
    """Parse the arguments and write."""
    parse(cpp, arguments, prog)
