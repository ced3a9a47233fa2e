"""Differences come back exactly, whatever the bytes are."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.common.codes.container import Entry, Layout, encode_header, parse_prefix
from ebbflow.common.codes.differences import Unit, units_of

UInt8 = npt.NDArray[np.uint8]
ITEM_BYTES = {"I8": 1, "U8": 1, "F16": 2, "BF16": 2}


def unit_of(dtype: str, items: int) -> Unit:
    return Unit("a", dtype, items, ITEM_BYTES[dtype], 0, 0)


@given(st.sampled_from(sorted(ITEM_BYTES)), st.integers(0, 900), st.integers(0, 1 << 32), st.floats(0, 1))
def test_any_bytes_come_back(dtype: str, items: int, seed: int, changed: float) -> None:
    random = np.random.default_rng(seed)
    unit = unit_of(dtype, items)
    base, other = random.integers(0, 256, (2, items * unit.item_bytes)).astype(np.uint8)
    target = np.where(random.random(base.size) < changed, other, base)
    planes = unit.difference(base, target)
    assert [plane.size for plane in planes] == [items] * len(unit.planes)
    np.testing.assert_array_equal(unit.restore(base, planes), target)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_equal_bytes_have_differences_of_zero(dtype: str) -> None:
    base = np.random.default_rng(1).integers(0, 256, 512).astype(np.uint8)
    assert not any(plane.any() for plane in unit_of(dtype, 512 // ITEM_BYTES[dtype]).difference(base, base))


def test_every_pair_of_packed_codes_has_the_difference_of_each_nibble() -> None:
    base, target = (grid.ravel().astype(np.uint8) for grid in np.meshgrid(np.arange(256), np.arange(256)))
    (symbols,) = unit_of("U8", 65536).difference(base, target)
    np.testing.assert_array_equal(symbols & 15, ((target & 15).astype(int) - (base & 15)) % 16)
    np.testing.assert_array_equal(symbols >> 4, ((target >> 4).astype(int) - (base >> 4)) % 16)


def test_neighbouring_floats_differ_by_one_rank_also_across_zero() -> None:
    values = np.array([-(2.0**-24), -0.0, 0.0, 2.0**-24, 1.0, -1.0], np.float16)
    following = np.array([-0.0, 0.0, 2.0**-24, 2.0**-23, 1.0 + 2.0**-10, -1.0 + 2.0**-11], np.float16)
    low, high = unit_of("F16", 6).difference(values.view(np.uint8), following.view(np.uint8))
    np.testing.assert_array_equal(low, 2)  # zig-zag: 0, -1, 1, ...
    assert not high.any()


def layout(entries: dict[str, Entry]) -> Layout:
    prefix = encode_header(entries, {})
    return parse_prefix(prefix, len(prefix) + sum(entry.size_bytes for entry in entries.values()))


ENTRIES = {
    "a.codes": Entry("I8", (4, 64)),
    "a.scales": Entry("F16", (4, 2)),
    "b.codes": Entry("U8", (4, 32)),
    "norm": Entry("BF16", (64,)),
    "empty": Entry("BF16", (0, 9)),
}


def test_a_file_is_taken_apart_without_gaps() -> None:
    target = layout(ENTRIES)
    units = units_of(target, target)
    offset = len(target.prefix)
    for unit in units:
        assert unit.target_offset == unit.base_offset == offset
        offset += unit.items * unit.item_bytes
    assert offset == target.size_bytes
    assert [unit.items for unit in units] == [256, 8, 128, 64, 0]


@pytest.mark.parametrize("changed", sorted(ENTRIES))
def test_a_tensor_of_another_shape_or_type_counts_as_new(changed: str) -> None:
    units = units_of(layout({**ENTRIES, changed: Entry("BF16", (9, 2))}), layout(ENTRIES))
    assert {unit.name for unit in units if unit.base_offset is None} == {changed}
