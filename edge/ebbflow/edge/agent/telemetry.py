"""The device's coarse health: the closed list of what leaves it outside the feedback channel.

Every figure is rounded so far that it says how the device is and nothing of what its users do.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from ebbflow.api.v1 import agent_pb2 as pb
from ebbflow.api.v1 import resources_pb2

_MIB = 2**20
_START_S = time.monotonic()


def round_to(value: float, step: int) -> int:
    """Returns the multiple of `step` that is nearest."""
    return round(value / step) * step


def floor_to_power_of_two(value: int) -> int:
    """Returns the largest power of two that is not above `value`; 0 for 0."""
    return 1 << (value.bit_length() - 1) if value > 0 else 0


def telemetry(disk: Path, installations: Iterable[resources_pb2.Installation]) -> pb.Telemetry:
    """Reads the device's health.

    Args:
        disk: a folder on the disk that the agent writes to.
        installations: what became of the releases on the device.
    """
    return pb.Telemetry(
        uptime_s=int(time.monotonic() - _START_S),
        memory_used_percent=round_to(psutil.virtual_memory().percent, 10),
        disk_free_mib=floor_to_power_of_two(int(psutil.disk_usage(str(disk)).free) // _MIB),
        temperature_c=round_to(_hottest_c(), 5),
        power_source=_power_source(),
        installations=installations,
    )


def _hottest_c() -> float:
    """The hottest sensor in degrees Celsius; 0 where none can be read."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError, ValueError):
        return 0.0
    return max((reading.current for readings in sensors.values() for reading in readings), default=0.0)


def _power_source() -> pb.PowerSource.ValueType:
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, ValueError):
        return pb.POWER_SOURCE_UNSPECIFIED
    if battery is None or battery.power_plugged is None:
        return pb.POWER_SOURCE_UNSPECIFIED
    return pb.POWER_SOURCE_MAINS if battery.power_plugged else pb.POWER_SOURCE_BATTERY
