"""The policy folder: where it is, and whether its files have the hashes that its `config.json` records."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from shlex import quote

from meam_policy.errors import ConfigError, IntegrityError, NotFoundError
from meam_policy.folder.hub import download_policy
from meam_policy.spec import GRAPH_FILE, PolicySpec

__all__ = [
    "CONFIG_FILE",
    "GRAPH_FILE",
    "LADDER_FILE",
    "MODEL_FILE",
    "POLICY_FILES",
    "locate_policy",
    "read_graph",
    "read_spec",
    "sha256",
    "verify_files",
]

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
LADDER_FILE = "ladder.png"
"""The figure of the variants."""
POLICY_FILES = (CONFIG_FILE, GRAPH_FILE, MODEL_FILE, "golden.safetensors", "README.md", LADDER_FILE)
"""Every file of a policy folder but the graphs of its variants, which `config.json` names; the last is optional."""

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_policy(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    variants: Collection[str] | None = (),
) -> Path:
    """Find a policy folder on this machine, downloading it from the Hugging Face Hub if needed.

    An existing folder always wins. Otherwise text of the form "owner/name" is a repo id, unless a folder "owner"
    exists here; everything else is a path. The remaining arguments are those of `huggingface_hub.hf_hub_download`, but
    for `variants`: names of those whose graphs are needed too, or None for all of them.

    Returns:
        The folder, which exists; its contents are not checked yet.

    Raises:
        NotFoundError: a path that is empty, not a folder or that of a training run, or a repository without a policy.
        HubError: the Hub could not deliver the policy.
        ConfigError: it is no text and no path, or the revision is empty, or given for a folder on this machine.
    """
    if not isinstance(path_or_repo_id, (str, os.PathLike)):
        raise ConfigError(
            f"The policy is {path_or_repo_id!r}, a {type(path_or_repo_id).__name__}; expected the path of a folder, or "
            'a Hub repo id "owner/name".'
        )
    if not str(path_or_repo_id).strip():
        raise NotFoundError(
            f"The policy's name is empty ({path_or_repo_id!r}); expected the path of a folder, or a Hub repo id "
            '"owner/name". "." is this very folder.'
        )
    if revision is not None and not revision.strip():
        raise ConfigError(f"revision is {revision!r}; expected a branch, tag or commit on the Hub, or None for main.")
    path = Path(path_or_repo_id).expanduser()
    _refuse_training(path)
    if path.is_dir():
        if revision is not None:
            raise ConfigError(
                f'revision is "{revision}", but {path} is a folder on this machine, which has none; leave it out, or '
                "give a Hub repo id owner/name."
            )
        return path
    text = path_or_repo_id if isinstance(path_or_repo_id, str) else ""
    if not _REPO_ID.fullmatch(text) or path.parent.name in ("", ".", "..") or path.parent.is_dir():
        seen = "is a file, not a folder" if path.exists() else "does not exist"
        raise NotFoundError(
            f"The policy folder {path} {seen}. Give the folder that `meam export` wrote, or a Hub repo id owner/name."
        )
    get = partial(download_policy, text, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    folder = get((CONFIG_FILE, GRAPH_FILE), POLICY_FILES[2:], revision=revision, force_download=force_download)
    if variants is None or variants:
        spec = read_spec(folder)
        names = spec.variants if variants is None else variants
        files = {spec.select(name)[1] for name in names}
        required = (CONFIG_FILE, GRAPH_FILE, *sorted(files - {GRAPH_FILE}))
        try:  # of the very commit that config.json came from
            get(required, (), revision=folder.name, force_download=force_download)
        except NotFoundError as error:
            raise NotFoundError(
                f"{text} at commit {folder.name} lacks one of the graphs that its config.json names: "
                f"{', '.join(required[2:])}. Upload the whole policy folder again."
            ) from error
    return folder


def _refuse_training(path: Path) -> None:
    """Refuse the folder of a training run or of its checkpoints, whose config.json would look like a newer policy's."""
    above = path.absolute().parent
    in_run = above.name == "checkpoints" and (above.parent / "run.json").is_file()  # best and latest are no folders
    is_checkpoint = in_run or (path / "trainer.json").is_file()
    if (is_checkpoint or (path / "run.json").is_file()) and not (path / GRAPH_FILE).exists():
        kind = "a checkpoint" if is_checkpoint else "a training run"
        raise NotFoundError(
            f"{path} is {kind}, not a policy folder. Export it first: "
            f"`meam export {quote(str(path))} --output-dir DIR`, then give DIR."
        )


def read_spec(folder: Path) -> PolicySpec:
    """Read the folder's `config.json`.

    Raises:
        NotFoundError: there is none.
        FormatError: it does not have the expected format.
    """
    return PolicySpec.from_json(_read(folder, CONFIG_FILE))


def read_graph(folder: Path, spec: PolicySpec, file: str = GRAPH_FILE) -> bytes:
    """Read one of the folder's graphs, or another of its binary files, and check its hash.

    Raises:
        NotFoundError: there is none.
        IntegrityError: its hash is not the one that `config.json` records.
    """
    return _read_checked(folder, file, spec.files.get(file))


def verify_files(folder: Path, spec: PolicySpec) -> tuple[str, ...]:
    """Check the hash of every file that exists and has one recorded in `config.json`.

    Returns:
        The missing files, of those that a complete policy folder has or `config.json` names. Only `policy.onnx` is
        needed to act.

    Raises:
        IntegrityError: the hash of a file is not the one that `config.json` records.
    """
    names = dict.fromkeys((*POLICY_FILES, *spec.files))
    missing = tuple(
        name for name in names if not (folder / name).exists() and (name in spec.files or name != LADDER_FILE)
    )
    for name, expected in spec.files.items():
        if name not in missing:
            _read_checked(folder, name, expected)
    return missing


def _read_checked(folder: Path, name: str, expected: str | None) -> bytes:
    data = _read(folder, name)
    seen = sha256(data)
    if expected is None:
        raise IntegrityError(f"config.json records no hash of {name} in {folder}. Export the policy again.")
    if data.startswith(b"version https://git-lfs"):
        raise IntegrityError(f"{folder / name} is a git-lfs pointer, not the file. Run `git lfs pull`.")
    if seen != expected:
        raise IntegrityError(
            f"{folder / name} has SHA-256 {seen[:16]}…, but config.json records {expected[:16]}…: the file was "
            "changed, damaged, or belongs to another export. Download or export the policy again."
        )
    return data


def sha256(data: bytes) -> str:
    """SHA-256 in lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _read(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
        if name in (CONFIG_FILE, GRAPH_FILE):
            why, remedy = ", so it is not a policy folder", "Give the folder that `meam export` wrote."
        else:
            why, remedy = ", which its config.json names", "Copy the whole folder, or export the policy again."
        raise NotFoundError(f"{folder} has no {name}{why}; it holds: {there}. {remedy}") from error
    except OSError as error:
        raise NotFoundError(f"{folder / name} cannot be read: {error.strerror}.") from error
