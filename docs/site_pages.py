"""What the site shows beyond `docs/`: README.md, the benchmarks and the like, and links that lead there.

The pages link to files of the repository as they lie there, so that the links work where the repository is read. In
the site such a link leads to the file's page if it has one, and is plain text if not. Loaded by `mkdocs.yml`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/**/*.md", "benchmarks/**/*.png")
"""Files of the repository that the site shows too."""

MOVED = {"README.md": "first-steps.md"}
"""Files that the site shows at another place: a README.md at its root would be its index."""

_FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's own files to those of `docs/`."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, MOVED.get(place, place), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the repository lead to their pages, or be text."""
    source = page.file.src_uri
    here = {page: place for place, page in MOVED.items()}
    inside = f"docs/{source}" if (ROOT / "docs" / source).is_file() else here.get(source, source)
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda match: _relinked(match, inside, source, files), part) for part in parts[::2]]
    return "".join(parts)


def _relinked(match: re.Match[str], inside: str, source: str, files: Files) -> str:
    whole, (picture, text, target) = match[0], match.groups()
    if urlsplit(target).scheme or target.startswith("#"):
        return whole
    path, _, anchor = target.partition("#")
    place = os.path.normpath(PurePosixPath(inside).parent / path)
    if not (ROOT / place).exists():
        return whole  # a dead link, which the build reports
    page = MOVED.get(place, place.removeprefix("docs/"))
    if files.get_file_from_path(page) is None:
        return text
    relative = os.path.relpath(page, PurePosixPath(source).parent)
    return f"{picture}[{text}]({relative}{'#' + anchor if anchor else ''})"
