"""Draw the folders of the three packages and their imports as `docs/assets/rooms.svg`.

Read from the sources, without importing them: `python docs/draw_rooms.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "meam_export": ROOT / "export" / "meam_export",
    "meam_training": ROOT / "training" / "meam_training",
    "meam_policy": ROOT / "meam_policy",
}
"""From the top storey to the ground."""

PICTURE = ROOT / "docs" / "assets" / "rooms.svg"

WIDTH, ROOM_HEIGHT, STOREY_HEIGHT, MARGIN = 760, 26, 56, 14
LETTER = 7.3
"""Width of a letter in the pictures' type, pixels."""

NOTE_LETTERS = 112
"""Letters in a line of a note."""

STYLE = """
.ground { fill: #ffffff } .house { fill: #f3f5f8; stroke: #c3cad4 }
.room { fill: #dbe7fb; stroke: #3b6fc4 } .module { fill: #ffffff; stroke: #7d8896; stroke-dasharray: 3 2 }
.import { fill: none; stroke: #5b6675; stroke-width: 1.1; opacity: 0.75 } .head { fill: #5b6675 }
text { font: 12px ui-monospace, "DejaVu Sans Mono", monospace; fill: #18202b }
.title { font-weight: bold; font-size: 13px } .note { font: 11.5px system-ui, "DejaVu Sans", sans-serif; fill: #46515f }
@media (prefers-color-scheme: dark) {
  .ground { fill: #14181e } .house { fill: #1c222a; stroke: #3d4754 }
  .room { fill: #1f3658; stroke: #79a5f0 } .module { fill: #14181e; stroke: #8b96a5 }
  .import { stroke: #9aa6b5 } .head { fill: #9aa6b5 } text { fill: #e4e9f0 } .note { fill: #aab4c1 }
}
""".strip()


def main() -> None:
    """Write the picture."""
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(), encoding="utf-8")


def read_imports() -> dict[str, set[str]]:
    """Which room imports from which: folders, and modules beside them, as "package.name"."""
    found: dict[str, set[str]] = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[0].startswith("__"):
                continue
            room = f"{package}.{parts[0]}"
            found.setdefault(room, set()).update(_imported_rooms(path) - {room})
    return found


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package in PACKAGES and rest:
                rooms.add(f"{package}.{rest[0]}" if _is_room(package, rest[0]) else package)
    return rooms


def _is_room(package: str, name: str) -> bool:
    folder = PACKAGES[package]
    return (folder / name).is_dir() or (folder / f"{name}.py").is_file()


def draw() -> str:
    """The picture as the text of an SVG file."""
    imports = read_imports()
    body: list[str] = []
    y = MARGIN
    for package in PACKAGES:
        rooms = sorted(room for room in imports if room.startswith(f"{package}."))
        inside = {room: {target for target in imports[room] if target in rooms} for room in rooms}
        outside = sorted({target for room in rooms for target in imports[room] if not target.startswith(package)})
        drawn, height = _draw_house(package, inside, outside, y)
        body += drawn
        y += height + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" '
        'aria-label="Folders of the three packages, with an arrow from each to those it imports">\n'
        f"<style>\n{STYLE}\n</style>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0.5 8 4 0 7.5z"/></marker></defs>\n'
        f'<rect class="ground" width="{WIDTH}" height="{y}" rx="6"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _draw_house(
    package: str, imports: Mapping[str, set[str]], outside: Iterable[str], top: float
) -> tuple[list[str], float]:
    """One package: its rooms on storeys, each above all that it imports."""
    routes = _route(imports)
    storeys = _arrange(imports, routes)
    notes = _notes(outside)
    head = 30 + 16 * len(notes)
    height = head + len(storeys) * STOREY_HEIGHT - (STOREY_HEIGHT - ROOM_HEIGHT) + 14
    drawn = [
        f'<rect class="house" x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{height}" rx="6"/>',
        f'<text class="title" x="{MARGIN + 12}" y="{top + 20}">{package}</text>',
    ]
    drawn += [
        f'<text class="note" x="{MARGIN + 12}" y="{top + 38 + 16 * i}">{escape(note)}</text>'
        for i, note in enumerate(notes)
    ]
    place: dict[str, tuple[float, float, float]] = {}
    for level, rooms in enumerate(storeys):
        widths = [LETTER * len(_name(room)) + 18 if room in imports else 0 for room in rooms]
        gap = (WIDTH - 2 * MARGIN - sum(widths)) / (len(rooms) + 1)
        x, y = MARGIN + gap, top + head + level * STOREY_HEIGHT
        for room, width in zip(rooms, widths, strict=True):
            place[room] = (x, y, width)
            x += width + gap
    drawn += [_arrow([place[stop] for stop in route]) for route in routes]
    for room in sorted(imports):
        x, y, width = place[room]
        kind = "room" if (PACKAGES[package] / _name(room)).is_dir() else "module"
        drawn.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{ROOM_HEIGHT}" rx="4"/>'
            f'<text x="{x + width / 2:.1f}" y="{y + 17:.1f}" text-anchor="middle">{_name(room)}</text>'
        )
    return drawn, height


def _arrow(stops: Sequence[tuple[float, float, float]]) -> str:
    """A line from the foot of the first stop to the head of the last, straight past those between."""
    x, y = stops[0][0] + stops[0][2] / 2, stops[0][1] + ROOM_HEIGHT
    drawn = f"M{x:.1f} {y:.1f}"
    for left, head, width in stops[1:]:
        u, v = left + width / 2, head
        bend = (v - y) * 0.5
        drawn += f"C{x:.1f} {y + bend:.1f} {u:.1f} {v - bend:.1f} {u:.1f} {v:.1f}"
        x, y = u, v + ROOM_HEIGHT
        drawn += "" if width else f"V{y:.1f}"
    return f'<path class="import" marker-end="url(#head)" d="{drawn}"/>'


def _notes(outside: Iterable[str]) -> list[str]:
    """What a package imports from the others."""
    by_package: dict[str, list[str]] = {}
    for target in outside:
        package, _, name = target.partition(".")
        by_package.setdefault(package, []).extend([name] if name else [])
    lines = (f"imports from {package}: {', '.join(names)}" for package, names in sorted(by_package.items())[::-1])
    return [line for text in lines for line in wrap(text, NOTE_LETTERS, subsequent_indent="    ")]


def _levels(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """The storey of every room: one above the highest that it imports."""
    level: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in level:
            level[room] = 1 + max((height(target) for target in imports[room]), default=-1)
        return level[room]

    for room in imports:
        height(room)
    return level


def _route(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Every arrow as the stops on its way: the room, a place of its own on each storey between, and the target."""
    level = _levels(imports)
    return [
        [room, *(f"{room}>{target}@{n}" for n in range(level[room] - 1, level[target], -1)), target]
        for room, targets in sorted(_without_detours(imports).items())
        for target in sorted(targets)
    ]


def _arrange(imports: Mapping[str, set[str]], routes: Iterable[Sequence[str]]) -> list[list[str]]:
    """Rooms, and places of passing arrows, by storey from the top; what is connected stands near each other."""
    level = _levels(imports)
    near: dict[str, set[str]] = {room: set() for room in imports}
    for route in routes:
        for n, (stop, after) in enumerate(pairwise(route)):
            level.setdefault(stop, level[route[0]] - n)
            near.setdefault(stop, set()).add(after)
            near.setdefault(after, set()).add(stop)
    storeys = [sorted(stop for stop, at in level.items() if at == n) for n in range(max(level.values()) + 1)]
    for _ in range(12):
        for stops in (*storeys, *storeys[::-1]):
            place = {stop: (i + 1) / (len(row) + 1) for row in storeys for i, stop in enumerate(row)}
            centre = {
                stop: sum(place[other] for other in sorted(near[stop])) / len(near[stop])  # sets have no order
                for stop in stops
                if near[stop]
            }
            stops.sort(key=lambda stop, centre=centre: (centre.get(stop, 0.0), stop))
    return storeys[::-1]


def _without_detours(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others: what a room imports, but for what those rooms import themselves."""
    reached: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in reached:
            reached[room] = set().union(imports[room], *(reach(target) for target in imports[room]))
        return reached[room]

    return {room: targets - set().union(*(reach(target) for target in targets)) for room, targets in imports.items()}


def _name(room: str) -> str:
    return room.split(".", 1)[1]


if __name__ == "__main__":
    main()
