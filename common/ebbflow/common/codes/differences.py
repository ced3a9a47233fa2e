"""Differences of two tensors as streams of bytes, and back: integers only, so that all machines compute the same.

Each tensor of a file is a unit, worked on in blocks, and gives one symbol stream for each of its planes:

- int8 codes: the difference modulo 256;
- int4 codes: the difference of each nibble modulo 16, two to a byte as they lie in the file;
- 16-bit floats (scales, bfloat16): the difference of their ranks in the order of the numbers, zig-zag coded, low bytes
  and high bytes apart.

Measured and left out: where a scale changed, to expect the old codes at the new scale. With scales that only grow it
saves less than 1 % of a delta.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ebbflow.common.codes.container import Layout

UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]

Plane = Literal["codes", "scales-low", "scales-high", "numbers-low", "numbers-high"]
PLANES: tuple[Plane, ...] = ("codes", "scales-low", "scales-high", "numbers-low", "numbers-high")

BLOCK_ITEMS = 1 << 18
"""Numbers of a block, or bytes of two int4 codes."""
_PLANES_OF: dict[str, tuple[Plane, ...]] = {
    "I8": ("codes",),
    "U8": ("codes",),
    "F16": ("scales-low", "scales-high"),
    "BF16": ("numbers-low", "numbers-high"),
}
_LOW_NIBBLE, _HIGH_NIBBLE = np.uint8(0x0F), np.uint8(0xF0)


@dataclass(frozen=True)
class Unit:
    """One tensor of the new file.

    Attributes:
        name: in the file.
        dtype: as in the file: "I8" is int8 codes, "U8" packed int4 codes, "F16" scales, "BF16" what is not coded.
        items: numbers, or bytes of two int4 codes.
        item_bytes: bytes of each.
        target_offset: where it lies in the new file.
        base_offset: where it lies in the old file; None if that has no such tensor, which then counts as zeros.
    """

    name: str
    dtype: str
    items: int
    item_bytes: int
    target_offset: int
    base_offset: int | None

    @property
    def planes(self) -> tuple[Plane, ...]:
        """Its streams, each with one symbol for each item."""
        return _PLANES_OF[self.dtype]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yields items from and to."""
        return ((begin, min(begin + BLOCK_ITEMS, self.items)) for begin in range(0, self.items, BLOCK_ITEMS))

    def difference(self, base: UInt8, target: UInt8) -> list[UInt8]:
        """Returns the symbols of each plane, for the bytes of some items."""
        if self.dtype == "I8":
            return [target - base]
        if self.dtype == "U8":
            low, high = (target - base) & _LOW_NIBBLE, (target - (base & _HIGH_NIBBLE)) & _HIGH_NIBBLE
            return [low | high]
        return _floats_apart(base.view("<u2"), target.view("<u2"))

    def restore(self, base: UInt8, planes: list[UInt8]) -> UInt8:
        """Undoes `difference`: returns the bytes of the new file."""
        if self.dtype == "I8":
            return base + planes[0]
        if self.dtype == "U8":
            low, high = (base + planes[0]) & _LOW_NIBBLE, (base + (planes[0] & _HIGH_NIBBLE)) & _HIGH_NIBBLE
            return low | high
        return _floats_together(base.view("<u2"), *planes).astype("<u2", copy=False).view(np.uint8)


def units_of(base: Layout, target: Layout) -> list[Unit]:
    """Takes a file apart, in its order; a function of both headers alone."""
    units: list[Unit] = []
    for name, place in target.places.items():
        found = base.places.get(name)
        base_offset = found.offset_bytes if found is not None and found.entry == place.entry else None
        item_bytes = place.entry.item_bytes
        items = place.entry.size_bytes // item_bytes
        units.append(Unit(name, place.entry.dtype, items, item_bytes, place.offset_bytes, base_offset))
    return units


def _ranks(bits: UInt16) -> UInt16:
    """Maps floats of sign and magnitude to integers of the same order."""
    mask = _spread_sign(bits)
    mask |= np.uint16(0x8000)
    mask ^= bits
    return mask


def _spread_sign(words: UInt16) -> UInt16:
    """Returns all ones where the highest bit is set, else 0."""
    return -(words >> np.uint16(15))


def _floats_apart(old: UInt16, new: UInt16) -> list[UInt8]:
    """Returns low and high bytes of the zig-zag coded differences in rank."""
    step = _ranks(new)
    step -= _ranks(old)
    sign = _spread_sign(step)
    step <<= np.uint16(1)
    step ^= sign
    low = step.astype(np.uint8)
    step >>= np.uint16(8)
    return [low, step.astype(np.uint8)]


def _floats_together(old: UInt16, low: UInt8, high: UInt8) -> UInt16:
    """Undoes `_floats_apart`: returns the new bits."""
    step = high.astype(np.uint16)
    step <<= np.uint16(8)
    step |= low
    sign = -(step & np.uint16(1))
    step >>= np.uint16(1)
    step ^= sign
    step += _ranks(old)
    mask = ~_spread_sign(step)
    mask |= np.uint16(0x8000)
    step ^= mask
    return step
