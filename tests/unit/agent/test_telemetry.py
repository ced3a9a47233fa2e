"""What leaves the device outside the feedback channel: a closed list, coarsely rounded."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import agent_pb2 as pb
from ebbflow.edge.agent.telemetry import floor_to_power_of_two, round_to, telemetry

CLOSED_LIST = {
    "uptime_s",
    "memory_used_percent",
    "disk_free_mib",
    "temperature_c",
    "power_source",
    "installations",
}


def test_the_list_is_closed() -> None:
    assert {field.name for field in pb.Telemetry.DESCRIPTOR.fields} == CLOSED_LIST


def test_what_is_read_is_coarse(tmp_path: Path) -> None:
    found = telemetry(tmp_path, [])
    assert found.memory_used_percent % 10 == 0
    assert 0 < found.memory_used_percent <= 100
    assert found.disk_free_mib.bit_count() <= 1
    assert found.temperature_c % 5 == 0


@given(st.integers(0, 2**50))
def test_powers_of_two_are_rounded_down(value: int) -> None:
    floor = floor_to_power_of_two(value)
    assert floor.bit_count() <= 1
    assert floor <= value < max(2 * floor, 1)


@given(st.floats(-100, 200), st.sampled_from([5, 10]))
def test_rounding_moves_at_most_half_a_step(value: float, step: int) -> None:
    assert abs(round_to(value, step) - value) <= step / 2
    assert round_to(value, step) % step == 0
