"""Which variant suits a device."""

from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.cloud.services.variants import OVERHEAD, choose

MIB = 1024 * 1024
SIZES = {pb.PRECISION_BF16: 400 * MIB, pb.PRECISION_INT8: 210 * MIB, pb.PRECISION_INT4: 110 * MIB}
ALL = [pb.PRECISION_BF16, pb.PRECISION_INT8, pb.PRECISION_INT4]


def device(memory_mib: int = 0, precisions: list[pb.Precision.ValueType] | None = None) -> pb.DeviceProfile:
    return pb.DeviceProfile(memory_mib=memory_mib, precisions=ALL if precisions is None else precisions)


def test_the_first_precision_that_fits_with_its_overhead_is_chosen() -> None:
    assert choose(SIZES, device(501)) == pb.PRECISION_BF16
    assert choose(SIZES, device(499)) == pb.PRECISION_INT8
    assert choose(SIZES, device(200)) == pb.PRECISION_INT4


def test_a_device_that_nothing_fits_gets_the_smallest_and_will_say_so() -> None:
    assert choose(SIZES, device(10)) == pb.PRECISION_INT4
    assert choose(SIZES, device(10, [pb.PRECISION_BF16, pb.PRECISION_INT8])) == pb.PRECISION_INT8


def test_unknown_memory_and_no_preference_take_int8() -> None:
    assert choose(SIZES, device(0, [])) == pb.PRECISION_INT8


def test_a_precision_that_the_release_lacks_is_passed_over() -> None:
    assert choose({pb.PRECISION_BF16: 1}, device(100, [pb.PRECISION_INT4, pb.PRECISION_BF16])) == pb.PRECISION_BF16


@given(
    st.dictionaries(st.sampled_from(ALL), st.integers(1, 10**10), min_size=1),
    st.lists(st.sampled_from(ALL), unique=True),
    st.integers(0, 10_000),
)
def test_what_is_chosen_exists_and_fits_if_anything_does(
    sizes: dict[pb.Precision.ValueType, int], wanted: list[pb.Precision.ValueType], memory_mib: int
) -> None:
    chosen = choose(sizes, device(memory_mib, wanted))
    assert chosen in sizes
    able = [precision for precision in wanted or ALL if precision in sizes]
    if memory_mib and any(sizes[precision] * OVERHEAD <= memory_mib * MIB for precision in able):
        assert sizes[chosen] * OVERHEAD <= memory_mib * MIB
