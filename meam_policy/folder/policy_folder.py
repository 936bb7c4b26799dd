"""The policy folder: where it is, and whether its files have the hashes that its `config.json` records."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from meam_policy.atomic_files import write_folder
from meam_policy.errors import ConfigError, FormatError, IntegrityError, NotFoundError, OutputError
from meam_policy.folder.hub_names import REPO_ID, is_ref_name
from meam_policy.folder.safetensors_reader import check_arrays
from meam_policy.given_files import NotRegularError, given_path, open_regular
from meam_policy.graph.graph_check import MAX_BYTES
from meam_policy.robot import RobotContract
from meam_policy.robot.contract_file import CONTRACT_FILE, parse_contract
from meam_policy.spec import GRAPH_FILE, PolicySpec, VariantSpec
from meam_policy.spec.json_reader import MAX_CONFIG_BYTES, parse_object
from meam_policy.spec.sound_numbers import require_sound_numbers

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "CONTRACT_FILE",
    "GRAPH_FILE",
    "LADDER_FILE",
    "MODEL_FILE",
    "OPTIONAL_FILES",
    "POLICY_FILES",
    "Config",
    "FoundPolicy",
    "check_output_folder",
    "checked_subfolder",
    "find_policy",
    "locate_policy",
    "read_config",
    "read_contract",
    "read_graph",
    "read_policy_files",
    "read_spec",
    "sha256",
    "verify_files",
    "write_policy_files",
]

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
"""The model card."""
MODEL_FILE = "model.safetensors"
LADDER_FILE = "ladder.png"
"""The figure of the variants."""
POLICY_FILES = (CONFIG_FILE, GRAPH_FILE, MODEL_FILE, "golden.safetensors", CARD_FILE, LADDER_FILE, CONTRACT_FILE)
"""Every file of a policy folder but the graphs of its variants, which `config.json` names."""

OPTIONAL_FILES = (LADDER_FILE, CONTRACT_FILE)
"""Those that a complete policy folder need not have."""

_UNHASHED = (CONFIG_FILE, CARD_FILE, LADDER_FILE)
"""Files whose hashes `config.json` cannot or does not record: itself, and what people may edit."""

_MAX_BYTES = {CONFIG_FILE: MAX_CONFIG_BYTES, CONTRACT_FILE: MAX_CONFIG_BYTES, CARD_FILE: 2**24, LADDER_FILE: 2**26}
"""Of the others as of a graph."""

_log = logging.getLogger(__name__)


class FoundPolicy(NamedTuple):
    """Where a policy is.

    Attributes:
        folder: Its folder, which exists.
        commit: The commit on the Hub that the folder is of; None for a folder on this machine.
    """

    folder: Path
    commit: str | None


def locate_policy(path_or_repo_id: str | os.PathLike[str], **options: Any) -> Path:
    """Find a policy folder on this machine, as `find_policy` does, with the same arguments and errors."""
    return find_policy(path_or_repo_id, **options).folder


def find_policy(
    path_or_repo_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    variants: Collection[str] | None = (),
    complete: bool = False,
) -> FoundPolicy:
    """Find a policy folder on this machine, downloading it from the Hugging Face Hub if needed.

    An existing folder always wins. Otherwise text of the form "owner/name" is a repo id, unless a folder "owner"
    exists here; everything else is a path. Where a name could be either, which it was is logged once. The remaining
    arguments are those of `huggingface_hub.hf_hub_download`, but for `variants`: names of those whose graphs are needed
    too, or None for all of them; and `complete`: whether every file is needed that `config.json` names.

    Returns:
        The folder, whose contents are not checked yet, and its commit.

    Raises:
        NotFoundError: a path that is empty, not a folder or that of a training run, or a repository without a policy.
        HubError: the Hub could not deliver the policy.
        ConfigError: it is no text and no path, or a path that no file system can hold; git does not allow the revision,
            or one is given for a folder on this machine; or the subfolder is no relative path.
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
    if revision is not None and not is_ref_name(revision):
        raise ConfigError(
            f"The revision is {revision!r}, a name that git does not allow; expected a branch, tag or commit on the "
            "Hub. Without one it is main."
        )
    subfolder = checked_subfolder(subfolder)
    root = given_path("The policy", path_or_repo_id)
    path = root / (subfolder or "")
    _refuse_training(path)
    text = path_or_repo_id if isinstance(path_or_repo_id, str) else ""
    either = REPO_ID.fullmatch(text) is not None and root.parent.name not in ("", ".", "..")
    if root.is_dir() and path.is_dir():
        if revision is not None:
            raise ConfigError(
                f'revision is "{revision}", but {path} is a folder on this machine, which has none; leave it out, or '
                "give a Hub repo id owner/name."
            )
        if either:
            _log_once(f"{text} is the folder {root.absolute()} on this machine, not the Hub's repository of that name.")
        return FoundPolicy(path, None)
    if root.is_dir() or not either or root.parent.is_dir():
        seen = "is a file, not a folder" if path.exists() else "does not exist"
        raise NotFoundError(
            f"The policy folder {path} {seen}. Give the folder that `meam export` wrote, or a Hub repo id owner/name."
        )
    from meam_policy.folder.hub import download_policy

    get = partial(download_policy, text, subfolder=subfolder, token=token, cache_dir=cache_dir)
    get = partial(get, local_files_only=local_files_only, force_download=force_download)
    found = FoundPolicy(*get((CONFIG_FILE, GRAPH_FILE), POLICY_FILES[2:], revision=revision))
    _log_once(f"{text} is the repository on the Hub, at commit {found.commit}; there is no such folder here.")
    if variants is None or variants or complete:
        spec = read_spec(found.folder)
        files = {spec.select(name)[1] for name in (spec.variants if variants is None else variants)}
        files |= set(spec.files if complete else ())
        required = (CONFIG_FILE, GRAPH_FILE, *sorted(files - {GRAPH_FILE}))
        try:  # of the very commit that config.json came from
            get(required, (), revision=found.commit)
        except NotFoundError as error:
            raise NotFoundError(
                f"{text} at commit {found.commit} lacks one of the files that its config.json names: "
                f"{', '.join(required[2:])}. Upload the whole policy folder again."
            ) from error
    return found


def checked_subfolder(subfolder: str | None, name: str = "subfolder") -> str | None:
    """The path of a folder within a repository, or within a folder of policies.

    Args:
        subfolder: The path.
        name: What the message calls it.

    Raises:
        ConfigError: it is no text, no plain relative path with forward slashes, or one that no file system can hold.
    """
    if subfolder is None:
        return None
    parts = subfolder.split("/") if isinstance(subfolder, str) else [""]
    if not all(re.fullmatch(r"(?![\s.])[^\\:\x00-\x1f\x7f\ud800-\udfff]+", part) for part in parts):
        raise ConfigError(
            f'{name} is {subfolder!r}; expected the path of a folder in the repository, e.g. "ant" or "mazes/ant".'
        )
    given_path(name, subfolder)
    return subfolder


@cache
def _log_once(message: str) -> None:
    _log.info(message)


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
        FormatError: it is no regular file, does not have the expected format, or a number in it is none that a machine
            may be moved by.
    """
    return read_config(folder).spec


class Config(NamedTuple):
    """A `config.json`.

    Attributes:
        spec: What it says.
        data: The object in it.
        text: The file.
    """

    spec: PolicySpec
    data: dict[str, Any]
    text: bytes

    @property
    def sha256(self) -> str:
        """Its hash, which says what export it is of: it has the hashes of all that acts."""
        return sha256(self.text)

    def graph_identity(self, variant: str | None) -> str:
        """What the graph of a variant, or of the policy, must carry as `spec_sha256`."""
        return self.spec.select(variant)[0].identity_in(self.data)

    def declared(self, variant: str | None) -> VariantSpec | None:
        """What it says of the graph of a variant; None for the policy's own, of which it says nothing more."""
        return None if variant is None else self.spec.variants[variant]


def read_config(folder: Path) -> Config:
    """Read the folder's `config.json`, with the same errors as `read_spec`."""
    text = _read(folder, CONFIG_FILE)
    data = parse_object(text)
    spec = PolicySpec.from_object(data)
    require_sound_numbers(spec)
    return Config(spec, data, text)


def read_graph(folder: Path, spec: PolicySpec, file: str = GRAPH_FILE) -> bytes:
    """Read one of the folder's graphs, or another of its binary files, and check its hash.

    Raises:
        NotFoundError: there is none.
        FormatError: it is no regular file.
        IntegrityError: its hash is not the one that `config.json` records.
    """
    return _read_checked(folder, file, spec.files.get(file))


def read_contract(folder: Path, spec: PolicySpec) -> RobotContract | None:
    """Read the folder's `robot.json`, if `config.json` names one, and check its hash and that it fits the policy.

    Raises:
        NotFoundError: it is named, and missing.
        IntegrityError: its hash is not the one that `config.json` records, or it is there and not recorded.
        FormatError: it does not have the expected format, or does not fit the policy.
    """
    if CONTRACT_FILE in spec.files or (folder / CONTRACT_FILE).exists():
        return parse_contract(_read_checked(folder, CONTRACT_FILE, spec.files.get(CONTRACT_FILE)), spec)
    return None


def verify_files(folder: Path, spec: PolicySpec) -> tuple[str, ...]:
    """Check the hash of every file that exists and has one recorded in `config.json`, and the header of the weights.

    Returns:
        The missing files, of those that a complete policy folder has or `config.json` names. Only `policy.onnx` is
        needed to act.

    Raises:
        IntegrityError: the hash of a file is not the one that `config.json` records.
        FormatError: the weights are no safetensors file of float32 arrays, or the robot's contract is none.
    """
    names = dict.fromkeys((*POLICY_FILES, *spec.files))
    missing = tuple(
        name for name in names if not (folder / name).exists() and (name in spec.files or name not in OPTIONAL_FILES)
    )
    for name, expected in spec.files.items():
        if name not in missing:
            data = _read_checked(folder, name, expected)
            if name == MODEL_FILE:
                check_arrays(data, name, empty=True)
            if name == CONTRACT_FILE:
                parse_contract(data, spec)
    return missing


def read_policy_files(folder: Path, *, weights: bool = True) -> dict[str, bytes]:
    """Read the files that make up a policy, by name, and nothing else that lies in its folder.

    Args:
        folder: The policy folder.
        weights: Whether the networks' weights must be there, which only whoever trains on needs.

    Raises:
        NotFoundError: there is no policy, or a file is missing that `config.json` names.
        IntegrityError: the hash of a file is not the one that `config.json` records.
        FormatError: `config.json` is broken or names a file that no policy has, a file is a link to elsewhere or no
            regular file, or the model card is not UTF-8 text.
    """
    _refuse_link(folder / CONFIG_FILE)
    config = read_config(folder)
    spec = config.spec
    graphs = {variant.file for variant in spec.variants.values() if variant.file.endswith(".onnx")}
    foreign = sorted(set(spec.files) - graphs - set(POLICY_FILES) | set(spec.files) & {CONFIG_FILE})
    if foreign:
        raise FormatError(
            f"{folder / CONFIG_FILE} names {', '.join(foreign)} among its files; expected "
            f"{', '.join(POLICY_FILES[1:])} and the graphs of its variants (.onnx). Export the policy again."
        )
    files = {CONFIG_FILE: config.text}
    for name in dict.fromkeys((GRAPH_FILE, *spec.files)):
        _refuse_link(folder / name)
        if weights or name != MODEL_FILE or (folder / name).exists():
            files[name] = _read_checked(folder, name, spec.files.get(name))
    for name in _UNHASHED[1:]:
        _refuse_link(folder / name)
        if name not in files and (folder / name).exists():
            files[name] = _read(folder, name)
    _require_text(folder / CARD_FILE, files.get(CARD_FILE, b""))
    return files


def _require_text(path: Path, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not UTF-8 text (byte {error.start}); expected a model card that others can read. Save it as "
            "UTF-8, or write it anew with `meam card`."
        ) from error


def _refuse_link(path: Path) -> None:
    if not path.is_symlink():
        return
    try:
        storage = path.resolve().parent
    except (OSError, RuntimeError):  # links in a circle; the error depends on the version of Python
        storage = Path()
    # The Hub's cache is made of links to where it keeps the contents.
    if storage.name != "blobs" or storage.parent not in path.parent.resolve().parents:
        raise FormatError(
            f"{path} is a symbolic link to {os.readlink(path)}; expected a file. Put a copy in its place."
        )


def check_output_folder(folder: Path) -> None:
    """Refuse an output folder that is not empty.

    Raises:
        OutputError: the path exists and is not an empty folder.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        what = "a policy" if (folder / CONFIG_FILE).is_file() else "something"
        raise OutputError(f"{folder} already holds {what}. Choose another output folder, or delete it first.")


def write_policy_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a policy folder; `config.json` appears last, since it makes the folder a policy.

    Raises:
        OutputError: the path exists and is not an empty folder, or cannot be written.
    """
    check_output_folder(folder)
    write_folder(folder, files, f"The policy folder {folder} cannot be written", last=CONFIG_FILE)


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
    most = _MAX_BYTES.get(name, MAX_BYTES)
    try:
        with open_regular(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise FormatError(
                    f"{folder / name} has {size} bytes; expected at most {most}. Download or export the policy again."
                )
            return file.read(size + 1)  # no more, whatever becomes of the file meanwhile
    except FileNotFoundError as error:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:20]) or "nothing"
        if name in (CONFIG_FILE, GRAPH_FILE):
            why, remedy = ", so it is not a policy folder", "Give the folder that `meam export` wrote."
        else:
            why, remedy = ", which its config.json names", "Copy the whole folder, or export the policy again."
        raise NotFoundError(f"{folder} has no {name}{why}; it holds: {there}. {remedy}") from error
    except NotRegularError as error:
        raise FormatError(
            f"{folder / name} cannot be read: {error.strerror}. Download or export the policy again."
        ) from error
    except OSError as error:
        raise NotFoundError(f"{folder / name} cannot be read: {error.strerror}.") from error
