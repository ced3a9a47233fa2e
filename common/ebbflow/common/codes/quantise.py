"""The one code space, in numpy: integers in groups of 32 along the input, each group with a float16 scale.

INT8 has codes -127..127 and INT4 has codes -7..7 (inside the value sets of GGUF's Q8_0 and Q4_0). INT4 is derived from
the INT8 codes by integer rounding, so that every machine derives the same.

Letters of shapes: O outputs, I inputs, G = I/32 groups.
"""

from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ebbflow.common.errors import EbbflowError, Reason

GROUP = 32
"""Inputs that share a scale."""
INT8_MOST = 127
INT4_MOST = 7
WEIGHT_MOST = 458_000.0
"""Largest magnitude of a weight: beyond it the INT4 scale would not fit into float16."""
SCALE_MOST = np.float16(3610.0)
"""Largest INT8 scale: 127/7 of it, the INT4 scale, just fits into float16."""
HEADROOM = 1.06
"""How much larger than needed a new scale is. Measured: a release of 200 steps at 1e-5 outgrows almost none."""

_SMALLEST_SCALE = np.float16(2.0**-24)
_INFINITE_BF16 = 0x7F80

_Number = TypeVar("_Number", bound=np.generic)
Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]
Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]


def can_code(shape: tuple[int, ...]) -> bool:
    """Says whether a tensor of this shape is coded: a matrix whose input width is a multiple of 32."""
    return len(shape) == 2 and shape[1] % GROUP == 0  # noqa: PLR2004 - a matrix


def quantise_int8(weight_OI: Float32, kept_OG: Float16 | None = None) -> tuple[Int8, Float16]:
    """Returns INT8 codes [O, I] and scales [O, G].

    A new scale is `HEADROOM` times what its group needs, so that the next release can keep it. A kept scale stays
    unless the group's largest weight lies more than half a step beyond code 127; then the group gets a new one. Scales
    thus never shrink from release to release, and where they stay, what has not moved keeps its code.

    The error of a weight is at most half its group's scale. For a group with a new scale that is 1/239 of its largest
    weight; a kept scale may be any multiple of what the group needs. A group of zeros without a kept scale has scale 0.

    Args:
        weight_OI: the weights.
        kept_OG: scales of the release before, finite and not negative.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a weight is not finite or beyond `WEIGHT_MOST`.
    """
    grouped_OGI = _in_groups(weight_OI)
    most_OG = np.abs(grouped_OGI).max(axis=2, initial=0.0)
    if not bool((most_OG <= WEIGHT_MOST).all()):  # false for NaN too
        raise EbbflowError(Reason.WEIGHTS_INVALID, f"a weight is not a finite number within ±{WEIGHT_MOST:.0f}")
    scales_OG = np.minimum((most_OG * np.float32(HEADROOM / INT8_MOST)).astype(np.float16), SCALE_MOST)
    # Among float16's subnormals rounding may leave a scale too small to reach the largest weight.
    scales_OG = np.where(_clips(scales_OG, most_OG), np.nextafter(scales_OG, np.float16(np.inf)), scales_OG)
    if kept_OG is not None:
        scales_OG = np.where(_clips(kept_OG, most_OG), scales_OG, kept_OG)
    divisor_OG = np.maximum(scales_OG, _SMALLEST_SCALE).astype(np.float32)
    codes_OGI = np.rint(grouped_OGI / divisor_OG[:, :, None])
    np.clip(codes_OGI, -INT8_MOST, INT8_MOST, out=codes_OGI)
    return codes_OGI.astype(np.int8).reshape(weight_OI.shape), scales_OG


def _clips(scales_OG: Float16, most_OG: Float32) -> npt.NDArray[np.bool_]:
    """Says where the largest weight of a group is more than half a step beyond the last code."""
    return scales_OG.astype(np.float32) * np.float32(INT8_MOST + 0.5) < most_OG


def derive_int4(codes8_OI: Int8, scales8_OG: Float16) -> tuple[Int8, Float16]:
    """Returns INT4 codes [O, I], one per int8, and scales [O, G] of what `quantise_int8` made.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a scale does not fit into float16.
    """
    return _codes4(codes8_OI), _scales4(scales8_OG)


def _codes4(codes8_OI: Int8) -> Int8:
    magnitude_OI = np.abs(codes8_OI.astype(np.int16))
    return np.sign(codes8_OI) * ((2 * INT4_MOST * magnitude_OI + INT8_MOST) // (2 * INT8_MOST)).astype(np.int8)


def _scales4(scales8_OG: Float16) -> Float16:
    wide_OG = scales8_OG.astype(np.float32) * np.float32(INT8_MOST) / np.float32(INT4_MOST)
    with np.errstate(over="ignore"):
        scales_OG = wide_OG.astype(np.float16)
    if not bool(np.isfinite(scales_OG).all()):
        raise EbbflowError(Reason.WEIGHTS_INVALID, "a scale is too large for INT4")
    return scales_OG


def derive_nibbles(codes8_OI: Int8, scales8_OG: Float16) -> tuple[UInt8, Float16]:
    """Returns what `derive_int4` does, with the codes packed as by `pack_nibbles`, in a third of the time.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a scale does not fit into float16.
    """
    pairs = np.ascontiguousarray(codes8_OI).view("<u2")
    return _nibbles_of_pairs()[pairs], _scales4(scales8_OG)


@cache
def _nibbles_of_pairs() -> UInt8:
    """The byte of two INT4 codes, by the two bytes of the INT8 codes that they derive from."""
    pairs = np.arange(1 << 16, dtype="<u2").view(np.int8).reshape(-1, 2)
    return pack_nibbles(_codes4(pairs)).reshape(-1)


def dequantise(codes_OI: Int8, scales_OG: Float16) -> Float32:
    """Returns the weights that codes stand for: code times scale, in float32."""
    rows, inputs = codes_OI.shape
    weight_OGI = np.empty((rows, inputs // GROUP, GROUP), np.float32)
    np.multiply(_in_groups(codes_OI), scales_OG.astype(np.float32)[:, :, None], out=weight_OGI, dtype=np.float32)
    return weight_OGI.reshape(rows, inputs)


def pack_nibbles(codes_OI: Int8) -> UInt8:
    """Packs INT4 codes two to a byte, [O, I/2]: the even input in the low nibble, each plus 8."""
    raised_OI = (codes_OI + np.int8(8)).view(np.uint8)
    packed: UInt8 = raised_OI[:, 0::2] | (raised_OI[:, 1::2] << np.uint8(4))
    return packed


def unpack_nibbles(packed: UInt8) -> Int8:
    """Undoes `pack_nibbles`: [O, I/2] to [O, I]."""
    codes_OI = np.empty((packed.shape[0], packed.shape[1] * 2), np.int8)
    codes_OI[:, 0::2] = (packed & np.uint8(0x0F)).view(np.int8) - np.int8(8)
    codes_OI[:, 1::2] = (packed >> np.uint8(4)).view(np.int8) - np.int8(8)
    return codes_OI


def to_bf16(values: Float32) -> UInt16:
    """Rounds to bfloat16, ties to even; returns its bits, of the same shape.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a number is not finite or becomes infinite.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    infinite = (bits & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F7F8000)  # from half a step above the largest bfloat16
    if bool(infinite.any()):
        raise EbbflowError(Reason.WEIGHTS_INVALID, "a weight is not a finite number")
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: UInt16) -> Float32:
    """Returns the float32 numbers that bits of bfloat16 stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def are_finite_bf16(bits: UInt16) -> bool:
    """Says whether no bfloat16 is infinite or NaN."""
    return not bool(((bits & _INFINITE_BF16) == _INFINITE_BF16).any())


def _in_groups(matrix_OI: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
    rows, inputs = matrix_OI.shape
    return matrix_OI.reshape(rows, inputs // GROUP, GROUP)
