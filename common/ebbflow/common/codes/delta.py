"""Deltas: the exact difference between two artefacts of the same precision, entropy-coded, and its application.

A delta is only a saving: it is not signed, the full file always exists, and who applies one checks the result against
the signed hash. `apply` therefore trusts nothing of a delta but may give any file of the promised length.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ebbflow.common.codes import compiled, container, delta_plan
from ebbflow.common.codes.artefact import read_variant
from ebbflow.common.codes.delta_head import FORMAT, Coding, Head, Mode, encode_head, read_head
from ebbflow.common.codes.differences import Unit, units_of
from ebbflow.common.codes.rans import Coded, Coder, UInt8, invalid, payload_most_bytes
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import atomic

__all__ = ["FORMAT", "DeltaInfo", "apply", "encode"]

_BATCH_BLOCKS = 128
"""Blocks decoded at once at most, since the coder in numpy makes a table for each of their streams."""


@dataclass(frozen=True)
class DeltaInfo:
    """What was made.

    Attributes:
        size_bytes: length of the delta.
        statistics: for people, ready for JSON. "tensors" has for each weight by name: "changed_share" of its numbers,
            "rescaled_share" of its groups whose scale changed, and "rms_steps", the root mean square of the differences
            of its codes (0 where it is not coded). Beside it "changed_share" and "rescaled_share" of all, and
            "entropy_bytes", the zero-order entropy of the differences: of single codes, and of low and high bytes of
            16-bit numbers, each tensor by itself.
    """

    size_bytes: int
    statistics: dict[str, Any]


def encode(base: Path, target: Path, out: Path, *, coder: Coder | None = None) -> DeltaInfo:
    """Writes the delta from one artefact to another, atomically. Memory does not grow with the model.

    Args:
        base: the old file.
        target: the new file, of the same precision.
        out: the delta; replaced if it exists.
        coder: None takes the fastest here; all give the same bytes.

    Raises:
        EbbflowError: FILE_CORRUPT if one of them is not a whole artefact; INVALID_REQUEST if they are of two
            precisions or have too many tensors; DISK_FULL.
    """
    coder = coder or compiled.best_coder()
    precisions = [read_variant(path).precision for path in (base, target)]
    if precisions[0] != precisions[1]:
        raise EbbflowError(Reason.INVALID_REQUEST, f"no delta leads from {precisions[0]} to {precisions[1]}")
    layouts = container.read_layout(base), container.read_layout(target)
    units = units_of(*layouts)
    with base.open("rb") as base_file, target.open("rb") as target_file:
        digests = [hashlib.file_digest(file, "sha256").digest() for file in (base_file, target_file)]
        surveys = [_survey(unit, base_file, target_file, coder) for unit in units]
        plan = delta_plan.choose(surveys)
        head = Head(digests[0], digests[1], layouts[1], units, plan.codings)
        with atomic(out, mode=0o644) as file:
            file.write(encode_head(head, layouts[0], plan.shared))
            _write_streams(file, head, base_file, target_file, coder)
            size_bytes = file.tell()
    return DeltaInfo(size_bytes, delta_plan.statistics(surveys))


def apply(
    base: Path,
    delta: Path,
    out: Path,
    *,
    target_size_bytes: int,
    base_sha256: str | None = None,
    coder: Coder | None = None,
) -> None:
    """Writes the file that a delta leads to, atomically, in memory that does not grow with the model.

    The result is any file of `target_size_bytes` until its hash has been checked; that is the caller's part.

    Args:
        base: the old file.
        delta: what to apply, from anyone.
        out: the file; replaced if it exists.
        target_size_bytes: its signed length; never more is written.
        base_sha256: hexadecimal digest of `base`, if known: a delta from another file is then refused at once, and
            not only by the hash of its result.
        coder: None takes the fastest here.

    Raises:
        EbbflowError: DELTA_INVALID if the delta is damaged or made for other files; DISK_FULL.
    """
    coder = coder or compiled.best_coder()
    try:
        layout = container.read_layout(base)
        with base.open("rb") as base_file, _opened(delta) as delta_file:
            head = read_head(delta_file, layout, target_size_bytes)
            if base_sha256 is not None and head.base_sha256.hex() != base_sha256:
                raise invalid("it leads from another file")
            with atomic(out, mode=0o644) as file:
                file.write(head.target.prefix)
                for batch in _batches(head, coder.batch_symbols):
                    container.write_blocks(file, _restore(batch, base_file, delta_file, coder))
                if delta_file.read(1):
                    raise invalid("it is too long")
    except EbbflowError as error:
        if error.reason is Reason.FILE_CORRUPT:
            raise invalid("the old file is not whole") from error
        raise


def _opened(delta: Path) -> BinaryIO:
    try:
        return delta.open("rb")
    except FileNotFoundError as error:
        raise invalid("it is not there") from error


@dataclass(frozen=True)
class _Block:
    """Some items of a tensor."""

    unit: Unit
    codings: Sequence[Coding]
    begin: int
    end: int

    @property
    def items(self) -> int:
        return self.end - self.begin


def _batches(head: Head, symbols: int) -> Iterator[list[_Block]]:
    """Yields the blocks in order, as many at once as the coder wants."""
    batch: list[_Block] = []
    size = 0
    for unit, codings in zip(head.units, head.codings, strict=True):
        for begin, end in unit.blocks():
            batch.append(_Block(unit, codings, begin, end))
            size += end - begin
            if size >= symbols or len(batch) == _BATCH_BLOCKS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _read_items(unit: Unit, file: BinaryIO, offset: int | None, begin: int, end: int) -> UInt8:
    """Reads the bytes of some items from a file that has the tensor at `offset`; zeros if it has none."""
    size_bytes = (end - begin) * unit.item_bytes
    if offset is None:
        return np.zeros(size_bytes, np.uint8)
    file.seek(offset + begin * unit.item_bytes)
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise EbbflowError(Reason.FILE_CORRUPT, "a file has become shorter while it was read")
    return np.frombuffer(data, np.uint8)


def _difference(unit: Unit, base: BinaryIO, target: BinaryIO, begin: int, end: int) -> list[UInt8]:
    """Symbols of each plane of some items."""
    old = _read_items(unit, base, unit.base_offset, begin, end)
    return unit.difference(old, _read_items(unit, target, unit.target_offset, begin, end))


def _survey(unit: Unit, base: BinaryIO, target: BinaryIO, coder: Coder) -> delta_plan.Survey:
    blocks = (_difference(unit, base, target, begin, end) for begin, end in unit.blocks())
    return delta_plan.survey(unit, blocks, coder)


def _write_streams(file: BinaryIO, head: Head, base: BinaryIO, target: BinaryIO, coder: Coder) -> None:
    for batch in _batches(head, coder.batch_symbols):
        streams = [
            (coding, symbols)
            for block in batch
            for coding, symbols in zip(
                block.codings, _difference(block.unit, base, target, block.begin, block.end), strict=True
            )
            if coding.mode is not Mode.CONSTANT
        ]
        coded = [(symbols, coding.frequencies) for coding, symbols in streams if coding.frequencies is not None]
        payloads = iter(coder.encode(coded))
        for coding, symbols in streams:
            if coding.mode is Mode.RAW:
                file.write(symbols.tobytes())
            else:
                payload = next(payloads)
                file.write(len(payload).to_bytes(4, "little") + payload)


def _restore(batch: list[_Block], base: BinaryIO, delta: BinaryIO, coder: Coder) -> Iterator[UInt8]:
    """Decodes the streams of some blocks and yields the bytes that they stand for."""
    found = [_read_stream(delta, coding, block.items) for block in batch for coding in block.codings]
    decoded = iter(coder.decode([stream for stream in found if isinstance(stream, Coded)]))
    symbols = iter([next(decoded) if isinstance(stream, Coded) else stream for stream in found])
    for block in batch:
        planes = [next(symbols) for _ in block.codings]
        old = _read_items(block.unit, base, block.unit.base_offset, block.begin, block.end)
        yield block.unit.restore(old, planes)


def _read_stream(delta: BinaryIO, coding: Coding, length: int) -> UInt8 | Coded:
    if coding.mode is Mode.CONSTANT:
        return np.full(length, coding.symbol, np.uint8)
    size_bytes = length if coding.mode is Mode.RAW else int.from_bytes(delta.read(4), "little")
    if size_bytes > payload_most_bytes(length):
        raise invalid("a stream is too long")
    payload = delta.read(size_bytes)
    if len(payload) != size_bytes:
        raise invalid("it is cut short")
    if coding.frequencies is None:
        return np.frombuffer(payload, np.uint8)
    return Coded(payload, length, coding.frequencies)
