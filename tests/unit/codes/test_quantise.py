"""Properties of the code space."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from code_strategies import SHAPES, WEIGHTS
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ebbflow.common.codes import quantise
from ebbflow.common.errors import EbbflowError, Reason

Float32 = npt.NDArray[np.float32]
CODES8 = SHAPES.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-127, 127)))
CODES4 = SHAPES.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-7, 7)))


def per_weight(scales: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    return np.repeat(scales.astype(np.float64), 32, axis=1)


@given(WEIGHTS)
def test_int8_is_off_by_half_a_scale_at_most(weight: Float32) -> None:
    codes, scales = quantise.quantise_int8(weight)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float16
    assert scales.shape == (weight.shape[0], weight.shape[1] // 32)
    assert np.abs(codes.astype(int)).max() <= 127
    error = np.abs(quantise.dequantise(codes, scales).astype(np.float64) - weight)
    # Weights so small that no scale stands for them become 0; one division and one product are rounded to float32.
    assert (error <= np.maximum(per_weight(scales) * (0.5 + 1e-4), 2.0**-25)).all()


@given(WEIGHTS)
def test_int4_is_off_by_half_an_int4_scale_and_what_int8_is_off(weight: Float32) -> None:
    codes8, scales8 = quantise.quantise_int8(weight)
    codes4, scales4 = quantise.derive_int4(codes8, scales8)
    assert np.abs(codes4.astype(int)).max() <= 7
    assert np.isfinite(scales4).all()
    error = np.abs(quantise.dequantise(codes4, scales4) - quantise.dequantise(codes8, scales8).astype(np.float64))
    exact = per_weight(scales8) * 127 / 7
    rounding_of_scale = 7 * np.abs(per_weight(scales4) - exact)
    assert (error <= exact / 2 * (1 + 1e-4) + rounding_of_scale).all()


@given(WEIGHTS)
def test_new_scales_leave_six_per_cent_of_headroom(weight: Float32) -> None:
    _, scales = quantise.quantise_int8(weight)
    most = np.abs(weight).reshape(*scales.shape, 32).max(axis=2).astype(np.float64)
    wanted = np.minimum(most / 127 * 1.06, float(quantise.SCALE_MOST))
    ulp = np.spacing(scales).astype(np.float64)
    # Rounded to float16; what is too small for it gets a scale that is large enough.
    assert (np.abs(scales.astype(np.float64) - wanted) <= np.maximum(ulp, 2.0**-24)).all()
    assert (scales.astype(np.float64) * 127.5 >= most * (1 - 1e-6)).all()
    largest = most >= 1e-3
    error = np.abs(quantise.dequantise(*quantise.quantise_int8(weight)).astype(np.float64) - weight)
    error_most = error.reshape(*scales.shape, 32).max(axis=2)
    assert (error_most[largest] <= most[largest] * (1 / 239)).all()


@given(WEIGHTS)
def test_with_kept_scales_what_codes_stand_for_keeps_its_codes_and_scales(weight: Float32) -> None:
    codes, scales = quantise.quantise_int8(weight)
    # At the very edge the code 127 stands for slightly more than a weight may be.
    once = np.clip(quantise.dequantise(codes, scales), -quantise.WEIGHT_MOST, quantise.WEIGHT_MOST)
    codes_again, scales_again = quantise.quantise_int8(once, scales)
    np.testing.assert_array_equal(scales_again, scales)
    np.testing.assert_array_equal(codes_again, codes)


@given(WEIGHTS, st.integers(0, 1000), st.floats(0.0, 3.0))
def test_kept_scales_grow_only_where_they_must_and_errors_stay_half_a_scale(
    weight: Float32, seed: int, spread: float
) -> None:
    kept = quantise.quantise_int8(weight)[1]
    factor = np.exp(np.random.default_rng(seed).normal(0, spread, weight.shape))
    moved = np.clip(weight * factor, -quantise.WEIGHT_MOST, quantise.WEIGHT_MOST).astype(np.float32)
    codes, scales = quantise.quantise_int8(moved, kept)
    most = np.abs(moved).reshape(*scales.shape, 32).max(axis=2).astype(np.float64)
    outgrown = most > kept.astype(np.float64) * 127.5
    np.testing.assert_array_equal(scales[~outgrown], kept[~outgrown])
    assert (scales[outgrown] > kept[outgrown]).all()
    np.testing.assert_array_equal(scales[outgrown], quantise.quantise_int8(moved)[1][outgrown])
    error = np.abs(quantise.dequantise(codes, scales).astype(np.float64) - moved)
    assert (error <= np.maximum(per_weight(scales) * (0.5 + 1e-4), 2.0**-25)).all()


def test_half_a_step_beyond_the_last_code_keeps_the_scale_and_more_does_not() -> None:
    kept = np.array([[0.5]], np.float16)
    weight = np.zeros((1, 32), np.float32)
    weight[0, 3] = 0.5 * 127.5
    codes, scales = quantise.quantise_int8(weight, kept)
    assert (codes[0, 3], scales[0, 0]) == (127, np.float16(0.5))
    weight[0, 3] = np.nextafter(weight[0, 3], np.float32(np.inf))
    codes, scales = quantise.quantise_int8(weight, kept)
    assert scales[0, 0] == np.float16(weight[0, 3] / 127 * 1.06)
    assert codes[0, 3] == 120


def test_int4_rounds_every_int8_code_to_the_nearest_and_exact_halves_do_not_exist() -> None:
    codes8 = np.zeros((1, 256), np.int8)
    codes8[0, :255] = np.arange(-127, 128)
    codes4, _ = quantise.derive_int4(codes8, np.ones((1, 8), np.float16))
    exact = codes8.astype(np.float64) * 7 / 127
    assert not (np.abs(exact % 1) == 0.5).any()
    np.testing.assert_array_equal(codes4, np.rint(exact))


@given(CODES4)
def test_nibbles_come_back(codes: npt.NDArray[np.int8]) -> None:
    packed = quantise.pack_nibbles(codes)
    assert packed.nbytes * 2 == codes.nbytes
    np.testing.assert_array_equal(quantise.unpack_nibbles(packed), codes)


def test_the_even_input_is_the_low_nibble() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, :2] = -7, 5
    assert quantise.pack_nibbles(codes)[0, 0] == 1 | 13 << 4


@given(CODES8, st.floats(0, 65504, width=16))
def test_dequantised_codes_are_code_times_scale_in_float32(codes: npt.NDArray[np.int8], scale: float) -> None:
    scales = np.full((codes.shape[0], codes.shape[1] // 32), scale, np.float16)
    np.testing.assert_array_equal(quantise.dequantise(codes, scales), codes.astype(np.float32) * np.float32(scale))


def test_zeros_stay_zeros() -> None:
    codes, scales = quantise.quantise_int8(np.zeros((2, 64), np.float32))
    assert not codes.any()
    assert not scales.any()
    codes4, scales4 = quantise.derive_int4(codes, scales)
    assert not quantise.dequantise(codes4, scales4).any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 458_001.0, -3e38])
def test_what_no_code_stands_for_is_refused(wrong: float) -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, 40] = wrong
    with pytest.raises(EbbflowError) as caught:
        quantise.quantise_int8(weight)
    assert caught.value.reason is Reason.WEIGHTS_INVALID


def test_the_largest_weight_has_finite_scales() -> None:
    codes8, scales8 = quantise.quantise_int8(np.full((1, 32), quantise.WEIGHT_MOST, np.float32))
    _, scales4 = quantise.derive_int4(codes8, scales8)
    assert np.isfinite(scales4).all()


def test_a_scale_too_large_for_int4_is_refused() -> None:
    with pytest.raises(EbbflowError) as caught:
        quantise.derive_int4(np.ones((1, 32), np.int8), np.full((1, 1), 4000, np.float16))
    assert caught.value.reason is Reason.WEIGHTS_INVALID


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_bf16_rounds_as_torch_does(values: Float32) -> None:
    expected = torch.from_numpy(values).bfloat16()
    if not bool(expected.isfinite().all()):
        with pytest.raises(EbbflowError) as caught:
            quantise.to_bf16(values)
        assert caught.value.reason is Reason.WEIGHTS_INVALID
        return
    bits = quantise.to_bf16(values)
    np.testing.assert_array_equal(bits.view(np.int16), expected.view(torch.int16).numpy())
    np.testing.assert_array_equal(quantise.from_bf16(bits), expected.float().numpy())
    np.testing.assert_array_equal(quantise.to_bf16(quantise.from_bf16(bits)), bits)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_bf16_refuses_what_is_not_finite(wrong: float) -> None:
    with pytest.raises(EbbflowError) as caught:
        quantise.to_bf16(np.array([1.0, wrong], np.float32))
    assert caught.value.reason is Reason.WEIGHTS_INVALID


@pytest.mark.parametrize(("shape", "coded"), [((3, 32), True), ((3, 33), False), ((64,), False), ((1, 2, 32), False)])
def test_matrices_whose_width_is_a_multiple_of_32_are_coded(shape: tuple[int, ...], coded: bool) -> None:
    assert quantise.can_code(shape) is coded


@given(CODES8, st.integers(0, 1000))
def test_nibbles_by_table_are_those_by_arithmetic(codes8: npt.NDArray[np.int8], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales8 = rng.uniform(0, 100, (codes8.shape[0], codes8.shape[1] // 32)).astype(np.float16)
    codes4, scales4 = quantise.derive_int4(codes8, scales8)
    packed, scales = quantise.derive_nibbles(codes8, scales8)
    np.testing.assert_array_equal(packed, quantise.pack_nibbles(codes4))
    np.testing.assert_array_equal(scales, scales4)
