"""The head of a delta: which files it leads from and to, and how each stream is coded.

    16 bytes  "ebbflow.delta/1" and a zero
    32, 32    SHA-256 of the old and of the new file
    8, 8      their lengths in bytes
    4, 4      length of the rest of the head as it lies here, and inflated
    ...       the rest, deflated (zlib)

The rest holds the new file's own beginning (4 bytes of length, 0 if it is the old file's), a shared table for each kind
of plane (one byte: is there one; then the table), and for each plane of each unit how it is coded (one byte of `Mode`)
with its only symbol or its own table. A table is the number of its symbols less one, the symbols, their shares (2 bytes
each). All numbers are little-endian.

Behind the head lie the streams, in the order of units, blocks and planes: of a constant plane nothing, of a raw one its
symbols, of any other 4 bytes of length and the rANS payload.
"""

import enum
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ebbflow.common.codes.container import Layout, parse_prefix
from ebbflow.common.codes.differences import PLANES, Plane, Unit, units_of
from ebbflow.common.codes.rans import TOTAL, UInt16, invalid
from ebbflow.common.errors import EbbflowError, Reason

FORMAT = "ebbflow.delta/1"

_MAGIC = FORMAT.encode() + b"\0"
_START = struct.Struct("<16s32s32sQQII")
REST_MOST_BYTES = 1 << 20
"""Inflated, at most: room for thousands of matrices, and what a hostile head can cost."""


class Mode(enum.IntEnum):
    """How a plane's streams are coded."""

    CONSTANT = 0
    RAW = 1
    SHARED = 2
    OWN = 3


@dataclass(frozen=True)
class Coding:
    """How one plane of one unit is coded."""

    mode: Mode
    symbol: int = 0
    """The only one of a constant plane."""
    frequencies: UInt16 | None = None
    """Shares of the symbols, if it is entropy-coded."""


@dataclass(frozen=True)
class Head:
    """What a reader knows before the first stream.

    Attributes:
        base_sha256: of the old file.
        target_sha256: of the new file.
        target: where everything is in the new file.
        units: its pieces.
        codings: of each plane of each unit.
    """

    base_sha256: bytes
    target_sha256: bytes
    target: Layout
    units: Sequence[Unit]
    codings: Sequence[Sequence[Coding]]


def encode_head(head: Head, base: Layout, shared: Mapping[Plane, UInt16]) -> bytes:
    """Returns the bytes before the first stream.

    Raises:
        EbbflowError: INVALID_REQUEST if the new file has too many tensors for a delta.
    """
    prefix = b"" if head.target.prefix == base.prefix else head.target.prefix
    rest = [struct.pack("<I", len(prefix)), prefix]
    rest.extend(b"\1" + _encode_table(shared[plane]) if plane in shared else b"\0" for plane in PLANES)
    for coding in (coding for codings in head.codings for coding in codings):
        rest.append(bytes([coding.mode]))
        if coding.mode is Mode.CONSTANT:
            rest.append(bytes([coding.symbol]))
        elif coding.mode is Mode.OWN and coding.frequencies is not None:
            rest.append(_encode_table(coding.frequencies))
    plain = b"".join(rest)
    if len(plain) > REST_MOST_BYTES:
        raise EbbflowError(Reason.INVALID_REQUEST, "the file has too many tensors for a delta")
    deflated = zlib.compress(plain, 9)
    sizes = base.size_bytes, head.target.size_bytes, len(deflated), len(plain)
    return _START.pack(_MAGIC, head.base_sha256, head.target_sha256, *sizes) + deflated


def read_head(file: BinaryIO, base: Layout, target_size_bytes: int) -> Head:
    """Reads and checks the head of a delta.

    Raises:
        EbbflowError: DELTA_INVALID if it is damaged, or does not lead from `base` to a file of that length.
    """
    start = file.read(_START.size)
    if len(start) < _START.size:
        raise invalid("it is cut short")
    magic, base_sha256, target_sha256, base_bytes, target_bytes, deflated_bytes, plain_bytes = _START.unpack(start)
    if magic != _MAGIC:
        raise invalid("it is of another format")
    if base_bytes != base.size_bytes or target_bytes != target_size_bytes:
        raise invalid("it leads from or to another file")
    if max(deflated_bytes, plain_bytes) > REST_MOST_BYTES:
        raise invalid("its head is too long")
    rest = _Reader(_inflate(file.read(deflated_bytes), plain_bytes))
    target = _read_target(rest.take(rest.number()), base, target_size_bytes)
    units = units_of(base, target)
    shared = {plane: _read_table(rest) for plane in PLANES if rest.byte()}
    codings = [[_read_coding(rest, shared.get(plane)) for plane in unit.planes] for unit in units]
    if rest.left:
        raise invalid("its head is too long")
    return Head(base_sha256, target_sha256, target, units, codings)


def _inflate(deflated: bytes, plain_bytes: int) -> bytes:
    try:
        inflater = zlib.decompressobj()
        plain = inflater.decompress(deflated, plain_bytes + 1)
    except zlib.error as error:
        raise invalid("its head cannot be inflated") from error
    if len(plain) != plain_bytes or not inflater.eof or inflater.unused_data:
        raise invalid("its head has another length than it says")
    return plain


def _read_target(prefix: bytes, base: Layout, size_bytes: int) -> Layout:
    try:
        return parse_prefix(prefix or base.prefix, size_bytes)
    except (ValueError, RecursionError) as error:
        raise invalid("the new file's header is malformed") from error


def _read_coding(rest: "_Reader", shared: UInt16 | None) -> Coding:
    mode = rest.byte()
    if mode == Mode.CONSTANT:
        return Coding(Mode.CONSTANT, symbol=rest.byte())
    if mode == Mode.RAW:
        return Coding(Mode.RAW)
    frequencies = _read_table(rest) if mode == Mode.OWN else shared
    if mode > Mode.OWN or frequencies is None:
        raise invalid("a plane has no table")
    return Coding(Mode(mode), frequencies=frequencies)


def _encode_table(frequencies: UInt16) -> bytes:
    used = np.flatnonzero(frequencies)
    return bytes([used.size - 1]) + used.astype(np.uint8).tobytes() + frequencies[used].astype("<u2").tobytes()


def _read_table(rest: "_Reader") -> UInt16:
    symbols_count = rest.byte() + 1
    symbols = np.frombuffer(rest.take(symbols_count), np.uint8)
    shares = np.frombuffer(rest.take(2 * symbols_count), "<u2")
    if int(shares.astype(np.int64).sum()) != TOTAL or int(shares.max()) >= TOTAL or int(shares.min()) == 0:
        raise invalid("the shares of a table do not add up")
    frequencies = np.zeros(256, np.uint16)
    frequencies[symbols] = shares
    if int(np.count_nonzero(frequencies)) != symbols_count:
        raise invalid("a table names a symbol twice")
    return frequencies


class _Reader:
    """Takes bytes from the front, never more than there are."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size_bytes: int) -> bytes:
        if size_bytes > self.left:
            raise invalid("its head is cut short")
        self._at += size_bytes
        return self._data[self._at - size_bytes : self._at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self) -> int:
        return int.from_bytes(self.take(4), "little")
