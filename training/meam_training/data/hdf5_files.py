"""HDF5 files from elsewhere, checked before they are read."""

from __future__ import annotations

from pathlib import Path

import h5py

from meam_policy.errors import DatasetError

__all__ = ["MAX_COMPRESSION", "check_hdf5"]

MAX_COMPRESSION = 1100
"""Largest compression ratio accepted; deflate, the strongest of the common filters, reaches 1032."""


def check_hdf5(file: Path) -> None:
    """Refuse an HDF5 file that refers to other files, or claims far more than it stores.

    Raises:
        DatasetError: it does, or it is not an HDF5 file.
    """
    try:
        with h5py.File(file, "r") as opened:
            # Groups may contain themselves, or each other many times over, so each is visited once. The stack holds
            # names, because open groups take memory.
            pending = ["/"]
            visited = set()
            while pending:
                group = opened[pending.pop()]
                assert isinstance(group, h5py.Group)
                address = h5py.h5o.get_info(group.id).addr  # pyright: ignore[reportAttributeAccessIssue]
                if address not in visited:
                    visited.add(address)
                    pending += _subgroups(group, file)
    except DatasetError:
        raise
    except Exception as error:  # h5py raises many kinds of errors for a broken file
        raise DatasetError(f"{file} is not an HDF5 file: {error!r}.") from error


def _subgroups(group: h5py.Group, file: Path) -> list[str]:
    """Names of the groups in a group, after checking that nothing in it refers to other files or links."""
    groups = []
    for name in group:
        path = f"{group.name.rstrip('/')}/{name}"  # pyright: ignore[reportOptionalMemberAccess]
        where = f"{file}: {path}"
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise DatasetError(f"{where} is a link to elsewhere, so it is refused. Record the data into the file.")
        item = group[name]
        if isinstance(item, h5py.Group):
            groups.append(path)
        elif isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            raise DatasetError(f"{where} is stored in another file, so it is refused. Record the data into the file.")
        elif isinstance(item, h5py.Dataset) and item.nbytes > MAX_COMPRESSION * item.id.get_storage_size():
            raise DatasetError(
                f"{where} claims {item.nbytes} bytes and stores {item.id.get_storage_size()}, so it is refused: it "
                "would fill the memory with nothing. Record the data again."
            )
    return groups
