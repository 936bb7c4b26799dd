"""TOML files that people write: sweeps and robots' contracts."""

from __future__ import annotations

import os
import sys
from typing import Any

from meam_policy.errors import ConfigError, NotFoundError
from meam_policy.given_files import given_path, open_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

__all__ = ["read_toml"]

MAX_BYTES = 2**22


def read_toml(path: str | os.PathLike[str], kind: str, remedy: str = "") -> dict[str, Any]:
    """Read a TOML file.

    Args:
        path: The file.
        kind: What it is, for messages: "sweep file".
        remedy: Where one comes from, for the message that there is none.

    Raises:
        NotFoundError: there is no such file, or it cannot be read.
        ConfigError: it is not TOML, or of more than 4 MiB, or no file system has such a path.
    """
    path = given_path(kind, path)
    try:
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; expected a {kind}.")
        return tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"There is no {kind} {path}{remedy and f': {remedy}'}.") from error
    except OSError as error:
        raise NotFoundError(f"The {kind} {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
