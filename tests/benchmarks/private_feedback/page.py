"""The part of the documentation's page that holds figures, from the benchmark's JSON object."""

from collections.abc import Iterable, Sequence
from typing import Any

BEGIN, END = "<!-- figures: make bench NAME=private-feedback, with --write -->\n", "<!-- end of figures -->\n"


def replace(page: str, figures: dict[str, Any]) -> str:
    """Returns a page with the figures between its marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render(figures)}{END}{after}"


def render(figures: dict[str, Any]) -> str:
    """Returns the figures as Markdown."""
    parts = []
    for name, rows in figures["rows"].items():
        parts.append(f"\n**{name}**; {figures['accuracy'][name]:.0%} of the votes land in the right bin.\n")
        parts.append(_table(rows))
    paid, run = figures["metrics"], figures["run"]
    parts.append(
        f"\nA round of 150 topics costs an agent of 20 users with 50 requests each **{paid['agent_cpu_s']:.2f}"
        f" CPU-seconds**, **{paid['kb_up']:.2f} kB up** and {paid['kb_down']:.0f} kB down, on the real store."
        f" Fleets of each size: {run['seeds']}. Steps that students learnt for: {run['steps']}.\n"
    )
    return "\n".join(parts) + "\n" + _adapters(figures["adapters"])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    kinds = sorted({(row["rounds"], row["epsilon"]) for row in rows if row["feedback"] == "private"})
    rounds = sorted({number for number, _ in kinds})
    named = [f"{_rounds(number)}, ε = {epsilon:g}" for number, epsilon in kinds]
    gains = [["agents", *named, "nats: no feedback", "unprotected", "truth"]]
    distances = [["distance: agents", "no feedback", *named, *(f"unprotected, {_rounds(number)}" for number in rounds)]]
    for agents in sorted({row["agents"] for row in rows}):
        mine = {(row["rounds"], row["epsilon"] or row["feedback"]): row for row in rows if row["agents"] == agents}
        nats = [f"{mine[1, kind]['nats_per_token']:.3f}" for kind in ("none", "unprotected", "truth")]
        gains.append([f"{agents:,}", *(_share(mine[kind]["gain_share"]) for kind in kinds), *nats])
        order = [(1, "none"), *kinds, *((number, "unprotected") for number in rounds)]
        distances.append([f"{agents:,}", *(f"{mine[kind]['error']:.2f}" for kind in order)])
    return _lines(gains) + "\n\n" + _lines(distances)


def _rounds(number: int) -> str:
    return "a round" if number == 1 else "the window"


def _lines(cells: Sequence[Sequence[str]]) -> str:
    head, *body = cells
    return "\n".join(_line(line) for line in (head, ["---:"] * len(head), *body))


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _adapters(found: Iterable[dict[str, Any]]) -> str:
    heads = ["adapter updates: agents", "ε", "nats before", "after", "after, without noise"]
    heads += ["CPU-s of an agent", "kB up"]
    lines = [_line(heads), _line(["---:"] * len(heads))]
    for one in found:
        cells = [f"{one['agents']:,}", f"{one['epsilon']:g}", f"{one['nats_before']:.4f}"]
        if one["refusal"]:
            cells += ["refused", "", "", ""]
        else:
            cells += [f"{one['nats']:.4f}" + ("" if one["informative"] else " (noise: not used)")]
            cells += [f"{one['nats_without_noise']:.4f}", f"{one['cpu_s']:.1f}", f"{one['bytes_up'] / 1000:.1f}"]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
