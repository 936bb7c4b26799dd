"""Downloading a policy folder from the Hugging Face Hub. Imported where that is done: its client takes a while."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from meam_policy.errors import HubError, MeamError, NotFoundError
from meam_policy.folder.hub_names import COMMIT
from meam_policy.folder.hub_token import token_to_send
from meam_policy.folder.patience import within
from meam_policy.given_files import given_path, read_regular

__all__ = ["Snapshot", "answer_status", "download_policy", "git_hash"]

METADATA_TIMEOUT_S = 10.0
"""Longest silence of the Hub before it begins to send a file, seconds."""

ANSWER_DEADLINE_S = 30.0
"""Time within which the Hub must have answered the first question, however slowly."""

FILE_DEADLINE_SILENCES = 12
"""Time within which a file must have arrived, in units of HF_HUB_DOWNLOAD_TIMEOUT, the client's own longest silence."""


class Snapshot(NamedTuple):
    """Files of one commit in the Hub cache."""

    folder: Path
    commit: str

    @classmethod
    def around(cls, file: Path, subfolder: str | None) -> Snapshot:
        """The snapshot that holds a file, which is in a subfolder of the repository."""
        depth = len(subfolder.split("/")) if subfolder else 0
        return cls(file.parent, file.parents[depth].name)


def download_policy(
    repo_id: str,
    required: Sequence[str],
    optional: Sequence[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    force_download: bool,
    subfolder: str | None = None,
) -> Snapshot:
    """Download the named files of a model repository into the Hub cache.

    The cache is used without a request if the revision is a full commit hash, or if requests are forbidden by
    `local_files_only` or the environment variable HF_HUB_OFFLINE. Otherwise the branch or tag is looked up on the Hub;
    if that fails, or takes too long, its last cached commit is used, with a warning that names the commit. It is
    forgotten only once all files of another one are there.

    A cached file that is not what its name in the cache says was damaged on the way or on the disk. It is downloaded
    again, unless requests are forbidden.

    Args:
        repo_id: "owner/name".
        required: Files without which there is no policy; the first decides which commit the others come from.
        optional: Files that are downloaded if the repository has them.
        revision: Branch, tag or commit; None is the default branch.
        token: As in `huggingface_hub.hf_hub_download`, like the remaining arguments.
        cache_dir: Cache folder.
        local_files_only: Make no request.
        force_download: Download again.
        subfolder: Folder of the repository in which the files are; None is its root.

    Returns:
        The folder in the cache that holds every required file, and the commit that it is of.

    Raises:
        NotFoundError: the repository has no policy.
        HubError: with `kind` "access" (missing, private or gated repository, unknown revision, a token that cannot be
            sent), "offline", "timeout", "incomplete" (a download was interrupted, and cannot be completed now) or
            "server".
    """
    cache = None if cache_dir is None else given_path("cache_dir", cache_dir)
    cached_files = partial(_cached, repo_id, required, revision, cache, subfolder)
    download = partial(
        huggingface_hub.hf_hub_download,
        repo_id,
        subfolder=subfolder,
        token=token,
        cache_dir=cache,
        etag_timeout=METADATA_TIMEOUT_S,
    )

    def get(name: str, revision: str | None, force: bool = force_download) -> Path:
        seconds = FILE_DEADLINE_SILENCES * hub_constants.HF_HUB_DOWNLOAD_TIMEOUT
        return Path(within(seconds, lambda: download(name, revision=revision, force_download=force)))

    try:
        cached = cached_files()
        complete = len(cached) == len(required)
        if complete and (local_files_only or (not force_download and _need_no_request(revision, cached))):
            return Snapshot.around(cached[0], subfolder)
        if local_files_only:
            raise hub_errors.OfflineModeIsEnabled("local_files_only=True")
        if token is not None or not hub_constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
            token_to_send(token)
        # hf_hub_download goes on trying for minutes; this asks once.
        url = huggingface_hub.hf_hub_url(repo_id, required[0], subfolder=subfolder, revision=revision)
        ask = partial(huggingface_hub.get_hf_file_metadata, url, token=token, timeout=METADATA_TIMEOUT_S)
        newest = within(ANSWER_DEADLINE_S, ask).commit_hash
        # The client forgets the last commit of a branch as soon as it has one file of another.
        found = Snapshot.around(get(required[0], newest if complete and newest else revision), subfolder)
        for name in required[1:]:
            get(name, found.commit)
        for name in optional:
            try:
                get(name, found.commit)
            except hub_errors.LocalEntryNotFoundError:
                raise
            except hub_errors.EntryNotFoundError:
                continue
        for name in (*required, *optional):
            if _is_damaged(found.folder / name):
                get(name, found.commit, force=True)
        if complete and found.commit != Snapshot.around(cached[0], subfolder).commit:
            get(required[0], revision, force=False)  # remembers the commit
        return found
    except MeamError:
        raise
    except Exception as error:  # HTTP errors, whose base class the Hub client has changed twice
        problem = _explain(error, repo_id, revision, subfolder)
        if not isinstance(problem, HubError) or problem.kind == "access" or force_download:
            raise problem from error
        cached = cached_files()
        if len(cached) == len(required):
            kept = Snapshot.around(cached[0], subfolder)
            failure = f"The Hub cannot be reached for {repo_id}." if problem.kind == "offline" else problem
            warnings.warn(f"{failure} Using commit {kept.commit} from the cache.", stacklevel=2)
            return kept
        if cached and problem.kind == "offline":
            missing = ", ".join(name for name in required if name not in {path.name for path in cached})
            raise HubError(
                f"{repo_id} is only partly in the local cache: {missing} is missing, of an interrupted download or a "
                "variant that was never loaded, and the Hub cannot be asked. Try again with a network.",
                "incomplete",
            ) from error
        raise problem from error


def _need_no_request(revision: str | None, cached: Sequence[Path]) -> bool:
    """Whether cached files are those of the revision whatever the Hub says, or the Hub may not be asked."""
    if hub_constants.HF_HUB_OFFLINE:
        return True
    return COMMIT.fullmatch(revision or "") is not None and not any(map(_is_damaged, cached))


def _is_damaged(file: Path) -> bool:
    """Whether a file of the cache is not what it is called there: the contents' SHA-256, or git's SHA-1 of them."""
    if not file.is_symlink() or not file.is_file():
        return False
    name, data = file.resolve().name, read_regular(file)
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return hashlib.sha256(data).hexdigest() != name
    return COMMIT.fullmatch(name) is not None and git_hash(data) != name


def git_hash(data: bytes) -> str:
    """SHA-1 by which git knows a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _cached(
    repo_id: str, names: Sequence[str], revision: str | None, cache: Path | None, subfolder: str | None
) -> list[Path]:
    places = (f"{subfolder}/{name}" if subfolder else name for name in names)
    found = (huggingface_hub.try_to_load_from_cache(repo_id, place, cache, revision) for place in places)
    return [Path(path) for path in found if isinstance(path, str)]


def answer_status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error is about; None without one."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(error: Exception, repo_id: str, revision: str | None, subfolder: str | None) -> MeamError:
    where = repo_id + (f" at revision {revision}" if revision else "")
    # hf_hub_download reports "not in the cache either" and keeps why it could not ask as the cause.
    cause = error.__cause__
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        error = cause
    name = type(error).__name__
    status = answer_status(error)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return HubError(f"{repo_id} on the Hub has no revision {revision!r}. Check the name.", "access")
    if isinstance(error, hub_errors.GatedRepoError):
        page = f"{hub_constants.ENDPOINT}/{repo_id}"
        return HubError(f"{repo_id} is gated: ask for access at {page}, then pass token=.", "access")
    if isinstance(error, hub_errors.HFValidationError):
        return HubError(f"{repo_id!r} is neither a folder here nor a valid Hub repo id owner/name.", "access")
    if isinstance(error, hub_errors.RepositoryNotFoundError) or status in (401, 403):
        return HubError(
            f"{repo_id} is neither a folder here nor a repository on the Hub that this token may read "
            "(missing, private, or the token lacks access). Check the name, or pass token=.",
            "access",
        )
    if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(error, hub_errors.LocalEntryNotFoundError):
        place = f"The folder {subfolder} of {where}" if subfolder else where
        remedy = "Check subfolder." if subfolder else "If its policies are in folders, name one by subfolder."
        return NotFoundError(f"{place} on the Hub is not a policy: it lacks config.json or policy.onnx. {remedy}")
    if status is not None:
        return HubError(f"The Hub answered {status} for {where}. Try again later.", "server")
    if "Timeout" in name:
        seconds = FILE_DEADLINE_SILENCES * hub_constants.HF_HUB_DOWNLOAD_TIMEOUT
        return HubError(
            f"The Hub did not answer in time for {where}: within {ANSWER_DEADLINE_S:g} s, then {seconds:g} s for each "
            "file. Check the network, and try again; for a slow one raise HF_HUB_DOWNLOAD_TIMEOUT in the environment.",
            "timeout",
        )
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        setting = "local_files_only=True" if "local_files_only" in str(error) else "HF_HUB_OFFLINE in the environment"
        return HubError(
            f"{where} is not a folder here and not in the local cache, and {setting} forbids to ask the Hub. "
            "Check the path, allow the request, or download it beforehand.",
            "offline",
        )
    if isinstance(error, hub_errors.LocalEntryNotFoundError) or "Connect" in name:
        return HubError(
            f"{where} is not a folder here, is not in the local cache, and the Hub cannot be reached. "
            "Check the path or the network, or download it beforehand.",
            "offline",
        )
    return HubError(f"Downloading {where} failed: {name}. Try again.", "server")
