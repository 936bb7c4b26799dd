"""The Minari id and the folder of a recorded data set."""

from __future__ import annotations

import os
from pathlib import Path

from meam_policy.atomic_files import given_folder
from meam_policy.errors import ConfigError, OutputError
from meam_policy.extras import needs
from meam_policy.given_files import given_path
from meam_training.data.minari_files import minari_root

__all__ = ["default_dataset_id", "new_dataset_folder"]


def default_dataset_id(environment_id: str) -> str:
    """Default Minari id for recordings of an environment; "meam/Pockets-v0" gives "meam/pockets-v0"."""
    stem, _, version = environment_id.rpartition("-v")
    namespace, _, name = stem.partition("/") if "/" in stem else stem.partition("-")
    return f"{namespace}/{name or 'demonstrations'}-v{version}".lower()


def new_dataset_folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    """Folder of a data set to be recorded; checks in advance that it can be written.

    Args:
        name: Minari id.
        root: Folder of the Minari data sets; None takes Minari's own.

    Raises:
        ConfigError: the name is not a Minari id, or the root is empty.
        OutputError: the data set already exists, or the root is not writable.
        MissingExtraError: minari is not installed.
    """
    with needs("Recording", "minari", "train"):
        from minari.dataset.minari_dataset import DATASET_ID_RE
    match = DATASET_ID_RE.fullmatch(name)
    if match is None or match["version"] is None:
        raise ConfigError(
            f'"{name}" is not a Minari id; expected one such as "namespace/name-v0", with a version, and a '
            "namespace of two characters or more, or none."
        )
    given_path("The data set", name)
    base = (minari_root() if root is None else given_folder("root", root)).absolute()
    if (base / name).exists():
        raise OutputError(f"The data set {base / name} exists already. Delete it, or choose another id or folder.")
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {base} cannot be created: {error.strerror}. Choose another one.") from error
    if not os.access(base, os.W_OK):
        raise OutputError(f"The folder {base} is not writable. Choose another one.")
    return base / name
