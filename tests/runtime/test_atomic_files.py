import errno
import os
from pathlib import Path

import pytest

from meam_policy import atomic_files
from meam_policy.atomic_files import (
    atomic_folder,
    delete_folder,
    given_folder,
    write_atomically,
    write_failure,
    write_folder,
)
from meam_policy.errors import ConfigError, NotFoundError, OutputError


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_has_its_old_or_its_new_content(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    monkeypatch.undo()
    write_atomically(file, "new")
    assert (file.read_text(), [path.name for path in tmp_path.iterdir()]) == ("new", ["file"])


def test_a_folder_appears_when_it_is_whole(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with atomic_folder(folder) as hidden:
        (hidden / "inner").mkdir()
        (hidden / "inner" / "a").write_text("1")
        assert not folder.exists()
    assert contents(tmp_path) == {"deep/folder/inner/a": "1"}


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("1")

    def fail():
        with atomic_folder(folder, replace=True) as hidden:
            (hidden / "new").write_text("2")
            raise kind

    with pytest.raises(kind):
        fail()
    assert contents(tmp_path) == {"folder/old": "1"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_folder_replaces_another_only_where_it_is_asked_to(tmp_path):
    folder = tmp_path / "folder"
    for new, replace in (("a", False), ("b", True)):
        with atomic_folder(folder, replace=replace) as hidden:
            (hidden / new).write_text(new)
        assert contents(folder) == {new: new}
    with pytest.raises(OSError, match="not empty"), atomic_folder(folder) as hidden:
        (hidden / "c").write_text("c")
    assert contents(tmp_path) == {"folder/b": "b"}


def test_a_folder_is_on_the_disk_before_the_one_that_it_replaces_is_deleted(tmp_path, monkeypatch):
    folder, events = tmp_path / "folder", []
    folder.mkdir()
    (folder / "old").write_text("1")
    flush, rename = atomic_files.flush_to_disk, Path.rename
    monkeypatch.setattr(atomic_files, "flush_to_disk", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(f"to {to.name}"), rename(self, to)))
    with atomic_folder(folder, replace=True) as hidden:
        (hidden / "new").write_text("2")
    assert events == ["new", hidden.name, "to .folder.deleted", "to folder", tmp_path.name]


def test_an_empty_folder_is_filled_with_the_named_file_last(tmp_path, monkeypatch):
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (moved.append(self.name), rename(self, to)))
    inode = os.stat(tmp_path).st_ino
    with atomic_folder(tmp_path, last="b") as hidden:
        for name in "abc":
            (hidden / name).write_text(name)
    assert sorted(moved) == ["a", "b", "c"]
    assert moved[-1] == "b"
    assert os.stat(tmp_path).st_ino == inode  # the very folder, perhaps somebody's working directory


def test_a_folder_is_never_seen_half_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("1")
    monkeypatch.setattr("shutil.rmtree", lambda path, **kwargs: None)  # killed before the first file is gone
    delete_folder(folder)
    assert not folder.exists()


class Faults:
    """Counts what is asked of the file system, and has one of the calls fail."""

    def __init__(self, monkeypatch, kind=OSError):
        self.calls, self.fails, self.kind = 0, None, kind
        places = [(Path, "rename"), (Path, "write_bytes"), (Path, "mkdir"), (os, "fsync")]
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, call):
        def counted(*arguments, **options):
            self.calls += 1
            if self.calls - 1 == self.fails:
                raise self.kind(errno.EIO, "injected")
            return call(*arguments, **options)

        return counted

    def begin(self, fails):
        self.calls, self.fails = 0, fails


def tree(folder):
    """Everything below a folder: files with their contents, and folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


NEW = {"config.json": b"{}", "policy.onnx": b"graph", "model.safetensors": b"weights"}


def write_new(folder, replace):
    with atomic_folder(folder, replace=replace, last="config.json") as hidden:
        for name, data in NEW.items():
            (hidden / name).write_bytes(data)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["absent", "absent with its parent", "empty", "full"])
def test_whichever_call_fails_the_target_is_what_it_was_and_the_next_write_succeeds(
    tmp_path, monkeypatch, before, kind
):
    faults = Faults(monkeypatch, kind)

    def prepare(number):
        place = tmp_path / str(number)
        place.mkdir()
        folder = place / "above" / "folder" if before == "absent with its parent" else place / "folder"
        if before in ("empty", "full"):
            folder.mkdir()
        if before == "full":
            (folder / "old").write_bytes(b"old")
        return place, folder

    _, folder = prepare("whole")
    faults.begin(None)
    write_new(folder, before == "full")
    assert tree(folder) == NEW
    count = faults.calls
    assert count >= 10
    for number in range(count):
        faults.begin(None)
        place, folder = prepare(number)
        was, inode = tree(place), folder.stat().st_ino if folder.exists() else None
        faults.begin(number)
        with pytest.raises(kind, match="injected"):
            write_new(folder, before == "full")
        assert tree(place) == was, number
        assert inode == (folder.stat().st_ino if folder.exists() else None)
        faults.begin(None)
        write_new(folder, before == "full")
        assert tree(folder) == NEW


def test_a_file_that_cannot_be_put_in_place_leaves_no_other_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "file", "new")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_with_the_bytes_that_are_needed(tmp_path):
    full = write_failure(OSError(errno.ENOSPC, "No space left on device"), tmp_path / "a" / "b", 12_345)
    assert full.startswith("No space left on device: 12345 bytes are needed, and ")
    assert full.endswith(" are free")
    repeated = write_failure(ValueError("I/O error: No space left on device (os error 28)"), tmp_path, 5)
    assert repeated.startswith("No space left on device: 5 bytes are needed, and ")
    assert write_failure(OSError(errno.EACCES, "Permission denied"), tmp_path, 1) == "Permission denied"


def test_a_folder_of_files_is_checked_before_it_is_there(tmp_path):
    def refuse(hidden):
        assert contents(hidden) == {"a": "1"}
        raise NotFoundError("b is missing")

    with pytest.raises(NotFoundError, match="b is missing"):
        write_folder(tmp_path / "new", {"a": b"1"}, "The folder cannot be written", check=refuse)
    assert not list(tmp_path.iterdir())
    write_folder(tmp_path / "new", {"a": b"1"}, "The folder cannot be written")
    assert contents(tmp_path / "new") == {"a": "1"}


def test_a_folder_that_does_not_fit_says_how_many_bytes_it_needs(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(OutputError, match=r"^The folder cannot be written: No space left on device: 7 bytes are need"):
        write_folder(tmp_path / "new", {"a": b"123", "b": b"1234"}, "The folder cannot be written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["", "  ", None, 3])
def test_what_is_no_path_is_refused_by_its_argument(folder):
    with pytest.raises(ConfigError, match=f"output_dir is {folder!r}; expected the path of a folder"):
        given_folder("output_dir", folder)


def test_a_given_folder_is_a_path_with_the_home_folder_filled_in():
    assert given_folder("output_dir", "~/runs") == Path.home() / "runs"
    assert given_folder("output_dir", Path("runs")) == Path("runs")
