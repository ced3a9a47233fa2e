"""When devices are told: maintenance windows, the spread of starts, and silence."""

import datetime as dt

from device_fleet import NEW, NOW, SECOND, Fleet

from ebbflow.cloud.registry.tables import DeviceState
from ebbflow.cloud.rollout import machine
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.windows import Window

NIGHTLY = (Window(start="22:00", duration=dt.timedelta(hours=4)),)
EVENING = dt.datetime(2026, 11, 1, 22, tzinfo=dt.UTC)


def test_nobody_is_offered_the_release_before_the_window_opens_or_after_it_shuts() -> None:
    fleet = Fleet((Phase(silence_limit=dt.timedelta(days=1)),), agents=4, windows=NIGHTLY)
    fleet.tick(EVENING - NOW - SECOND)
    assert fleet.wanting(NEW) == []
    fleet.tick(SECOND)
    assert len(fleet.wanting(NEW)) == 4
    fleet.tell("agent-000")
    fleet.tick(dt.timedelta(hours=4))
    assert fleet.wanting(NEW) == ["agent-000"], "who was told inside goes on outside"


def test_silence_counts_on_while_the_window_is_shut() -> None:
    fleet = Fleet((Phase(silence_limit=dt.timedelta(hours=5)),), agents=1, windows=NIGHTLY)
    fleet.tick(EVENING - NOW)
    fleet.tell("agent-000")
    fleet.tick(dt.timedelta(hours=5))
    assert fleet.devices["agent-000"].reason == "SILENT"


def test_each_device_starts_at_a_time_of_its_own_within_the_spread() -> None:
    spread = dt.timedelta(hours=1)
    fleet = Fleet((Phase(),), agents=200, spread=spread)
    turns = [device.not_before_time for device in fleet.devices.values()]
    assert all(turn is not None and NOW <= turn <= NOW + spread for turn in turns)
    assert len(set(turns)) == 200
    thirds = [
        sum(third * spread / 3 <= turn - NOW < (third + 1) * spread / 3 for turn in turns if turn) for third in range(3)
    ]
    assert min(thirds) > 40


def test_the_spread_is_drawn_within_what_is_left_of_the_window() -> None:
    fleet = Fleet((Phase(),), agents=50, windows=NIGHTLY, spread=dt.timedelta(hours=24))
    fleet.tick(EVENING - NOW + dt.timedelta(hours=3))
    turns = [device.not_before_time for device in fleet.devices.values()]
    assert all(turn and EVENING <= turn <= EVENING + dt.timedelta(hours=4) for turn in turns)


def test_a_device_counts_as_told_only_when_its_turn_has_come() -> None:
    fleet = Fleet((Phase(silence_limit=60 * SECOND),), agents=1, spread=dt.timedelta(hours=1))
    turn = fleet.devices["agent-000"].not_before_time
    assert turn is not None
    states = []
    for fleet.now in (NOW, turn - dt.timedelta(microseconds=1), turn):
        assert fleet.wanting(NEW) == ["agent-000"], "it may know beforehand when its turn comes"
        fleet.tell("agent-000")
        states.append(fleet.devices["agent-000"].state)
    assert states == [DeviceState.WAITING, DeviceState.WAITING, DeviceState.ASSIGNED]


def test_a_device_that_begins_at_its_turn_without_reading_again_counts_as_told() -> None:
    fleet = Fleet((Phase(),), agents=1, spread=dt.timedelta(hours=1))
    device = fleet.devices["agent-000"]
    assert machine.fetching(fleet.rollout, device, NOW) == device
    turn = device.not_before_time
    assert turn is not None
    assert machine.fetching(fleet.rollout, device, turn).state is DeviceState.ASSIGNED


def test_who_missed_the_window_gets_a_turn_of_its_own_in_the_next() -> None:
    fleet = Fleet((Phase(),), agents=30, windows=NIGHTLY, spread=dt.timedelta(hours=2))
    fleet.tick(EVENING - NOW)
    fleet.tick(dt.timedelta(days=1))
    turns = {device.not_before_time for device in fleet.devices.values()}
    assert len(turns) == 30
    assert min(turn for turn in turns if turn) >= EVENING + dt.timedelta(days=1)


def test_silence_counts_from_when_a_device_that_waits_goes_on() -> None:
    fleet = Fleet((Phase(silence_limit=60 * SECOND),), agents=1)
    fleet.tell("agent-000")
    resume = NOW + dt.timedelta(hours=8)
    fleet.devices["agent-000"] = machine.fetching(fleet.rollout, fleet.devices["agent-000"], fleet.now, resume)
    fleet.tick(dt.timedelta(hours=8, seconds=59))
    assert fleet.devices["agent-000"].state is DeviceState.ASSIGNED
    fleet.tick(SECOND)
    assert fleet.devices["agent-000"].reason == "SILENT"


def test_no_device_can_put_its_silence_off_for_ever() -> None:
    fleet = Fleet((Phase(),), agents=1)
    fleet.tell("agent-000")
    never = dt.datetime.max.replace(tzinfo=dt.UTC)
    fleet.devices["agent-000"] = machine.fetching(fleet.rollout, fleet.devices["agent-000"], fleet.now, never)
    fleet.tick(machine.MAX_DEFERRAL + dt.timedelta(hours=1))
    assert fleet.devices["agent-000"].reason == "SILENT"
