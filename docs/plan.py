"""Draw which room of the package imports which, from its imports: docs/images/rooms.svg.

python docs/plan.py

A room stands above everything that it imports. A line that other lines imply is left out.
"""

import ast
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLAN = ROOT / "docs/images/rooms.svg"
PACKAGE = ROOT / "funcattrib"


class Room(NamedTuple):
    """A room on the plan: what it holds, and the column that it stands in."""

    holds: str
    column: float


ROOMS = {
    "cli": Room("flags and commands", 3),
    "recipes": Room("whole methods", 3),
    "runs": Room("build, fit, score, reduce", 2.5),
    "report": Room("printed tables", 3.5),
    "scores": Room("files of scores", 3),
    "query": Room("search of a store", 3),
    "training": Room("rows while training", 3),
    "checkpoints": Room("optimizer states", 3),
    "jax": Room("chains on JAX", 4),
    "planning": Room("time, memory, disk", 5),
    "transforms": Room("stages of chains", 3),
    "losses": Room("loss(params, example)", 2),
    "chain": Room("composition and fitting", 3),
    "models": Room("loading and selecting", 2.5),
    "lift": Room("probes, maps and taps", 3.5),
    "data": Room("documents and batches", 1),
    "weights": Room("sharded and quantised", 3),
    "store": Room("shards and manifests", 6),
    "evaluate": Room("ranking measures", 0),
    "kernels": Room("operations by hand", 2.5),
    "runtime": Room("devices and processes", 3.5),
}
"""By name; errors.py, types.py and version.py, which all rooms use, are not drawn."""

WIDTH, HEIGHT, GAP, FLOOR, MARGIN = 146, 44, 10, 82, 20


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return room → the rooms that its files import."""
    return {room: frozenset(_imported(room)) - {room} for room in ROOMS}


def _imported(room: str) -> Iterator[str]:
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for package, *parts in (module.split(".") for module in modules):
                if package == "funcattrib" and parts and parts[0] in ROOMS:
                    yield parts[0]


@cache
def floor(room: str) -> int:
    """Return how many rooms stand below at most, one upon the other."""
    return max((1 + floor(each) for each in imports()[room]), default=0)


@cache
def below(room: str) -> frozenset[str]:
    """Return every room that is reached from one."""
    return imports()[room].union(*(below(each) for each in imports()[room]))


def lines(room: str) -> list[str]:
    """Return the rooms that one imports and that none of its other imports reaches."""
    implied = frozenset[str]().union(*(below(each) for each in imports()[room]))
    return sorted(imports()[room] - implied)


def draw() -> str:
    """Return the plan as an SVG, the top floor first."""
    top = max(map(floor, ROOMS))
    places = {
        room: (MARGIN + int(at.column * (WIDTH + GAP)), MARGIN + (top - floor(room)) * FLOOR)
        for room, at in ROOMS.items()
    }
    width = max(x for x, _ in places.values()) + WIDTH + MARGIN
    height = max(y for _, y in places.values()) + HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="ui-sans-serif, system-ui, sans-serif" text-anchor="middle" fill="#1f2433" role="img">',
        "<title>The rooms of funcattrib: a line goes from a room down to one that it imports</title>",
        f'<rect x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10" fill="#f7f8fc" stroke="#c9cfdd"/>',
        '<g stroke="#8b93a7" stroke-width="1.2" fill="none">',
    ]
    for room, (x, y) in places.items():
        for other in lines(room):
            start, end = (x + WIDTH // 2, y + HEIGHT), (places[other][0] + WIDTH // 2, places[other][1])
            turned = y + FLOOR  # from here a line falls straight down its room's column
            middle = (start[1] + turned) // 2
            parts.append(
                f'<path d="M{start[0]} {start[1]} C{start[0]} {middle} {end[0]} {middle} {end[0]} {turned} V{end[1]}">'
                f"<title>{room} imports {other}</title></path>"
            )
    parts.append("</g>")
    for room, (x, y) in places.items():
        holds = escape(ROOMS[room].holds)
        parts += [
            f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#d7defa" stroke="#3a4a8c"/>',
            f'<text x="{x + WIDTH // 2}" y="{y + 18}" font-size="14" font-weight="600">{room}</text>',
            f'<text x="{x + WIDTH // 2}" y="{y + 35}" font-size="11.5" fill="#4a5268">{holds}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PLAN.write_text(draw(), encoding="utf-8")
    print(PLAN)
