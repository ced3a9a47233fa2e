"""Decides, from the counts of all differences, how each plane of a delta is coded; and what to say about it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ebbflow.common.codes.container import CODES, SCALES
from ebbflow.common.codes.delta_head import Coding, Mode
from ebbflow.common.codes.differences import Plane, Unit
from ebbflow.common.codes.rans import PROBABILITY_BITS, Coder, Int64, UInt8, UInt16, normalise

_TABLE_BYTES_PER_SYMBOL = 2.5
"""Of a table in the deflated head, about."""


@dataclass(frozen=True)
class Survey:
    """Counts of one tensor."""

    unit: Unit
    counts: tuple[Int64, ...]
    """Occurrences of each symbol in each plane."""
    changed: int
    """Items that differ."""


@dataclass(frozen=True)
class Plan:
    """How to code."""

    codings: Sequence[Sequence[Coding]]
    """Of each plane of each unit."""
    shared: Mapping[Plane, UInt16]
    """Tables of the planes of one kind together."""


def survey(unit: Unit, blocks: Iterable[list[UInt8]], coder: Coder) -> Survey:
    """Counts the symbols of a tensor, from its differences block by block."""
    counts = np.zeros((len(unit.planes), 256), np.int64)
    changed = 0
    for symbols in blocks:
        counts += [coder.count(plane) for plane in symbols]
        changed += int(np.count_nonzero(symbols[0] | symbols[-1]))
    return Survey(unit, tuple(counts), changed)


def choose(surveys: Sequence[Survey]) -> Plan:
    """Gives each plane the shortest way: constant, raw, its own table, or that of all planes of its kind."""
    together: dict[Plane, Int64] = {}
    for found in surveys:
        for plane, counts in zip(found.unit.planes, found.counts, strict=True):
            if int(np.count_nonzero(counts)) > 1:
                together[plane] = together.get(plane, np.zeros(256, np.int64)) + counts
    tables = {plane: normalise(counts) for plane, counts in together.items()}
    codings = [
        [_choose(counts, tables.get(plane)) for plane, counts in zip(found.unit.planes, found.counts, strict=True)]
        for found in surveys
    ]
    used = {
        plane
        for found, chosen in zip(surveys, codings, strict=True)
        for plane, coding in zip(found.unit.planes, chosen, strict=True)
        if coding.mode is Mode.SHARED
    }
    return Plan(codings, {plane: table for plane, table in tables.items() if plane in used})


def _choose(counts: Int64, shared: UInt16 | None) -> Coding:
    occurring = np.flatnonzero(counts)
    if shared is None or occurring.size < 2:  # noqa: PLR2004 - nothing, or one symbol only
        return Coding(Mode.CONSTANT, symbol=int(counts.argmax()))
    own = normalise(counts)
    costs = {
        Mode.RAW: float(counts.sum()),
        Mode.SHARED: _cost_bytes(counts, shared),
        Mode.OWN: _cost_bytes(counts, own) + 1 + occurring.size * _TABLE_BYTES_PER_SYMBOL,
    }
    mode = min(costs, key=lambda mode: costs[mode])
    return Coding(mode, frequencies={Mode.SHARED: shared, Mode.OWN: own}.get(mode))


def _cost_bytes(counts: Int64, frequencies: UInt16) -> float:
    used = counts > 0
    bits = PROBABILITY_BITS - np.log2(frequencies[used].astype(np.float64))
    return float(np.dot(counts[used], bits)) / 8


def statistics(surveys: Sequence[Survey]) -> dict[str, Any]:
    """Returns what `DeltaInfo.statistics` says."""
    tensors: dict[str, dict[str, float]] = {}
    totals = np.zeros(4)
    for found in surveys:
        weight = found.unit.name.removesuffix(CODES).removesuffix(SCALES)
        said = tensors.setdefault(weight, {"changed_share": 0.0, "rescaled_share": 0.0, "rms_steps": 0.0})
        changed, numbers, squared = _changes(found)
        if found.unit.dtype == "F16":
            said["rescaled_share"] = changed / max(numbers, 1)
            totals += (0, 0, changed, numbers)
        else:
            said["changed_share"] = changed / max(numbers, 1)
            said["rms_steps"] = math.sqrt(squared / max(numbers, 1))
            totals += (changed, numbers, 0, 0)
    return {
        "tensors": tensors,
        "changed_share": float(totals[0] / max(totals[1], 1)),
        "rescaled_share": float(totals[2] / max(totals[3], 1)),
        "entropy_bytes": round(sum(_entropy_bytes(counts) for found in surveys for counts in _counts(found))),
    }


def _changes(found: Survey) -> tuple[int, int, float]:
    """How many numbers differ, of how many, and the sum of the squared differences of codes."""
    if found.unit.dtype in {"F16", "BF16"}:
        return found.changed, found.unit.items, 0.0
    (counts,) = _counts(found)
    half = counts.size // 2
    steps = (np.arange(counts.size) + half) % counts.size - half
    return int(counts[1:].sum()), int(counts.sum()), float(np.dot(counts, steps.astype(np.float64) ** 2))


def _counts(found: Survey) -> Sequence[Int64]:
    """Occurrences of each difference: of single codes, or in each plane."""
    if found.unit.dtype != "U8":
        return found.counts
    pairs = found.counts[0].reshape(16, 16)
    return (pairs.sum(axis=0) + pairs.sum(axis=1),)


def _entropy_bytes(counts: Int64) -> float:
    used = counts[counts > 0].astype(np.float64)
    return float(np.dot(used, np.log2(used.sum() / used))) / 8
