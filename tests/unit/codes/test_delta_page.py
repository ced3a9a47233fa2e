"""docs/reference/delta-format.md says enough: a slow reader written from that page alone restores the new file."""

import dataclasses
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ebbflow.common.codes import artefact, delta
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.student.config import StudentConfig

SIZES = {"BF16": 2, "F16": 2, "I8": 1, "U8": 1}
PLANES = ("codes", "scales-low", "scales-high", "numbers-low", "numbers-high")
PLANES_OF = {"I8": PLANES[:1], "U8": PLANES[:1], "F16": PLANES[1:3], "BF16": PLANES[3:]}
BLOCK = 262_144


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        self.at += count
        assert self.at <= len(self.data)
        return self.data[self.at - count : self.at]

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")


def tensors_of(beginning: bytes) -> dict[str, tuple[str, list[int], int, int]]:
    """Type, shape, place and length of each tensor, in the order of the file."""
    length = int.from_bytes(beginning[:8], "little")
    header: dict[str, Any] = json.loads(beginning[8 : 8 + length])
    header.pop("__metadata__")
    rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    found = {}
    for name, entry in rows:
        first, last = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], 8 + length + first, last - first)
    return found


def table_of(rest: Bytes) -> dict[int, int]:
    count = rest.number(1) + 1
    symbols = list(rest.take(count))
    return {symbol: rest.number(2) for symbol in symbols}


def coding_of(rest: Bytes, shared: dict[int, int] | None) -> tuple[int, Any]:
    mode = rest.number(1)
    if mode == 0:
        return mode, rest.number(1)
    return mode, {1: None, 2: shared}.get(mode) if mode != 3 else table_of(rest)


def unpacked(payload: bytes, count: int, shares: dict[int, int]) -> bytes:
    lanes = -(-count // 4096)
    states = list(struct.unpack(f"<{lanes}I", payload[: 4 * lanes]))
    words = iter(struct.unpack(f"<{(len(payload) - 4 * lanes) // 2}H", payload[4 * lanes :]))
    begins, begin = {}, 0
    for symbol in sorted(shares):
        begins[symbol], begin = begin, begin + shares[symbol]
    by_slot = [symbol for symbol in sorted(shares) for _ in range(shares[symbol])]
    found = bytearray()
    for i in range(count):
        x = states[i % lanes]
        symbol = by_slot[x % 16384]
        x = shares[symbol] * (x // 16384) + x % 16384 - begins[symbol]
        if x < 65536:
            x = x * 65536 + next(words)
        states[i % lanes] = x
        found.append(symbol)
    assert set(states) == {65536}
    assert next(words, None) is None
    return bytes(found)


def rank(bits: int) -> int:
    return bits ^ 0xFFFF if bits & 0x8000 else bits | 0x8000


def bits_of(rank_: int) -> int:
    return rank_ & 0x7FFF if rank_ & 0x8000 else rank_ ^ 0xFFFF


def words_after(old: bytes, low: bytes, high: bytes) -> bytes:
    found = []
    for (before,), step in zip(struct.iter_unpack("<H", old), map(lambda a, b: a + 256 * b, low, high), strict=True):
        signed = step // 2 if step % 2 == 0 else -(step + 1) // 2
        found.append(bits_of((rank(before) + signed) % 65536))
    return struct.pack(f"<{len(found)}H", *found)


def codes_after(kind: str, old: bytes, symbols: bytes) -> bytes:
    if kind == "I8":
        return bytes((a + b) % 256 for a, b in zip(old, symbols, strict=True))
    return bytes((a + b) % 16 + 16 * ((a // 16 + b // 16) % 16) for a, b in zip(old, symbols, strict=True))


def read(base: bytes, data: bytes) -> bytes:
    file = Bytes(data)
    assert file.take(16) == b"ebbflow.delta/1\0"
    file.take(64)
    assert file.number(8) == len(base)
    target = bytearray(file.number(8))
    deflated, plain = file.number(4), file.number(4)
    rest = Bytes(zlib.decompress(file.take(deflated)))
    assert len(rest.data) == plain
    old_beginning = base[: 8 + int.from_bytes(base[:8], "little")]
    beginning = rest.take(rest.number(4)) or old_beginning
    target[: len(beginning)] = beginning
    shared = {plane: table_of(rest) for plane in PLANES if rest.number(1)}
    old, new = tensors_of(base), tensors_of(beginning)
    codings = {
        name: [coding_of(rest, shared.get(plane)) for plane in PLANES_OF[kind]] for name, (kind, *_) in new.items()
    }
    assert rest.at == len(rest.data)
    for name, (kind, shape, at, length) in new.items():
        size = SIZES[kind]
        for begin in range(0, length // size, BLOCK):
            count = min(BLOCK, length // size - begin)
            symbols = [streamed(file, mode, detail, count) for mode, detail in codings[name]]
            before = bytes(count * size)
            if name in old and old[name][:2] == (kind, shape):
                first = old[name][2] + begin * size
                before = base[first : first + count * size]
            after = words_after(before, *symbols) if size == 2 else codes_after(kind, before, symbols[0])
            target[at + begin * size : at + (begin + count) * size] = after
    assert file.at == len(data)
    return bytes(target)


def streamed(file: Bytes, mode: int, detail: Any, length: int) -> bytes:
    if mode == 0:
        return bytes([detail]) * length
    return file.take(length) if mode == 1 else unpacked(file.take(file.number(4)), length, detail)


CONFIG = StudentConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=64,
)


def weights(config: StudentConfig, seed: int, step: float = 0.0) -> dict[str, Float32]:
    """Random weights, `step` of their size away from those of the seed alone."""
    dice, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    return {
        name: (dice.normal(0, 0.05, shape) + step * other.normal(0, 0.05, shape)).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }


def check(folder: Path) -> None:
    delta.encode(folder / "old", folder / "new", folder / "delta")
    restored = read((folder / "old").read_bytes(), (folder / "delta").read_bytes())
    assert restored == (folder / "new").read_bytes()


@pytest.mark.parametrize("precision", artefact.PRECISIONS)
@pytest.mark.parametrize("step", [0.0, 0.002, 0.3])
def test_a_reader_written_from_the_page_restores_the_file(
    tmp_path: Path, precision: artefact.Precision, step: float
) -> None:
    old, new = weights(CONFIG, 7), weights(CONFIG, 7, step)
    artefact.write_variant(tmp_path / "kept", old, CONFIG, "int8")
    kept = artefact.read_variant(tmp_path / "kept") if precision != "bf16" else None
    artefact.write_variant(tmp_path / "old", old, CONFIG, precision)
    artefact.write_variant(tmp_path / "new", new, CONFIG, precision, kept)
    check(tmp_path)


@pytest.mark.parametrize("precision", artefact.PRECISIONS)
def test_it_does_so_too_for_another_shape_and_for_many_blocks(tmp_path: Path, precision: artefact.Precision) -> None:
    larger = dataclasses.replace(CONFIG, vocab_size=9000, num_hidden_layers=1)
    artefact.write_variant(tmp_path / "old", weights(CONFIG, 7), CONFIG, precision)
    artefact.write_variant(tmp_path / "new", weights(larger, 7), larger, precision)
    check(tmp_path)
