"""Finds the headers of onnxruntime's C++ API and of nlohmann-json, or downloads them: Debian 13's, of onnxruntime 1.21.

Where they are not installed, apt downloads them with lists and caches of its own, from where this machine takes its
packages, and dpkg unpacks them into build/, which git ignores. Nothing is installed.

    python tests/runtime/cpp/headers.py              # prints the folder that has usr/include
    python tests/runtime/cpp/headers.py --library    # with Debian's library too, and all that it needs

If that fails, it says what is missing on stderr, and exits with 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASE = "trixie"
"""The Debian release with the oldest onnxruntime that has headers; its version is what ROS ships, too."""

HEADERS = ("libonnxruntime-dev", "nlohmann-json3-dev")
LIBRARY = "libonnxruntime1.21"
CACHE = Path(__file__).parents[3] / "build" / "onnxruntime-cpp"
BY_HAND = "On Debian 13 or newer: apt-get install libonnxruntime-dev nlohmann-json3-dev."


class MissingError(Exception):
    """The headers cannot be had here."""


def has_headers(root: Path) -> bool:
    """Whether a folder has both headers below usr/include."""
    include = root / "usr" / "include"
    return (include / "onnxruntime" / "onnxruntime_cxx_api.h").is_file() and (include / "nlohmann/json.hpp").is_file()


def find(library: bool) -> Path:
    """A folder with the headers, downloaded if need be.

    Raises:
        MissingError: they are neither here nor to be had.
    """
    if not library and has_headers(Path("/")):
        return Path("/")
    place = CACHE / ("library" if library else "headers")
    if not place.is_dir():
        download(place, library)
    return place


def download(place: Path, library: bool) -> None:
    """Download and unpack into a new folder, which is there only when it is complete."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise MissingError(f"{program} is missing, which downloads onnxruntime's C++ headers. {BY_HAND}")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        packages = fetch(Path(work), library)
        root = Path(work) / "root"
        for package in packages:
            command("dpkg", "-x", package, root)
        if not has_headers(root):
            raise MissingError(f"Debian's packages have no onnxruntime_cxx_api.h, or no nlohmann/json.hpp. {BY_HAND}")
        try:
            root.rename(place)
        except OSError:  # another process was faster
            if not place.is_dir():
                raise


def fetch(work: Path, library: bool) -> list[Path]:
    """Download the packages into a folder."""
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()  # nothing is installed, so that everything needed is downloaded
    keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    (work / "sources.list").write_text(f"deb [signed-by={keyring}] {own_archive()} {RELEASE} main\n")
    settings = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::State::status": work / "status",
        "Dir::Cache": work,
        "Acquire::Languages": "none",
        "Acquire::http::Timeout": 20,
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        "Debug::NoLocking": 1,
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    command("apt-get", *options, "update")
    if library:
        command(
            "apt-get", *options, "install", "--download-only", "--yes", "--no-install-recommends", LIBRARY, *HEADERS
        )
    else:
        command("apt-get", *options, "download", *HEADERS, cwd=work / "archives")
    return sorted((work / "archives").glob("*.deb"))


def own_archive() -> str:
    """The archive that this machine's own release comes from."""
    release = platform.freedesktop_os_release()
    name, system = release.get("VERSION_CODENAME", ""), release.get("ID", "an unknown system")
    if system != "debian":
        raise MissingError(f"This is {system}, and onnxruntime's C++ headers are looked for in Debian only. {BY_HAND}")
    found = re.search(rf"'(\S+)/dists/{re.escape(name)}/InRelease'", command("apt-get", "update", "--print-uris"))
    if found is None:
        raise MissingError(
            f"apt has no source of Debian {name}, from which onnxruntime's headers would come. {BY_HAND}"
        )
    return found[1]


def command(*words: object, cwd: Path | None = None) -> str:
    """Run a program, and return what it printed."""
    try:
        done = subprocess.run(
            [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=240, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"{words[0]} did not end within four minutes. {BY_HAND}") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("E:")), done.stderr[-200:])
        raise MissingError(f"{words[0]} cannot get onnxruntime's C++ headers ({reason.strip()}). {BY_HAND}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--library", action="store_true", help="Debian's library too, and all that it needs")
    try:
        print(find(parser.parse_args().library))
    except MissingError as error:
        sys.exit(str(error))
