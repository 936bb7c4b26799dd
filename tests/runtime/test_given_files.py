import os
import socket
from pathlib import Path

import pytest

from meam_policy import ConfigError, given_files
from meam_policy.given_files import NotRegularError, given_path, open_regular, read_regular

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="Windows has no such files"),
    pytest.mark.usefixtures("no_waiting"),
]


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


def make_device(path):
    path.symlink_to("/dev/zero")


SPECIAL = [(make_pipe, "named pipe"), (make_socket, "socket"), (make_device, "device")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    return Path("file")


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
def test_what_is_no_regular_file_is_refused_by_its_kind(place, make, kind):
    make(place)
    with pytest.raises(NotRegularError) as caught:
        read_regular(place)
    assert caught.value.strerror == f"it is a {kind}, not a regular file"
    assert caught.value.filename == "file"


def test_a_pipe_that_takes_a_files_place_before_it_is_opened_is_not_waited_for(place, monkeypatch):
    make_pipe(place)
    monkeypatch.setattr(given_files, "require_regular", lambda path: None)
    with pytest.raises(NotRegularError, match="named pipe"):
        open_regular(place)


def test_a_file_is_read_and_so_is_one_behind_a_link(place):
    place.write_bytes(b"contents")
    Path("link").symlink_to(place)
    assert read_regular(place) == read_regular(Path("link")) == b"contents"


def test_a_folder_and_a_missing_file_are_refused_as_the_system_does(place):
    with pytest.raises(FileNotFoundError):
        read_regular(place)
    place.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        read_regular(place)
    assert caught.value.strerror == "Is a directory"


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("a" * 256, "a part of 256 bytes"),
        ("folder/" + "ä" * 128, "a part of 256 bytes"),
        ("/".join(["a" * 200] * 20), "4019 bytes"),
        ("a\0b", "a NUL character"),
        ("a\ud800b", "an unpaired surrogate, which is no character"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_no_file_system_holds_is_refused_and_shown_in_print(path, fault, kind):
    with pytest.raises(ConfigError) as caught:
        given_path("output_dir", kind(path))
    message = str(caught.value)
    assert message.startswith("output_dir is 'a") or message.startswith("output_dir is 'folder/")
    assert f"a path with {fault}; expected one that a file system can hold: at most 255 bytes" in message
    assert message.replace("…", "").isprintable()
    assert len(message) < 300


def test_a_path_of_the_greatest_length_is_taken_and_so_is_a_name_that_is_not_utf_8():
    assert given_path("folder", "a" * 255) == Path("a" * 255)
    assert given_path("folder", os.fsdecode(b"caf\xe9")) == Path(os.fsdecode(b"caf\xe9"))


def test_the_home_folder_is_expanded_and_that_of_nobody_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/robot")
    assert given_path("folder", "~/policies") == Path("/home/robot/policies")
    with pytest.raises(ConfigError, match="'~nobody-of-this-name/policies', and no home folder is known"):
        given_path("folder", "~nobody-of-this-name/policies")
