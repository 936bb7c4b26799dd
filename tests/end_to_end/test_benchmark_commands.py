"""The commands of the benchmarks' READMEs name what there is."""

from __future__ import annotations

import contextlib
import io
import pydoc
import re
import runpy
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

from meam_policy.cli import run

ROOT = Path(__file__).parents[2]
READMES = sorted((ROOT / "benchmarks").glob("*/*.md"))
PROGRAMS = ("python benchmarks/", "meam ", "pytest ")


def commands(readme: Path) -> list[list[str]]:
    """The words of every command, in blocks and in running text, that is one of this repository."""
    text = readme.read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [shlex.split(line, comments=True) for line in lines if line.startswith(PROGRAMS)]


EVERY = [(readme, words) for readme in READMES for words in commands(readme)]


@cache
def usage(*program: str) -> str:
    """What a program or a subcommand says of its options."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        if program[0] == "meam":
            with contextlib.suppress(SystemExit):
                run([*program[1:], "--help"])
            return out.getvalue()
        script = ROOT / program[1]
        patch.setattr(sys, "argv", [str(script), *program[2:], "--help"])
        patch.syspath_prepend(str(script.parent))
        for sibling in script.parent.glob("*.py"):  # another folder's script may bear the same name
            patch.delitem(sys.modules, sibling.stem, raising=False)
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(script), run_name="__main__")
        for sibling in script.parent.glob("*.py"):
            sys.modules.pop(sibling.stem, None)
    return out.getvalue()


def program(words: list[str]) -> tuple[str, ...]:
    """The words before the first option or argument: "meam bench infer", or a script and its subcommand."""
    depth = 3 if words[:2] == ["meam", "bench"] or words[1:2] == ["benchmarks/runtime/run.py"] else 2
    return tuple(words[:depth])


def test_commands_are_found() -> None:
    assert {words[0] for _, words in EVERY} == {"python", "meam", "pytest"}
    assert len({readme for readme, _ in EVERY}) >= 7


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_every_module_that_is_named_exists(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    for name in re.findall(r"(?:benchmarks|tests|training|export)/[\w/.-]+\.py", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(meam_(?:policy|training|export)(?:\.\w+)+)`", text):
        assert pydoc.locate(name) is not None or list((ROOT / "meam_policy").rglob(name)), name
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (readme.parent / link).exists(), link


def test_a_file_in_running_text_is_one_of_its_own_folder() -> None:
    for readme in READMES:
        for name in re.findall(r"`(\w+\.py)\b", readme.read_text(encoding="utf-8")):
            assert (readme.parent / name).is_file(), f"{readme}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for _, words in EVERY if words[0] != "pytest"], ids=" ".join)
def test_every_option_of_a_command_is_in_its_help(words: list[str]) -> None:
    known = set(re.findall(r"--[\w-]+", usage(*program(words))))
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
