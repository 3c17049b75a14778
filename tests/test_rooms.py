"""The rooms and their order: imports go down only, and rooms of one row do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "thresher"
ROWS = (  # from the top down; a room may import what stands in a lower row, and itself
    ("cli",),
    ("experiments",),
    ("reports",),
    ("training", "search", "serving"),
    ("exporting",),  # whose graphs serving opens
    ("evaluation",),
    ("data", "stats"),
    ("multimodal", "prompts", "streaming"),
    ("api",),
    ("checkpoint",),
    ("methods", "caches"),
    ("core",),
)
ROW = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
DOORS = {SOURCE / "__init__.py", SOURCE / "__main__.py"}  # the package's names, and its command
FILES = sorted(path for path in SOURCE.rglob("*.py") if path not in DOORS)


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> dict[str, int]:
    """Room: line of the first import of it in a file of the package, at any depth of the code."""
    package, rooms = path.relative_to(SOURCE).parent.parts, {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "thresher"]
            targets = [tuple(name.split(".")[1:]) for name in names]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "thresher"):
            module = tuple(node.module.split(".")) if node.module else ()
            base = (*package[: len(package) + 1 - node.level], *module) if node.level else module[1:]
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target and target[0] in ROW:
                rooms.setdefault(target[0], node.lineno)
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    own = room_of(path)
    assert own in ROW, f"{own} is no room of the house: give it a row in this test and in docs/design.md"
    up = [
        f"{room} in line {line}" for room, line in imported_rooms(path).items() if room != own and ROW[room] <= ROW[own]
    ]
    assert not up, f"{own} may not import {', '.join(up)}"


def test_the_reader_of_imports_sees_them(tmp_path):
    seen = imported_rooms(SOURCE / "exporting" / "runtime.py")
    assert "data" in seen and "exporting" not in {room for room in seen if room == "cli"}
    assert imported_rooms(SOURCE / "methods" / "ltp.py").keys() == {"core", "methods"}


@pytest.mark.parametrize(
    "room", sorted(p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists())
)
def test_every_room_has_a_readme(room):
    lines = (SOURCE / room / "README.md").read_text(encoding="utf-8").splitlines()
    assert 12 <= len(lines) <= 40, f"{room}/README.md: {len(lines)} lines"
