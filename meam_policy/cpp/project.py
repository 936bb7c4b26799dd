"""The C++ project that `meam cpp` writes around a policy folder."""

from __future__ import annotations

import importlib.util
import os
from importlib.resources import files
from pathlib import Path

from meam_policy.atomic_files import given_folder, write_folder
from meam_policy.errors import ConfigError
from meam_policy.folder.policy_folder import check_output_folder, locate_policy, read_graph, read_spec

__all__ = ["SOURCES", "wheel_library", "write_project"]

SOURCES = (
    "meam_policy.hpp",
    "meam_policy.h",
    "meam_policy_c.cpp",
    "CMakeLists.txt",
    "example.cpp",
    "golden_test.cpp",
)
"""The files of the project, of which the first is all that a program needs."""

_BRACKET = "]==]"
"""What ends a text in CMakeLists.txt."""


def write_project(policy: str | os.PathLike[str], output_dir: str | os.PathLike[str], **where: str | None) -> Path:
    """Write header, CMakeLists.txt, an example and a test against the policy's golden file.

    Args:
        policy: Policy folder, or Hub repo id owner/name.
        output_dir: Folder to write; must be empty or not exist.
        **where: `revision` and `subfolder` on the Hub.

    Returns:
        The policy folder on this machine, to which CMakeLists.txt refers.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
        ConfigError: a path is empty, or one that CMakeLists.txt cannot hold.
        MeamError: as `locate_policy`; or the policy's config.json or graph is broken.
    """
    target = given_folder("output_dir", output_dir)
    check_output_folder(target)
    folder = locate_policy(policy, complete=True, **where).absolute()
    read_graph(folder, read_spec(folder))
    library = wheel_library()
    names = {"@POLICY_FOLDER@": str(folder), "@ONNXRUNTIME_LIBRARY@": "" if library is None else str(library)}
    texts = {name: (files("meam_policy.cpp") / name).read_text(encoding="utf-8") for name in SOURCES}
    for mark, path in names.items():
        if _BRACKET in path:
            raise ConfigError(f"The path {path} has {_BRACKET}; expected none, which CMakeLists.txt could not hold.")
        texts["CMakeLists.txt"] = texts["CMakeLists.txt"].replace(mark, path)
    write_folder(target, {name: text.encode() for name, text in texts.items()}, f"{target} cannot be written")
    return folder


def wheel_library() -> Path | None:
    """The shared library in the installed onnxruntime wheel, which is not imported; None if it has none."""
    spec = importlib.util.find_spec("onnxruntime")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = [path for place in places for path in sorted((Path(place) / "capi").glob("libonnxruntime.so.*"))]
    return found[0] if found else None
