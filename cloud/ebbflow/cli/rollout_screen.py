"""The same view, drawn live on a terminal."""

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ebbflow.cli.rollout_view import Counts, View, facts, view

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

BAR_CELLS = 16
REFRESHES_PER_SECOND = 2.0
"""Times count down between two changes."""
_STYLES = {
    "running": "cyan",
    "succeeded": "green",
    "halted": "red",
    "paused": "yellow",
    "waiting for approval": "yellow",
}
_MARKS = {"succeeded": ("█", "#", "green"), "failed": ("✗", "x", "red"), "assigned": ("▒", "+", "cyan")}
_WAITING = ("░", ".", "dim")


@contextmanager
def live(console: "Console") -> "Iterator[Callable[[Any], None]]":
    """Yields what shows a rollout; the screen is clean again at the end."""
    from rich.live import Live

    last: list[Any] = []

    def draw() -> "RenderableType":
        if not last:
            return "waiting for the cloud ..."
        seen = view(last[0], dt.datetime.now(dt.UTC))
        return render(seen, ascii_only=console.options.ascii_only)

    rate = REFRESHES_PER_SECOND
    with Live(get_renderable=draw, console=console, refresh_per_second=rate, transient=True) as shown:

        def show(rollout: Any) -> None:
            last[:] = [rollout]
            shown.refresh()

        yield show


def render(seen: View, *, ascii_only: bool = False) -> "RenderableType":
    """Draws a view."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    style = _STYLES.get(seen.state, "default")
    title = Text.assemble(
        (seen.name, "bold"), "  ", seen.release, "  ", (seen.state, f"bold {style}"), "  ", seen.phase
    )
    grid = Table.grid(padding=(0, 2))
    for row in seen.phases:
        emphasis = "bold" if row.place == "now" else "dim" if row.place == "later" else ""
        head = Text(f"{'*' if row.place == 'now' else ' '} {row.number}", style=emphasis)
        done = Text(f"{row.counts.succeeded}/{row.counts.total}", justify="right", style=emphasis)
        drawn = bar(row.counts, ascii_only=ascii_only), _states(row.counts, ascii_only=ascii_only)
        grid.add_row(head, Text(row.who, style=emphasis), drawn[0], done, drawn[1])
    notes = Table.grid(padding=(0, 2))
    for name, text in facts(seen):
        shade = {"failed": "red", "": "red", "reason": "red", "next": "bold"}.get(name, "")
        notes.add_row(Text(name, style="dim"), Text(text, style=shade))
    return Group(title, "", grid, "", notes)


def bar(counts: Counts, *, ascii_only: bool = False, cells: int = BAR_CELLS) -> "Text":
    """Draws one bar; a state that one device is in has a cell, however many devices there are."""
    from rich.text import Text

    drawn = Text()
    for name, width in widths(counts, cells).items():
        mark, plain, style = _MARKS.get(name, _WAITING)
        drawn.append((plain if ascii_only else mark) * width, style=style)
    return drawn


def widths(counts: Counts, cells: int) -> dict[str, int]:
    """Shares `cells` out among the states: in proportion, at least one to each that has a device."""
    present = {name: n for name in ("succeeded", "failed", "assigned", "waiting") if (n := getattr(counts, name))}
    if not present:
        return {"waiting": cells}
    shares = {name: max(1, round(cells * n / counts.total)) for name, n in present.items()}
    while (excess := sum(shares.values()) - cells) != 0:
        widest = max(shares, key=lambda name: shares[name])
        shares[widest] -= 1 if excess > 0 else -1
    return shares


def _states(counts: Counts, *, ascii_only: bool) -> "Text":
    """The counts that are not 0, in the colours of the bar: its legend."""
    from rich.text import Text

    told = Text()
    for name, (mark, plain, style) in {**_MARKS, "waiting": _WAITING}.items():
        if count := getattr(counts, name):
            told.append(f"{plain if ascii_only else mark} {count} {name}  ", style=style)
    told.rstrip()
    return told
