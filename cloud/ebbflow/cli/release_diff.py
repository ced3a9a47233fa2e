"""What changed between two releases and what it costs to move, as plain lines. No IO."""

from collections.abc import Iterable, Iterator
from typing import Any

from ebbflow.cli.output import printable, table, word
from ebbflow.cli.quantities import percent, size, transfer_time
from ebbflow.cli.values import short_release

LINES_MBIT = (1, 10, 100)
"""Speeds of the lines for which the time to move is told, in Mbit/s."""
TENSORS = 10
"""Tensors that are shown; JSON has all."""


def lines(answer: Any, base: Any, target: Any, tensors: int = TENSORS) -> list[str]:
    """Returns the comparison of a `CompareReleasesResponse`.

    Args:
        answer: the comparison.
        base: the `Release` to begin from; its variants say whose figures its card holds.
        target: the `Release` to move to.
        tensors: most tensors to show.
    """
    names = short_release(base.name), short_release(target.name)
    changed = answer.configuration or ["none"]
    known = [
        f"tokenizer      {'changed' if answer.tokenizer_changed else 'the same'}",
        *(f"{'configuration' if index == 0 else '':13}  {printable(text)}" for index, text in enumerate(changed)),
    ]
    return [
        " -> ".join(names),
        "",
        *_costs(answer.variants),
        "",
        *known,
        *_tensors(answer.tensors, tensors),
        "",
        *table(["MEASURED BY THE GATE", *names, "CHANGE"], list(_cards(answer, base, target))),
    ]


def _costs(changes: Iterable[Any]) -> list[str]:
    from ebbflow.api.v1.resources_pb2 import Precision

    heads = ["PRECISION", "FULL", "DELTA", "SHARE", "CHANGED", *(f"AT {speed} MBIT/S" for speed in LINES_MBIT)]
    rows = []
    for change in changes:
        moved_bytes = change.delta_bytes or change.full_bytes
        delta = (size(change.delta_bytes), percent(change.delta_bytes / change.full_bytes))
        times = [transfer_time(moved_bytes, speed * 1e6) for speed in LINES_MBIT]
        rows.append(
            [
                word(Precision, change.precision),
                size(change.full_bytes),
                *(delta if change.delta_bytes else ("none", "100 %")),
                percent(change.changed_share),
                *times,
            ]
        )
    return table(heads, rows) if rows else ["no precision is in both releases"]


def _tensors(changes: Any, most: int) -> list[str]:
    if not changes:
        return []
    shown = changes[:most]
    rows = [
        [printable(one.tensor), percent(one.changed_share), percent(one.rescaled_share), f"{one.rms_steps:.3g}"]
        for one in shown
    ]
    left = len(changes) - len(shown)
    more = [f"... and {left} tensors that changed less"] if left else []
    return ["", *table(["TENSOR", "CODES CHANGED", "GROUPS RESCALED", "RMS CHANGE (STEPS)"], rows), *more]


def _cards(answer: Any, base: Any, target: Any) -> Iterator[list[str]]:
    old, new = answer.base_card, answer.target_card
    yield from _by_precision("bits per byte", base, old.bits_per_byte, target, new.bits_per_byte)
    yield from _by_precision("probe loss", base, old.probe_loss, target, new.probe_loss)
    for topic in sorted({*old.topic_bits_per_byte, *new.topic_bits_per_byte}):
        measured = (card.topic_bits_per_byte.get(topic) for card in (old, new))
        yield [f"topic {printable(topic)}", *_beside(*measured)]
    yield ["feedback epsilon", f"{old.feedback_epsilon:g}", f"{new.feedback_epsilon:g}", ""]
    yield ["training epsilon", f"{old.training_epsilon:.3g}", f"{new.training_epsilon:.3g}", ""]


def _by_precision(what: str, base: Any, old: Iterable[float], target: Any, new: Iterable[float]) -> Iterator[list[str]]:
    """Figures of a card are in the order of its release's variants, and releases may have different ones."""
    from ebbflow.api.v1.resources_pb2 import Precision

    before = dict(zip((variant.precision for variant in base.variants), old, strict=False))
    after = dict(zip((variant.precision for variant in target.variants), new, strict=False))
    for precision in dict.fromkeys([*before, *after]):
        yield [f"{what} {word(Precision, precision)}", *_beside(before.get(precision), after.get(precision))]


def _beside(before: float | None, after: float | None) -> list[str]:
    texts = ["-" if value is None else f"{value:.4f}" for value in (before, after)]
    change = "" if before is None or after is None else f"{after - before:+.4f}"
    return [*texts, change]
