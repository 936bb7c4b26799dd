"""Downloading a policy folder from the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from meam_policy.errors import HubError

__all__ = ["download_policy"]

METADATA_TIMEOUT_S = 10.0


def download_policy(
    repo_id: str,
    files: Sequence[str],
    *,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    force_download: bool,
) -> Path:
    """Download the named files of a model repository into the Hub cache.

    Returns:
        The snapshot folder in the cache.

    Raises:
        HubError: with `kind` "access" (missing, private or gated repository, unknown revision), "offline",
            "timeout", "incomplete" or "server".
    """
    where = f"{repo_id}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=list(files),
                etag_timeout=METADATA_TIMEOUT_S,
            )
        )
    except hub_errors.RevisionNotFoundError as error:
        raise HubError(f"{repo_id} on the Hub has no revision {revision!r}. Check the name.", "access") from error
    except hub_errors.GatedRepoError as error:
        raise HubError(f"{repo_id} is gated: ask for access on its Hub page, then pass token=.", "access") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is neither a folder here nor a repository on the Hub that this token may read "
            "(missing, private, or the token lacks access). Check the name, or pass token=.",
            "access",
        ) from error
    except hub_errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is neither a folder here nor a valid Hub repo id owner/name.", "access") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{where} is not a folder here, is not in the local cache, and the Hub cannot be reached. "
            "Check the path or the network, or download it beforehand.",
            "offline",
        ) from error
    except hub_errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise HubError(f"The Hub answered {status} for {where}. Try again later.", "server") from error
    except (OSError, ValueError) as error:
        # httpx errors derive from neither; its transport errors reach us as LocalEntryNotFoundError.
        raise HubError(f"Downloading {where} failed: {type(error).__name__}. Try again.", "server") from error
