"""What docs/, README.md and CONTRIBUTING.md say is true of the code, and the site builds."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest
import tyro
from safetensors.numpy import load_file

import meam_export
import meam_policy
import meam_training
from meam_policy import EnvironmentSpec, MeamPolicy, cli, errors
from meam_training.commands import train as train_command

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
BRIDGES = ("docs/ros2.md", "docs/lerobot.md")
"""Pages whose blocks test_bridges.py runs."""

FENCE = re.compile(
    r"(?:<!-- test: (?P<name>\S+) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page: str, kind: str) -> list[tuple[str | None, str]]:
    return [(match["name"], match["body"]) for match in FENCE.finditer(read(page)) if match["kind"] == kind]


def section(page: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}$(.*?)(?=^#{{1,6}} |\Z)", read(page), re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page} has no heading {heading}"
    return found[2]


def first_column(text: str) -> list[str]:
    """The names in backticks in the first column of the tables."""
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# Python blocks


def blocks() -> Iterator[Any]:
    for page in PAGES:
        if page not in (*BRIDGES, "README.md"):
            for name, code in fences(page, "python"):
                yield pytest.param(code, id=f"{page}:{name}")


@pytest.mark.parametrize("code", blocks())
def test_every_block_of_the_pages_runs(
    code: str, documented_world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(documented_world)
    exec(compile(code, "block.py", "exec"), {"__name__": "block"})
    assert "print(" not in code or capsys.readouterr().out.strip()


def test_every_python_block_has_a_name_by_which_it_is_run() -> None:
    unnamed = [(page, code[:60]) for page in PAGES for name, code in fences(page, "python") if name is None]
    assert unnamed == []
    tested = read("tests/end_to_end/test_bridges.py") + read("tests/end_to_end/test_readme.py")
    for page in (*BRIDGES, "README.md"):
        for name, _ in fences(page, "python"):
            assert f'"{name}"' in tested, f"no test runs the block {name} of {page}"


# Command lines


def meam_lines() -> Iterator[Any]:
    for page in (*PAGES, "model_cards/README.md"):
        for _, body in fences(page, ""):
            for line in re.sub(r"\\\n", " ", body).splitlines():
                found = re.match(r"(?:meam|torchrun .* -m meam_policy) (.*)", line)
                if found:
                    yield pytest.param(shlex.split(found[1], comments=True), id=f"{page}: {line[:60]}")


class ParserFound(Exception):
    def __init__(self, flags: set[str]) -> None:
        self.flags = flags


@pytest.mark.parametrize("words", meam_lines())
def test_every_command_line_names_a_command_and_its_flags(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def find(command: Any, *, prog: str, args: Sequence[str], config: Any, **options: Any) -> None:
        parser = tyro.extras.get_parser(command, prog=prog, config=config, **options)
        raise ParserFound({flag for action in parser._actions for flag in action.option_strings})

    monkeypatch.setattr(tyro, "cli", find)
    names = [word for word in words if not word.startswith("-")]
    command = [names[0], *names[1 : 2 if names[0] in ("train", "bench", "robot") else 1]]
    if words[0] == "train" and words[1].startswith("-"):
        command = ["train"]
    if "--help" in words:
        assert names[0] in cli.COMMANDS
        return
    with pytest.raises(ParserFound) as found:
        cli.run(command)
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in found.value.flags, f"meam {' '.join(command)} has no {word}"


def test_the_helps_show_the_recipe_of_the_training_page(capsys: pytest.CaptureFixture[str]) -> None:
    def commands(text: str) -> list[list[str]]:
        lines = re.sub(r"\\\n", " ", text).splitlines()
        return [shlex.split(line) for line in lines if re.match(r" *meam [a-z]+ ", line)]

    recipe = commands(section("docs/training.md", "The same on the command line"))[:4]
    assert cli.run(["--help"]) == 0
    assert commands(capsys.readouterr().out) == recipe
    assert shlex.split(train_command.DESCRIPTION.partition("Example: ")[2]) == recipe[1]


def test_inline_commands_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`meam ([a-z]+)[^`]*`", read(page)):
            assert name in cli.COMMANDS, f"{page} names meam {name}"


def test_make_targets_exist() -> None:
    makefile = read("Makefile")
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", read(page), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} names make {target}"


# Links


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and Python-Markdown make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_links_of_files_at_the_root_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
            path, _, anchor = target.partition("#")
            assert (ROOT / path).exists(), f"{page} links to {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", read(path), re.MULTILINE)
                assert anchor in map(slug, headings), f"{page} links to {target}"


# The format


def test_the_folder_page_describes_every_field(documented_world: Path) -> None:
    data = json.loads((documented_world / "policies" / "arm" / "config.json").read_bytes())
    page = "docs/policy-folder.md"
    assert first_column(section(page, "`config.json`")) == list(data)
    assert first_column(section(page, "A box")) == list(data["action"])
    recorded = EnvironmentSpec("meam/Pockets-v0", {"north": 2}).to_json()
    assert first_column(section(page, "An environment")) == list(recorded)
    figures = {name for variant in data["variants"].values() for name in variant["measured"]}
    described = first_column(section(page, "A variant"))
    assert described[: len(data["variants"]["rtc"])] == list(data["variants"]["rtc"])
    assert figures <= set(described[len(data["variants"]["rtc"]) :])


def test_the_folder_page_describes_every_file_tensor_and_key(documented_world: Path) -> None:
    folder, page = documented_world / "policies" / "arm", "docs/policy-folder.md"
    files = first_column(section(page, "The policy folder"))
    variants = {variant.file for variant in MeamPolicy.from_pretrained(folder).spec.variants.values()}
    written = {"policy-NAME.onnx" if path.name in variants else path.name for path in folder.iterdir()}
    assert written == set(files)
    text = section(page, "The graphs")
    for file in ("policy.onnx", "policy-rtc.onnx", "policy-best-of-2.onnx"):
        graph = onnx.load(folder / file)
        for kind, values in (("in", graph.graph.input), ("out", graph.graph.output)):
            for value in values:
                assert f"| {kind}: `{value.name}` |" in text, value.name
        assert graph.ir_version == int(re.findall(r"IR version (\d+)", text)[0])
        assert graph.opset_import[0].version == int(re.findall(r"opset (\d+)", text)[0])
        assert {entry.key for entry in graph.metadata_props} <= set(first_column(text)), file
    golden = load_file(folder / "golden.safetensors")
    described = first_column(section(page, "`golden.safetensors`"))
    assert described[: len(golden)] == ["observation", "noise", "actions"]
    assert set(golden) == {"observation", "noise", "actions"}
    networks = {name.split(".")[0] for name in load_file(folder / "model.safetensors")}
    told = set(re.findall(r"`(\w+)\.\*`", section(page, "`model.safetensors`")))
    assert networks <= told


# Errors


@functools.cache
def raised_messages() -> dict[str, list[str]]:
    """The messages of every error class in the sources, as regular expressions."""
    found: dict[str, list[str]] = {name: [] for name in errors.__all__}
    for folder in ("meam_policy", "training/meam_training", "export/meam_export"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found:
                    message = node.args[0] if node.args else None
                    template = isinstance(message, ast.Call) and getattr(message.func, "id", "") == "SettingText"
                    message = message.args[0] if template and isinstance(message, ast.Call) else message
                    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                    texts = [str(part.value) if isinstance(part, ast.Constant) else FILLED for part in parts]
                    if any(text != FILLED for text in texts):
                        found[node.func.id].append(_pattern("".join(texts), template))
    return found


FILLED = "\0"
"""Stands for what an f-string fills in."""


def _pattern(text: str, template: bool) -> str:
    """A message as a regular expression: anything for what is filled in, also in the fields of a template."""
    fields = r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}" if template else FILLED
    return ".*?".join(re.escape(fixed) for part in re.split(fields, text) for fixed in part.split(FILLED))


def test_troubleshooting_has_a_section_for_every_error() -> None:
    headings = re.findall(r"^### `(\w+)`$", read("docs/troubleshooting.md"), re.MULTILINE)
    assert sorted(headings) == sorted(errors.__all__)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "MeamError"])
def test_the_typical_message_of_an_error_is_one_that_the_sources_raise(name: str) -> None:
    text = section("docs/troubleshooting.md", f"`{name}`")
    shown = re.findall(r"^```console\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert len(shown) == 1
    known = raised_messages()[name]
    assert any(re.fullmatch(message, shown[0]) for message in known), f"no {name} says: {shown[0]}"
    parent, *builtin = getattr(errors, name).__bases__
    expected = builtin[0] if builtin else parent
    assert f"`{expected.__name__}`" in text, f"{name} is a {expected.__name__} too"


# Names and rooms


def test_the_page_of_public_names_has_them_all() -> None:
    text = read("docs/api.md")
    for package in (meam_policy, meam_training, meam_export):
        for name in package.__all__:
            if name not in errors.__all__:
                assert f"::: {package.__name__}.{name}\n" in text or f"`{name}`" in text, f"{name} is missing"


def test_the_method_page_names_every_module_of_the_mathematics() -> None:
    text = read("docs/api-method.md")
    for module in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        assert importlib.util.find_spec(module) is not None, module
    for module in re.findall(r"\[`(\S+)`\]\(api-method\.md#", read("docs/method.md")):
        assert f"::: {module}\n" in text, module


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_of_the_rooms_is_that_of_the_sources() -> None:
    script = load_script(ROOT / "docs" / "draw_rooms.py")
    assert script.PICTURE.read_text(encoding="utf-8") == script.draw(), "run: python docs/draw_rooms.py"


def test_the_architecture_page_describes_every_room() -> None:
    script = load_script(ROOT / "docs" / "draw_rooms.py")
    for package, folder in script.PACKAGES.items():
        described = first_column(section("docs/architecture.md", f"`{package}`"))
        rooms = {path.parent.name for path in folder.glob("*/__init__.py")}
        assert rooms <= set(described), f"{package} has {sorted(rooms - set(described))} too"


def test_the_symptoms_are_drawn_from_the_runs_that_the_page_makes(tmp_path: Path) -> None:
    script, page = load_script(ROOT / "docs" / "draw_symptoms.py"), read("docs/choosing.md")
    made = set(re.findall(r"--output-dir runs/(\S+)", section("docs/choosing.md", "Symptoms")))
    wrong = {symptom.run for symptoms in script.PICTURES.values() for symptom in symptoms}
    assert {*wrong, script.RIGHT} <= made
    config = meam_training.TrainConfig.preset("me-am", steps=20, pretrain_steps=10)
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config.to_json(), encoding="utf-8")
        (tmp_path / name / "metrics.csv").write_text("step,value_gain\n10,0.1\n20,0.2\n", encoding="utf-8")
        (tmp_path / name / "evaluations.csv").write_text("step,return_mean\n10,1\n20,2\n", encoding="utf-8")
    for name, symptoms in script.PICTURES.items():
        assert f"](assets/{name})" in page
        assert (ROOT / "docs" / "assets" / name).is_file()
        assert script.draw(tmp_path, symptoms).startswith(b"\x89PNG")


# The site


class Assets(HTMLParser):
    """What a page loads by itself: scripts, styles, fonts, pictures; links are not loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = re.findall(r"url\(([^)]+)\)", text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found += [value for name in ("src", "srcset") if (value := given.get(name))]
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pages = sorted(site.rglob("*.html"))
    assert {page.removeprefix("docs/").replace(".md", ".html") for page in PAGES[1:]} <= {
        str(page.relative_to(site)) for page in pages
    }
    for path in pages + sorted(site.rglob("*.css")):
        for asset in Assets(path.read_text(encoding="utf-8")).found:
            assert not re.match(r"""['"]?(https?:)?//""", asset), f"{path.relative_to(site)} loads {asset}"
    shutil.rmtree(site)
