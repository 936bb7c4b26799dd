import ast
import io
import json
import os
import pickle
import subprocess
import sys
import traceback
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from meam_policy import ConfigError, cli, errors
from meam_policy.console import print_json, print_lines, print_mapping, print_table, progress_bar, say, say_mapping
from meam_policy.terminal_text import printable

ANY_TEXT = st.text(st.characters(codec=None))
HOSTILE = "a\x1b[2Jb\nc\rd\udcffe\u202ef\x9bg\x07"
SHOWN = r"a\x1b[2Jb\nc\rd\udcffe\u202ef\x9bg\x07"


@given(ANY_TEXT)
def test_whatever_the_text_it_is_one_line_of_visible_characters_that_can_be_encoded(text):
    shown = printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    if "\\" not in text:  # and none of it is lost
        assert ast.literal_eval("'" + shown.replace("'", r"\'") + "'") == text


@given(st.text(st.characters(exclude_categories=("C", "Z")) | st.just(" ")))
def test_visible_text_stays_as_it_is(text):
    assert printable(text) == text


def visible_lines(output):
    return all(line.isprintable() for line in output.split("\n"))


PRINTERS = {
    "say": lambda text: say(text),
    "say_mapping": lambda text: say_mapping({text: text}),
    "print_lines": lambda text: print_lines(text),
    "print_mapping": lambda text: print_mapping(text, {text: text}),
    "print_table": lambda text: print_table(text, ["name", "value"], [[text, 1.5]]),
    "print_json": lambda text: print_json({text: text}),
}


@pytest.mark.parametrize("printer", PRINTERS)
def test_no_control_character_is_printed_raw(capsys, monkeypatch, printer):
    monkeypatch.setenv("COLUMNS", "200")
    PRINTERS[printer](HOSTILE)
    output = "".join(capsys.readouterr())
    assert visible_lines(output)
    shown = json.dumps(HOSTILE)[1:-1] if printer == "print_json" else SHOWN
    assert output.count(shown) == {"say_mapping": 2, "print_mapping": 3, "print_table": 2, "print_json": 2}.get(
        printer, 1
    )


@pytest.mark.parametrize("printer", PRINTERS)
@given(text=ANY_TEXT)
def test_whatever_is_printed_can_be_encoded(printer, text):
    with pytest.MonkeyPatch.context() as patch:
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2)]
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        PRINTERS[printer](text)
        for stream in streams:
            stream.flush()
            assert visible_lines(stream.buffer.getvalue().decode())


def test_a_progress_bar_shows_its_description_and_note_escaped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr("meam_policy.console.Console", lambda **_: terminal)
    with progress_bar(f"Episodes in [bold]{HOSTILE}", 2) as advance:
        advance(1, HOSTILE)
    assert f"Episodes in [bold]{SHOWN}" in drawn.getvalue()
    assert "\x1b[2Jb" not in drawn.getvalue()
    assert "\x07" not in drawn.getvalue()


@pytest.mark.parametrize("error", [ConfigError(HOSTILE), OSError(5, HOSTILE, HOSTILE)])
def test_an_error_is_one_line_whatever_it_names(capsys, monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert cli.run(["eval"]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert visible_lines(output)
    assert SHOWN in output


def test_a_warning_is_one_line_whatever_it_names(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", cli._say_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = cli._say_warning
        warnings.warn(HOSTILE, UserWarning, stacklevel=1)
    assert capsys.readouterr().err == f"Warning: {SHOWN}\n"


@pytest.mark.parametrize("name", errors.__all__)
def test_the_message_of_an_error_is_printable_wherever_it_is_shown(name):
    kind = getattr(errors, name)
    error = kind(HOSTILE, "access") if name == "HubError" else kind(HOSTILE)
    again = pickle.loads(pickle.dumps(error))
    for each in (error, again, kind(str(error), "access") if name == "HubError" else kind(str(error))):
        assert str(each) == SHOWN
        assert f"{each}" == SHOWN
        assert traceback.format_exception_only(each)[-1].endswith(f"{SHOWN}\n")


def test_a_message_without_control_characters_stays_as_it_is():
    for text in ("wie über 2 → 3 …", r"C:\new\table", "[bold]"):
        assert str(ConfigError(text)) == text


@pytest.mark.parametrize("command", ["eval", "info", "verify", "push"])
def test_commands_name_a_policy_with_control_characters_without_printing_them(tmp_path, command):
    name = "no\x1b[31mwhere\ud83d\udcff\n"
    further = ["owner/name"] if command == "push" else []
    result = subprocess.run(
        [sys.executable, "-m", "meam_policy", command, b"./" + name.encode("utf-8", "surrogatepass"), *further],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_TOKEN": "hf_nobody"},
    )
    error = result.stderr.decode()
    assert (result.returncode, result.stdout) == (2, b"")
    assert error.count("\n") == 1
    assert visible_lines(error)
    assert r"no\x1b[31mwhere" in error


def test_a_terminal_that_takes_only_ascii_gets_the_accents_in_pythons_notation(make_policy, tmp_path):
    make_policy().folder.rename(tmp_path / "café")
    result = subprocess.run(
        [sys.executable, "-m", "meam_policy", "info", "café"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1", "COLUMNS": "100"},
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert rb"caf\xe9" in result.stdout
