"""What holds of the governor in every world: hypothesis writes the traces."""

from itertools import pairwise

from governed_device import MIB, TICK_S, WEIGHTS, Device, Moment, policy
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.edge.engine.governor import Policy
from ebbflow.edge.engine.strain import BITS, fits
from ebbflow.edge.engine.thread_fit import FEWER_S, MORE_S, ThreadFit

LADDERS = [("bf16", "int8", "int4"), ("int8", "int4"), ("bf16", "int4"), ("int4",)]

moments = st.builds(
    Moment,
    arrivals=st.one_of(st.sampled_from([0.0, 0.5, 4.0, 9.0, 14.0, 25.0]), st.floats(0, 25)),
    others=st.one_of(st.just(0.0), st.floats(0, 2)),
    available_bytes=st.one_of(st.just(8000 * MIB), st.just(8000 * MIB), st.integers(0, 8000 * MIB)),
    temperature_c=st.one_of(st.just(45.0), st.floats(20, 100)),
    warming_c=st.sampled_from([0.0, 0.0, 20.0, 40.0]),
    battery_percent=st.one_of(st.none(), st.floats(0, 100)),
)
stretches = st.lists(st.tuples(moments, st.integers(1, 120)), min_size=1, max_size=12)
"""Moments and for how many ticks each lasts."""


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    ladder = draw(st.sampled_from(LADDERS))
    return policy(
        ladder,
        pin=draw(st.sampled_from(["", "", "", *BITS])),
        dwell_s=draw(st.sampled_from([2.0, 10.0, 30.0])),
        latency_goal_s=draw(st.sampled_from([None, 0.3, 2.0])),
        memory_limit_bytes=draw(st.one_of(st.none(), st.none(), st.integers(0, 1500 * MIB))),
        capacity=draw(st.integers(1, 8)),
    )


def lived(policy: Policy, stretches: list[tuple[Moment, int]], start: int = 0) -> Device:
    device = Device(policy, policy.offered[start % len(policy.offered)])
    for moment, ticks in stretches:
        device.live([moment] * ticks)
    return device


@settings(max_examples=100)
@given(policies(), stretches, st.integers(0, 2))
def test_only_what_is_offered_fits_and_is_wanted_is_chosen(
    policy: Policy, stretches: list[tuple[Moment, int]], start: int
) -> None:
    device = lived(policy, stretches, start)
    for reading, decision in zip(device.readings, device.decisions, strict=True):
        assert decision.precision in policy.offered
        assert 1 <= decision.threads <= policy.max_threads
        assert decision.reason
        if decision.precision != reading.precision:
            assert fits(decision.precision, reading, policy.rules)
            if policy.rules.memory_limit_bytes is not None:
                both_bytes = WEIGHTS[decision.precision] + WEIGHTS[reading.precision] + reading.cache_bytes
                assert both_bytes <= policy.rules.memory_limit_bytes
            assert policy.pin in {"", decision.precision}


@settings(max_examples=100)
@given(policies(), stretches, st.integers(0, 2))
def test_a_precision_stays_for_its_dwell_time(policy: Policy, stretches: list[tuple[Moment, int]], start: int) -> None:
    device = lived(policy, stretches, start)
    assert all(after - before >= policy.dwell_s for (before, _), (after, _) in pairwise(device.changes))


@settings(max_examples=30)
@given(policies(), moments, st.integers(0, 2))
def test_a_steady_world_is_not_swung_in(policy: Policy, moment: Moment, start: int) -> None:
    """After n returns that failed the next waits 2**n dwell times, so that the changes of a day are few."""
    device = lived(policy, [(moment, int(1200 / TICK_S))], start)
    ranks = [policy.offered.index(precision) for _, precision in device.changes]
    ups = sum(after < before for before, after in pairwise(ranks))
    allowed, waited_s, patience_s = len(policy.offered), 0.0, policy.dwell_s
    while waited_s < 1200 and allowed < 100:
        waited_s += patience_s
        patience_s = min(patience_s * 2, policy.dwell_s * 32)
        allowed += 1
    assert ups <= allowed


@settings(max_examples=40)
@given(policies(), stretches)
def test_quality_returns_when_the_load_has_gone(policy: Policy, stretches: list[tuple[Moment, int]]) -> None:
    device = lived(policy, stretches)
    quiet_s = 90 + 60 + (32 + 1) * policy.dwell_s * len(policy.offered)
    device.live([Moment()] * int(quiet_s / TICK_S))
    if policy.pin:
        return
    better = policy.offered[: policy.offered.index(device.precision)]
    assert [precision for precision in better if fits(precision, device.readings[-1], policy.rules)] == []


@settings(max_examples=100)
@given(st.sampled_from(LADDERS), st.lists(st.tuples(st.floats(0, 0.4), st.integers(1, 300)), max_size=6))
def test_a_load_that_is_carried_easily_changes_nothing(ladder: tuple[str, ...], loads: list[tuple[float, int]]) -> None:
    device = lived(policy(ladder), [(Moment(arrivals=arrivals), ticks) for arrivals, ticks in loads])
    assert (device.changes, device.thread_changes) == ([], [])


@settings(max_examples=200)
@given(policies(), stretches)
def test_an_idle_engine_changes_only_for_want_of_memory(policy: Policy, stretches: list[tuple[Moment, int]]) -> None:
    idle = [
        (Moment(temperature_c=m.temperature_c, battery_percent=m.battery_percent, others=m.others), ticks)
        for m, ticks in stretches
    ]
    device = lived(policy, idle)
    assert device.changes == [] or policy.pin


@given(
    st.integers(1, 16),
    st.lists(st.tuples(st.floats(0, 17), st.integers(1, 60)), min_size=1, max_size=20),
)
def test_threads_fit_what_stays_free(most: int, stretches: list[tuple[float, int]]) -> None:
    """Soon never more than are free, later as many as are; and between two raises lies the patience."""
    fit, threads, now_s, raises = ThreadFit(most), most, 0.0, list[float]()
    for free, ticks in stretches:
        for tick in range(ticks):
            now_s += TICK_S
            before, threads = threads, fit.fit(free, threads, now_s)
            assert 1 <= threads <= most
            if threads > before:
                raises.append(now_s)
            if tick * TICK_S > FEWER_S:
                assert threads == 1 or threads <= free + 0.5
    assert all(after - before >= MORE_S for before, after in pairwise(raises))


@given(st.integers(1, 16), st.floats(0, 17), st.integers(1, 16))
def test_threads_come_to_rest(most: int, free: float, threads: int) -> None:
    fit, threads, seen = ThreadFit(most), min(threads, most), set[int]()
    for tick in range(1000):
        threads = fit.fit(free, threads, tick * TICK_S)
        if tick > 30:
            seen.add(threads)
    assert len(seen) == 1
    assert threads == 1 or threads - 0.5 <= free
    assert threads == most or free < threads + 1


@given(st.lists(st.sampled_from([0.9, 2.0]), min_size=200, max_size=200))
def test_a_neighbour_who_comes_and_goes_does_not_swing_the_threads(free: list[float]) -> None:
    fit, threads, changes = ThreadFit(2), 2, 0
    for tick, cores in enumerate(free):
        before, threads = threads, fit.fit(cores, threads, tick * TICK_S)
        changes += threads != before
    assert changes <= 2 * (200 * TICK_S / MORE_S)
