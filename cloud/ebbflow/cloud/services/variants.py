"""Which variant of a release suits a device. A decision without IO."""

from collections.abc import Mapping, Sequence

from ebbflow.api.v1 import resources_pb2 as pb

OVERHEAD = 1.25
"""Memory that a student takes while serving, as a multiple of its file."""
ANY_ORDER = (pb.PRECISION_INT8, pb.PRECISION_INT4, pb.PRECISION_BF16)
"""Order of preference of a device that says none."""
_MIB = 1024 * 1024


def choose(sizes_bytes: Mapping["pb.Precision.ValueType", int], profile: pb.DeviceProfile) -> "pb.Precision.ValueType":
    """Returns the first of the device's precisions that fits in its memory.

    If none fits, it is the smallest that the device can run: the device then says that it was too large, which is a
    clearer answer than silence.

    Args:
        sizes_bytes: size of each variant's file; at least one.
        profile: the device; memory 0 means not known.
    """
    wanted: Sequence[pb.Precision.ValueType] = profile.precisions or ANY_ORDER
    able = [precision for precision in wanted if precision in sizes_bytes]
    for precision in able:
        if not profile.memory_mib or sizes_bytes[precision] * OVERHEAD <= profile.memory_mib * _MIB:
            return precision
    return min(able or sizes_bytes, key=lambda precision: sizes_bytes[precision])
