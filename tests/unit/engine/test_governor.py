"""The governor against worlds that are written down: each test names what an operator relies on."""

from itertools import pairwise

import pytest
from governed_device import MIB, WEIGHTS, Device, Moment, policy

from ebbflow.edge.engine.governor import Governor
from ebbflow.edge.engine.strain import Reading

QUIET, STEADY, RUSH = Moment(), Moment(arrivals=0.5), Moment(arrivals=14.0)


def seconds(count: float, moment: Moment) -> list[Moment]:
    return [moment] * int(count * 2)


def test_without_load_evidence_the_best_precision_stays() -> None:
    device = Device(policy(("bf16", "int8", "int4")), "bf16")
    device.live(seconds(300, QUIET) + seconds(300, STEADY))
    assert (device.changes, device.thread_changes) == ([], [])
    assert device.decisions[-1].reason == "bf16: nothing asks for less; 2 threads, as many as are allowed"


def test_a_rush_brings_the_precision_down_and_its_end_brings_it_back() -> None:
    device = Device(policy(("bf16", "int8", "int4")), "bf16")
    device.live(seconds(20, STEADY) + seconds(120, RUSH))
    assert [precision for _, precision in device.changes] == ["int4"]
    assert device.changes[0][0] < 20 + 8
    assert "requests wait for a place" in device.decisions[-1].reason
    device.live(seconds(900, QUIET))
    assert [precision for _, precision in device.changes[1:]] == ["int8", "bf16"]
    assert device.changes[1][0] >= 140 + 30
    assert device.changes[2][0] - device.changes[1][0] >= 30
    assert "there is room for it again" in device.decisions[-1].reason


@pytest.mark.parametrize(
    "strained",
    [{"queued": 8, "running": 8}, {"running": 3, "first_token_s": 1.25}],
    ids=["as many wait as run", "the first token takes over twice the goal"],
)
def test_severe_strain_brings_the_lowest_precision_at_once(strained: dict[str, float]) -> None:
    governor = Governor(policy(("bf16", "int8", "int4"), latency_goal_s=0.5))
    decisions = [governor.decide(reading_in("bf16", **strained), now_s) for now_s in range(20)]
    assert {decision.precision for decision in decisions} == {"bf16", "int4"}


def test_lower_precision_serves_more_of_the_rush() -> None:
    def served(offered: tuple[str, ...]) -> float:
        device = Device(policy(offered), "bf16")
        device.live(seconds(300, RUSH))
        return device.served

    assert served(("bf16", "int8", "int4")) > 1.3 * served(("bf16",))


def test_a_load_that_only_the_lower_precision_can_carry_does_not_swing() -> None:
    """Each return that fails makes the next wait twice as long."""
    device = Device(policy(capacity=4), "int8")
    device.live(seconds(3600, Moment(arrivals=7.5)))
    ups = [at_s for at_s, precision in device.changes if precision == "int8"]
    assert len(ups) <= 6


def test_a_device_that_only_a_lower_precision_keeps_cool_returns_ever_less_often() -> None:
    device = Device(policy(), "int8")
    device.live(seconds(3600, Moment(arrivals=3, temperature_c=60, warming_c=40)))
    ups = [at_s for at_s, precision in device.changes if precision == "int8"]
    assert 4 <= len(ups) <= 7
    waits = [after - before for before, after in pairwise(ups)]
    assert waits[:4] == sorted(waits[:4])
    assert waits[3] >= 4 * waits[0]


def test_a_missed_latency_goal_counts_and_none_does_not() -> None:
    rush = Moment(arrivals=2.2)
    missing = Device(policy(("bf16", "int8", "int4"), latency_goal_s=0.4, capacity=64), "bf16")
    missing.live(seconds(200, rush))
    careless = Device(policy(("bf16", "int8", "int4"), capacity=64), "bf16")
    careless.live(seconds(200, rush))
    assert careless.changes == []
    reading = reading_in("int8", running=3, first_token_s=1.25)
    governor = Governor(policy(latency_goal_s=0.5))
    decisions = [governor.decide(reading, now_s) for now_s in range(10)]
    assert decisions[-1].precision == "int4"
    assert "the first token takes 1.2 s and should take 0.5 s" in decisions[-1].reason


def test_old_first_tokens_do_not_bring_it_down_twice() -> None:
    """The percentile looks back a minute: what it says just after a change is of the precision before."""
    slow = {"first_token_s": 0.9, "running": 4}
    governor, precision = Governor(policy(("bf16", "int8", "int4"), latency_goal_s=0.5, dwell_s=5.0)), "bf16"
    fell: list[float] = []
    for tick in range(200):
        decision = governor.decide(reading_in(precision, **slow), tick * 0.5)
        fell += [tick * 0.5] if decision.precision != precision else []
        precision = decision.precision
    assert precision == "int4"
    assert fell[1] - fell[0] >= 60


def test_first_tokens_that_get_worse_are_new_evidence() -> None:
    governor, precision = Governor(policy(("bf16", "int8", "int4"), latency_goal_s=0.5, dwell_s=5.0)), "bf16"
    for tick in range(40):
        reading = reading_in(precision, first_token_s=2.0 + 0.1 * tick, running=4)
        precision = governor.decide(reading, tick * 0.5).precision
    assert precision == "int4"


def reading_in(precision: str, **more: object) -> Reading:
    plain: dict[str, object] = {
        "threads": 2, "cores": 2, "tokens_per_s": 90.0, "free_cores": 2.0, "weights_bytes": WEIGHTS,
        "memory_total_bytes": 8000 * MIB, "memory_available_bytes": 4000 * MIB,
    }  # fmt: skip
    return Reading(precision=precision, **{**plain, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        (Moment(arrivals=0.6, temperature_c=84), "the device is at 84 °C and slows down at 80 °C"),
        (Moment(arrivals=0.6, battery_percent=15), "the battery is at 15 %"),
        (Moment(arrivals=0.6, available_bytes=750 * MIB), "MiB of the device's memory are free"),
    ],
    ids=["heat", "battery", "memory"],
)
def test_what_the_device_lacks_brings_the_precision_down_and_its_return_brings_it_back(
    moment: Moment, words: str
) -> None:
    device = Device(policy(), "int8")
    device.live(seconds(60, moment))
    assert [precision for _, precision in device.changes] == ["int4"]
    assert words in device.decisions[-1].reason
    device.live(seconds(200, STEADY))
    assert device.precision == "int8"


def test_heat_and_an_empty_battery_leave_an_idle_engine_alone() -> None:
    device = Device(policy(), "int8")
    device.live(seconds(120, Moment(temperature_c=95)) + seconds(120, Moment(battery_percent=5)))
    assert device.changes == []


def test_what_does_not_fit_is_not_chosen_and_the_reason_says_so() -> None:
    limit_bytes = WEIGHTS["int8"] + 100 * MIB
    device = Device(policy(memory_limit_bytes=limit_bytes), "int8")
    device.live(seconds(60, RUSH))
    assert device.changes == []
    assert "but int4 cannot be had: there is not enough memory to make it ready" in device.decisions[-1].reason


def test_a_precision_between_that_does_not_fit_is_skipped() -> None:
    limit_bytes = WEIGHTS["bf16"] + 300 * MIB
    device = Device(policy(("bf16", "int8", "int4"), memory_limit_bytes=limit_bytes), "bf16")
    device.live(seconds(60, RUSH))
    assert device.changes[0][1] == "int4"


def test_a_precision_that_could_not_be_made_ready_is_left_alone_for_a_while() -> None:
    governor = Governor(policy())
    rush = reading_in("int8", running=8, queued=20)
    asked = []
    for tick in range(600):
        if governor.decide(rush, tick * 0.5).precision == "int4":
            asked.append(tick * 0.5)
            governor.refused("int4", "the file could not be read", tick * 0.5)
    assert len(asked) == 3
    assert asked[1] - asked[0] >= 60
    assert asked[2] - asked[1] >= 120
    assert "int4 cannot be had: the file could not be read" in governor.decide(rush, 301).reason


@pytest.mark.parametrize("pin", ["bf16", "int8", "int4"])
def test_a_pin_holds_whatever_happens(pin: str) -> None:
    device = Device(policy(("bf16", "int8", "int4"), pin=pin), "int8")
    device.live(seconds(200, RUSH) + seconds(60, Moment(arrivals=5, temperature_c=99, others=1)) + seconds(60, QUIET))
    assert device.precision == pin
    assert len(device.changes) <= 1
    assert f"{pin} is pinned" in device.decisions[-1].reason


def test_a_pin_that_is_not_offered_or_does_not_fit_is_said() -> None:
    device = Device(policy(("int8", "int4"), pin="bf16"), "int8")
    device.live(seconds(10, STEADY))
    assert device.changes == []
    assert "bf16 is pinned but not offered here, so int8 serves" in device.decisions[-1].reason
    device = Device(policy(("int8", "int4"), pin="int4", memory_limit_bytes=WEIGHTS["int8"]), "int8")
    device.live(seconds(10, STEADY))
    assert device.changes == []
    assert "int4 is pinned but cannot be had: there is not enough memory" in device.decisions[-1].reason


def test_threads_leave_a_busy_neighbour_his_core_at_once_and_return_later() -> None:
    device = Device(policy(), "int8")
    device.live(seconds(30, STEADY) + seconds(30, Moment(arrivals=0.5, others=1.0)))
    assert [threads for _, threads in device.thread_changes] == [1]
    assert device.thread_changes[0][0] <= 33
    assert "1 of 2 threads: other programs keep 1.0 of 2 cores busy" in device.decisions[-1].reason
    device.live(seconds(30, STEADY))
    assert [threads for _, threads in device.thread_changes] == [1, 2]
    assert 70 <= device.thread_changes[1][0] <= 72


def test_threads_go_before_the_precision() -> None:
    device = Device(policy(), "int8")
    device.live(seconds(20, STEADY) + seconds(60, Moment(arrivals=9, others=1.0)))
    assert device.thread_changes[0][0] < device.changes[0][0]


def test_a_single_precision_is_served_and_said() -> None:
    device = Device(policy(("int4",)), "int4")
    device.live(seconds(60, RUSH))
    assert device.changes == []
    assert device.decisions[-1].reason.startswith("int4 is the only precision that is offered; 2 threads")
