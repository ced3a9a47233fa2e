"""The entropy coder of deltas: static rANS over bytes, in numpy; the reference, and what runs without a compiler.

A table gives each of 256 symbols a share of 2^14. A stream of n symbols is coded in ceil(n / 4096) lanes: symbol i is
lane i mod lanes. A lane is a state in [2^16, 2^32); all lanes share one sequence of 16-bit words, in the order in
which a reader that goes through the symbols needs them. A payload is the final states, then the words, little-endian.
A reader ends with every state at 2^16 and no word left, or the payload is damaged.

Many streams are coded at once here, since numpy is fast only over thousands of lanes. `compiled` does the same in C.

Source of the method: J. Duda, "Asymmetric numeral systems", arXiv 1311.2540; interleaving as in F. Giesen, "Interleaved
entropy coders", arXiv 1402.3392.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]
Int64 = npt.NDArray[np.int64]

PROBABILITY_BITS = 14
TOTAL = 1 << PROBABILITY_BITS
STREAM_MOST = 1 << 18
"""Symbols of a stream at most."""
_LANE_SYMBOLS = 1 << 12
_LOWEST_STATE = np.uint32(1 << 16)
_SYMBOLS = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True)
class Coded:
    """One stream: its payload and what is needed to read it."""

    payload: bytes
    length: int
    """Symbols."""
    frequencies: UInt16
    """Share of each symbol, of `TOTAL`."""


class Coder(Protocol):
    """Codes and decodes streams; every coder gives the same bytes."""

    batch_symbols: int
    """Symbols that it should get in one call to be fast."""

    def count(self, symbols: UInt8) -> Int64:
        """Returns how often each of the 256 symbols occurs."""
        ...

    def encode(self, streams: Sequence[tuple[UInt8, UInt16]]) -> list[bytes]:
        """Returns the payload of each stream of (symbols, frequencies); a symbol that occurs has a share."""
        ...

    def decode(self, streams: Sequence[Coded]) -> list[UInt8]:
        """Returns the symbols of each stream.

        Raises:
            EbbflowError: DELTA_INVALID if a payload is damaged.
        """
        ...


def lanes_of(length: int) -> int:
    """Lanes of a stream."""
    return -(-length // _LANE_SYMBOLS)


def payload_most_bytes(length: int) -> int:
    """Length of a stream's payload at most."""
    return 4 * lanes_of(length) + 2 * length


def normalise(counts: Int64) -> UInt16:
    """Returns shares of `TOTAL` for what occurs, each at least 1; all 0 if fewer than two symbols occur."""
    used = counts > 0
    if int(used.sum()) < 2:  # noqa: PLR2004 - a stream of one symbol needs no coder
        return np.zeros(256, np.uint16)
    frequencies = np.where(used, np.maximum(np.rint(counts / counts.sum() * TOTAL), 1), 0).astype(np.int64)
    while (excess := int(frequencies.sum()) - TOTAL) != 0:
        # What costs least: the largest share gives or takes, but never more than it can.
        largest = int(frequencies.argmax())
        frequencies[largest] -= min(excess, max(1, int(frequencies[largest]) // 2)) if excess > 0 else excess
    return frequencies.astype(np.uint16)


def invalid(what: str) -> EbbflowError:
    """Returns the error of every damaged delta."""
    return EbbflowError(Reason.DELTA_INVALID, f"the delta is damaged: {what}")


class NumpyCoder:
    """The coder in numpy."""

    batch_symbols = 1 << 23

    def count(self, symbols: UInt8) -> Int64:
        """Counts."""
        return np.bincount(symbols, minlength=256)

    def encode(self, streams: Sequence[tuple[UInt8, UInt16]]) -> list[bytes]:
        """Codes all streams at once, the last symbol of each lane first."""
        if not streams:
            return []
        lanes = _Lanes([symbols.size for symbols, _ in streams])
        shares, begins = _tables([frequencies for _, frequencies in streams])
        rows_TW = lanes.spread([symbols for symbols, _ in streams])
        states = np.full(lanes.width, _LOWEST_STATE, np.uint32)
        words: list[UInt16] = []
        owners: list[Int64] = []
        for first, last, active in lanes.phases(backward=True):
            x, base, stream = states[active], lanes.stream[active] * 256, lanes.stream[active]
            for t in range(last - 1, first - 1, -1):
                index = rows_TW[t, active] + base
                share = shares[index]
                full = np.flatnonzero(x >= share << np.uint32(32 - PROBABILITY_BITS))
                words.append((x[full] & np.uint32(0xFFFF)).astype(np.uint16))
                owners.append(stream[full])
                x[full] >>= np.uint32(16)
                whole = x // share
                x = (whole << np.uint32(PROBABILITY_BITS)) + (x - whole * share) + begins[index]
            states[active] = x
        return lanes.payloads(states, words[::-1], owners[::-1])

    def decode(self, streams: Sequence[Coded]) -> list[UInt8]:
        """Decodes all streams at once."""
        if not streams:
            return []
        lanes = _Lanes([stream.length for stream in streams])
        shares, begins = _tables([stream.frequencies for stream in streams])
        symbol_of = np.concatenate([np.repeat(_SYMBOLS, stream.frequencies) for stream in streams])
        states, words, at, ends = lanes.split([stream.payload for stream in streams])
        rows_TW = np.empty((lanes.steps, lanes.width), np.uint8)
        for first, last, active in lanes.phases(backward=False):
            x, stream = states[active], lanes.stream[active]
            slots, symbols_at = stream << PROBABILITY_BITS, stream << 8
            whole_row = active.size == lanes.width
            for t in range(first, last):
                slot = x & np.uint32(TOTAL - 1)
                symbols = symbol_of[slots + slot]
                if whole_row:
                    rows_TW[t] = symbols
                else:
                    rows_TW[t, active] = symbols
                index = symbols_at + symbols
                x = shares[index] * (x >> np.uint32(PROBABILITY_BITS)) + (slot - begins[index])
                low = np.flatnonzero(x < _LOWEST_STATE)
                owners = stream[low]
                taken = np.bincount(owners, minlength=len(streams))
                word = (at - (np.cumsum(taken) - taken))[owners] + np.arange(low.size)
                x[low] = x[low] << np.uint32(16) | words[word]
                at += taken
                if bool((at > ends).any()):
                    raise invalid("a stream ends too early")
            states[active] = x
        if bool((at != ends).any()) or bool((states != _LOWEST_STATE).any()):
            raise invalid("a stream does not come out even")
        return lanes.gather(rows_TW)


def _tables(frequencies: Sequence[UInt16]) -> tuple[UInt32, UInt32]:
    """Share and beginning of each symbol, 256 for each stream."""
    shares = np.concatenate(frequencies).astype(np.uint32)
    begins = np.concatenate([np.cumsum(f, dtype=np.uint32) - f for f in frequencies]).astype(np.uint32)
    return shares, begins


class _Lanes:
    """The lanes of several streams beside each other: column by column of a table with one row for each step."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._counts = [lanes_of(length) for length in lengths]
        self._begins = np.cumsum([0, *self._counts])
        self.width = int(self._begins[-1])
        self.stream: Int64 = np.repeat(np.arange(len(lengths)), self._counts)
        """Stream of each lane."""
        own = [-(-(length - np.arange(n)) // n) for length, n in zip(lengths, self._counts, strict=True) if n]
        self._symbols: Int64 = np.concatenate([*own, np.zeros(0, np.int64)]).astype(np.int64)
        self.steps = int(self._symbols.max(initial=0))

    def phases(self, *, backward: bool) -> Iterator[tuple[int, int, Int64]]:
        """Yields (first step, step behind the last, lanes that have a symbol in them)."""
        bounds = [0, *(int(n) for n in np.unique(self._symbols))]
        pairs = [(a, b) for a, b in itertools.pairwise(bounds) if b > a]
        for first, last in reversed(pairs) if backward else pairs:
            yield first, last, np.flatnonzero(self._symbols >= last)

    def spread(self, streams: Sequence[UInt8]) -> UInt8:
        """Puts symbols into the table."""
        rows_TW = np.zeros((self.steps, self.width), np.uint8)
        for stream, symbols in enumerate(streams):
            begin, lanes = int(self._begins[stream]), self._counts[stream]
            if lanes:
                whole = symbols.size // lanes
                rows_TW[:whole, begin : begin + lanes] = symbols[: whole * lanes].reshape(whole, lanes)
                rest = symbols[whole * lanes :]
                rows_TW[whole : whole + 1, begin : begin + rest.size] = rest
        return rows_TW

    def gather(self, rows_TW: UInt8) -> list[UInt8]:
        """Undoes `spread`."""
        streams: list[UInt8] = []
        for begin, lanes, length in zip(self._begins, self._counts, self._lengths, strict=False):
            steps = -(-length // lanes) if lanes else 0
            streams.append(rows_TW[:steps, begin : begin + lanes].reshape(-1)[:length])
        return streams

    def payloads(self, states: UInt32, words: Sequence[UInt16], owners: Sequence[Int64]) -> list[bytes]:
        """Sorts words by their streams and puts the states before them."""
        all_words = np.concatenate([*words, np.zeros(0, np.uint16)])
        all_owners = np.concatenate([*owners, np.zeros(0, np.int64)])
        order = np.argsort(all_owners, kind="stable")
        bounds = np.cumsum([0, *np.bincount(all_owners, minlength=len(self._lengths))])
        return [
            states[self._begins[i] : self._begins[i + 1]].astype("<u4").tobytes()
            + all_words[order[bounds[i] : bounds[i + 1]]].astype("<u2").tobytes()
            for i in range(len(self._lengths))
        ]

    def split(self, payloads: Sequence[bytes]) -> tuple[UInt32, UInt32, Int64, Int64]:
        """Returns the states, all words, and where each stream's words begin and end."""
        states: list[UInt32] = []
        words: list[UInt32] = []
        for payload, lanes in zip(payloads, self._counts, strict=True):
            if len(payload) < 4 * lanes or len(payload) % 2:
                raise invalid("a stream has an impossible length")
            states.append(np.frombuffer(payload, "<u4", lanes).astype(np.uint32))
            words.append(np.frombuffer(payload, "<u2", offset=4 * lanes).astype(np.uint32))
        ends = np.cumsum([piece.size for piece in words])
        at = ends - [piece.size for piece in words]
        # A step may look one word a lane too far before it is found out.
        words.append(np.zeros(self.width + 1, np.uint32))
        return np.concatenate(states), np.concatenate(words), at, ends
