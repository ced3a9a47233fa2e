"""The chart of the documentation, as SVG: share of the gain by size of the fleet, one colour for each epsilon.

A line is a whole window, a dashed one a round of it.
"""

from collections.abc import Iterable, Sequence
from math import log10
from typing import Any

PANEL_WIDTH, HEIGHT = 330, 250
LEFT, TOP, BOTTOM, GAP = 52, 40, 76, 60
COLOURS = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
LEAST = -0.05
_DASHES = ' stroke-dasharray="4 3"'
_TEXT = 'font-family="sans-serif" font-size="11" fill="#444"'


def draw(figures: dict[str, Any]) -> str:
    """Returns the picture, one panel for each number of topics."""
    panels = figures["rows"]
    width = LEFT + len(panels) * (PANEL_WIDTH + GAP)
    height = TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (name, rows) in enumerate(panels.items()):
        parts += _panel(
            name, [row for row in rows if row["feedback"] == "private"], LEFT + number * (PANEL_WIDTH + GAP)
        )
    rows = [row for name in panels for row in panels[name]]
    epsilons = sorted({row["epsilon"] for row in rows if row["feedback"] == "private"})
    return "\n".join([*parts, *_legend(epsilons, LEFT, TOP + HEIGHT + BOTTOM - 14), "</svg>\n"])


def _panel(name: str, rows: Sequence[dict[str, Any]], left: float) -> Iterable[str]:
    fleets = sorted({row["agents"] for row in rows})
    span = log10(max(fleets) / min(fleets)) or 1.0

    def x(agents: int) -> float:
        return left + PANEL_WIDTH * log10(agents / min(fleets)) / span

    def y(share: float) -> float:
        return TOP + HEIGHT * (1 - (min(1.1, max(LEAST, share)) - LEAST) / (1.1 - LEAST))

    yield f'<text x="{left}" y="{TOP - 16}" {_TEXT} font-weight="bold">{name}</text>'
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        yield f'<path d="M{left} {y(share):.1f}h{PANEL_WIDTH}" stroke="#ddd"/>'
        yield f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end" {_TEXT}>{share:.0%}</text>'
    for agents in fleets:
        yield f'<text x="{x(agents):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle" {_TEXT}>{agents:,}</text>'
    middle = left + PANEL_WIDTH / 2
    yield f'<text x="{middle}" y="{TOP + HEIGHT + 36}" text-anchor="middle" {_TEXT}>agents of 20 users</text>'
    epsilons = sorted({row["epsilon"] for row in rows})
    for colour, epsilon in zip(COLOURS, epsilons, strict=False):
        for rounds in sorted({row["rounds"] for row in rows}):
            points = [(x(row["agents"]), y(row["gain_share"])) for row in rows if _drawn(row, epsilon, rounds)]
            dashes = _DASHES if rounds == 1 else ""
            yield f'<polyline points="{_path(points)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
            yield from (f'<circle cx="{at:.1f}" cy="{up:.1f}" r="3" fill="{colour}"/>' for at, up in points)


def _legend(epsilons: Sequence[float], left: float, up: float) -> Iterable[str]:
    kinds = [(colour, "", f"ε = {epsilon:g}") for colour, epsilon in zip(COLOURS, epsilons, strict=False)]
    kinds += [("#666", "", "a whole window"), ("#666", _DASHES, "one of its rounds")]
    for number, (colour, dashes, words) in enumerate(kinds):
        at = left + 80 * number + 50 * (number > len(epsilons))
        yield f'<path d="M{at} {up - 4:.1f}h22" stroke="{colour}" stroke-width="3"{dashes}/>'
        yield f'<text x="{at + 28}" y="{up:.1f}" {_TEXT}>{words}</text>'


def _drawn(row: dict[str, Any], epsilon: float, rounds: int) -> bool:
    return row["epsilon"] == epsilon and row["rounds"] == rounds and row["gain_share"] is not None


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
