"""Codes as GGUF's blocks of 32 weights: a float16 scale, then the codes. The same numbers, in another order.

Source: `block_q8_0` and `block_q4_0` in ggml's ggml-common.h.
"""

import numpy as np

from ebbflow.common.codes.quantise import GROUP, Float16, Int8, UInt8

Q8_0_BYTES = 2 + GROUP
"""Length of a block of INT8 codes."""
Q4_0_BYTES = 2 + GROUP // 2
"""Length of a block of INT4 codes."""


def q8_0(codes_OI: Int8, scales_OG: Float16) -> UInt8:
    """Returns rows of Q8_0 blocks, [O, G * 34]: the codes as they are."""
    rows, groups = scales_OG.shape
    blocks = np.empty((rows, groups, Q8_0_BYTES), np.uint8)
    blocks[:, :, :2] = _scale_bytes(scales_OG)
    blocks[:, :, 2:] = codes_OI.view(np.uint8).reshape(rows, groups, GROUP)
    return blocks.reshape(rows, -1)


def q4_0(codes_OI: Int8, scales_OG: Float16) -> UInt8:
    """Returns rows of Q4_0 blocks, [O, G * 18]: each code plus 8, input j in the low nibble beside j + 16."""
    rows, groups = scales_OG.shape
    raised = (codes_OI + np.int8(8)).view(np.uint8).reshape(rows, groups, 2, GROUP // 2)
    blocks = np.empty((rows, groups, Q4_0_BYTES), np.uint8)
    blocks[:, :, :2] = _scale_bytes(scales_OG)
    blocks[:, :, 2:] = raised[:, :, 0] | (raised[:, :, 1] << np.uint8(4))
    return blocks.reshape(rows, -1)


def _scale_bytes(scales_OG: Float16) -> UInt8:
    return np.ascontiguousarray(scales_OG, "<f2").view(np.uint8).reshape(*scales_OG.shape, 2)
