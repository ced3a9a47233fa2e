"""The rollout's decisions: by example, and by the thousand over random histories."""

import contextlib
import datetime as dt
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.cloud.registry.tables import DeviceState, RolloutState
from ebbflow.cloud.rollout import machine, phases
from ebbflow.cloud.rollout.machine import Device, Rollout
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.common.errors import EbbflowError, Reason

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
OLD, NEW = 1, 2


class Fleet:
    """A rollout over devices, with a clock of its own."""

    def __init__(self, plan: tuple[Phase, ...], agents: int, previous: int | None = OLD) -> None:
        self.now = NOW
        self.rollout = Rollout(release_number=NEW, phases=plan)
        members = phases.freeze([f"agent-{number:03d}" for number in range(agents)], plan)
        self.devices = {
            agent: Device(agent_id=agent, phase=phase, previous_number=previous) for agent, phase in members.items()
        }
        self.tick()

    def tick(self, later: dt.timedelta = dt.timedelta(0)) -> None:
        self.now += later
        self.keep(machine.tick(self.rollout, self.devices.values(), self.now))

    def keep(self, step: machine.Step) -> None:
        self.rollout = step.rollout
        self.devices = {device.agent_id: device for device in step.devices}

    def desired(self) -> dict[str, int | None]:
        return {agent: machine.desired(self.rollout, device) for agent, device in self.devices.items()}

    def wanting(self, number: int) -> list[str]:
        return [agent for agent, wanted in self.desired().items() if wanted == number]

    def tell(self, agent: str) -> None:
        self.devices[agent] = machine.tell(self.rollout, self.devices[agent], self.now)

    def answer(self, agent: str, succeeded: bool = True) -> None:
        self.tell(agent)
        reason = "" if succeeded else "PROBE_LOSS"
        self.devices[agent] = machine.answer(self.devices[agent], succeeded, self.now, reason)


CANARY_THEN_ALL = (Phase(share=0.1, soak=10 * SECOND), Phase(failure_share=0.2, success_share=0.8, min_answers=3))


def test_only_the_canaries_are_told_at_first() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=30)
    assert len(fleet.wanting(NEW)) == 3
    assert len(fleet.wanting(OLD)) == 27


def test_success_waits_for_its_soak_time_and_then_brings_everybody() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=30)
    for agent in fleet.wanting(NEW):
        fleet.answer(agent)
    fleet.tick(9 * SECOND)
    assert len(fleet.wanting(NEW)) == 3
    fleet.tick(10 * SECOND)
    assert len(fleet.wanting(NEW)) == 30


def test_success_that_does_not_last_soaks_anew() -> None:
    fleet = Fleet((Phase(share=0.1, success_share=0.5, failure_share=0.9, soak=10 * SECOND), Phase()), agents=20)
    first, second = fleet.wanting(NEW)
    fleet.answer(first)
    fleet.tick(9 * SECOND)
    fleet.answer(second, succeeded=False)
    fleet.answer(first, succeeded=False)
    fleet.answer(second)
    fleet.tick(SECOND)
    assert fleet.rollout.phase_passed_time == NOW + 9 * SECOND
    fleet.answer(second, succeeded=False)
    fleet.tick()
    assert fleet.rollout.state is RolloutState.HALTED


def test_one_failed_canary_halts_and_leaves_the_rest_alone() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=30)
    told = fleet.wanting(NEW)
    fleet.answer(told[0], succeeded=False)
    fleet.tick()
    assert fleet.rollout.state is RolloutState.HALTED
    assert "1 of 1" in fleet.rollout.reason
    assert fleet.wanting(NEW) == []
    fleet.answer(told[0])
    fleet.tick(3600 * SECOND)
    assert fleet.rollout.state is RolloutState.HALTED


def test_a_device_that_was_told_and_stays_silent_has_failed() -> None:
    fleet = Fleet((Phase(share=0.1, silence_limit=60 * SECOND), Phase()), agents=10)
    (canary,) = fleet.wanting(NEW)
    fleet.tell(canary)
    fleet.tick(59 * SECOND)
    assert fleet.devices[canary].state is DeviceState.ASSIGNED
    fleet.devices[canary] = machine.fetching(fleet.devices[canary], fleet.now)
    fleet.tick(59 * SECOND)
    assert fleet.devices[canary].state is DeviceState.ASSIGNED
    fleet.tick(SECOND)
    assert fleet.devices[canary].reason == "SILENT"
    assert fleet.rollout.state is RolloutState.HALTED


def test_a_device_that_is_off_neither_fails_nor_blocks_the_others() -> None:
    fleet = Fleet((Phase(share=0.2, min_answers=1), Phase()), agents=10)
    off, on = fleet.wanting(NEW)
    fleet.answer(on)
    fleet.tick(dt.timedelta(days=30))
    assert fleet.devices[off].state is DeviceState.WAITING
    assert len(fleet.wanting(NEW)) == 10


def test_enough_answers_are_needed_but_never_more_than_devices() -> None:
    fleet = Fleet((Phase(share=0.3, min_answers=100), Phase()), agents=10)
    *most, last = fleet.wanting(NEW)
    for agent in most:
        fleet.answer(agent)
    fleet.tick()
    assert fleet.rollout.phase_index == 0
    fleet.answer(last)
    fleet.tick()
    assert fleet.rollout.phase_index == 1


def test_the_last_phase_waits_for_all_that_are_under_way() -> None:
    fleet = Fleet((Phase(success_share=0.5, failure_share=0.5),), agents=3)
    fleet.answer("agent-000")
    fleet.tell("agent-001")
    fleet.devices["agent-002"] = replace(fleet.devices["agent-002"], connected=False)
    fleet.tick()
    states = [fleet.rollout.state]
    fleet.answer("agent-001")
    fleet.tick()
    assert [*states, fleet.rollout.state] == [RolloutState.RUNNING, RolloutState.SUCCEEDED]
    assert fleet.wanting(NEW) == ["agent-000", "agent-001", "agent-002"]


def test_a_phase_whose_devices_are_gone_takes_another_one() -> None:
    fleet = Fleet((Phase(share=0.1), Phase()), agents=10)
    (canary,) = fleet.wanting(NEW)
    fleet.devices[canary] = replace(fleet.devices[canary], available=False)
    fleet.tick()
    assert fleet.rollout.phase_index == 0
    assert len(set(fleet.wanting(NEW)) - {canary}) == 1


def test_who_serves_the_release_already_has_succeeded() -> None:
    fleet = Fleet((Phase(share=0.5), Phase()), agents=2)
    fleet.devices = {agent: replace(device, serving_number=NEW) for agent, device in fleet.devices.items()}
    fleet.tick()
    assert fleet.rollout.state is RolloutState.SUCCEEDED


def test_an_empty_fleet_succeeds_and_serves_whoever_comes_later() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=0)
    assert fleet.rollout.state is RolloutState.SUCCEEDED
    late = Device(agent_id="late", phase=1, previous_number=None)
    assert machine.desired(fleet.rollout, late) == NEW


def test_resuming_a_halt_lets_the_failed_try_again() -> None:
    fleet = Fleet(CANARY_THEN_ALL, agents=10)
    (canary,) = fleet.wanting(NEW)
    fleet.answer(canary, succeeded=False)
    fleet.tick()
    fleet.keep(machine.resume(fleet.rollout, fleet.devices.values()))
    fleet.tick()
    assert fleet.rollout.state is RolloutState.RUNNING
    assert fleet.wanting(NEW) == [canary]


def test_a_pause_takes_the_release_back_from_who_was_not_told() -> None:
    fleet = Fleet((Phase(share=0.2), Phase()), agents=10)
    told, untold = fleet.wanting(NEW)
    fleet.tell(told)
    fleet.rollout = machine.pause(fleet.rollout)
    assert fleet.wanting(NEW) == [told]
    fleet.keep(machine.resume(fleet.rollout, fleet.devices.values()))
    assert fleet.wanting(NEW) == sorted([told, untold])


def test_abort_sends_everybody_back_and_is_final() -> None:
    fleet = Fleet((Phase(share=0.2), Phase()), agents=10)
    for agent in fleet.wanting(NEW):
        fleet.answer(agent)
    fleet.tick()
    fleet.rollout = machine.abort(fleet.rollout)
    fleet.tick()
    assert len(fleet.wanting(OLD)) == 10
    for verb in (machine.pause, machine.abort, lambda rollout: machine.resume(rollout, ())):
        with pytest.raises(EbbflowError) as caught:
            verb(fleet.rollout)
        assert caught.value.reason is Reason.STATE_CONFLICT


def test_a_superseded_rollout_keeps_what_is_proven() -> None:
    fleet = Fleet((Phase(share=0.2), Phase()), agents=10)
    proven, asked = fleet.wanting(NEW)
    fleet.answer(proven)
    fleet.tell(asked)
    fleet.rollout = machine.supersede(fleet.rollout)
    assert fleet.wanting(NEW) == [proven]


@pytest.mark.parametrize(("share", "agents", "wanted"), [(0.1, 30, 3), (0.1, 1, 1), (0.1, 11, 2), (1.0, 7, 7)])
def test_a_phase_is_rounded_up_to_at_least_one(share: float, agents: int, wanted: int) -> None:
    assert phases.size(share, agents) == wanted


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        ((), "phases"),
        ((Phase(share=0.0), Phase()), "phases[0].share"),
        ((Phase(success_share=1.5),), "phases[0].success_share"),
        ((Phase(failure_share=1.0),), "phases[0].failure_share"),
        ((Phase(soak=-SECOND),), "phases[0].soak"),
        ((Phase(silence_limit=0 * SECOND),), "phases[0].silence_limit"),
    ],
)
def test_phases_that_cannot_work_are_refused_by_name(plan: tuple[Phase, ...], field: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        phases.check(plan)
    assert caught.value.metadata["field"] == field


plans = st.lists(
    st.builds(
        Phase,
        share=st.floats(0.01, 1.0),
        success_share=st.floats(0.3, 1.0),
        failure_share=st.floats(0.0, 0.7),
        min_answers=st.integers(1, 4),
        soak=st.integers(0, 3).map(lambda s: s * SECOND),
        silence_limit=st.integers(1, 4).map(lambda s: s * SECOND),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
EVENTS = (
    "tell",
    "fetch",
    "succeed",
    "fail",
    "leave",
    "return",
    "off",
    "on",
    "tick",
    "pause",
    "resume",
    "abort",
    "late",
)
events = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 30)), max_size=60)
ENDED = {RolloutState.ABORTED, RolloutState.SUPERSEDED, RolloutState.SUCCEEDED}


def happen(fleet: Fleet, event: str, choice: int) -> None:
    """One thing that an agent, a person or time does."""
    agents = sorted(fleet.devices)
    agent = agents[choice % len(agents)] if agents else None
    if event == "tick":
        fleet.tick(choice % 4 * SECOND)
    elif event == "late":
        name = f"late-{len(agents)}"
        fleet.devices[name] = Device(agent_id=name, phase=len(fleet.rollout.phases) - 1, previous_number=None)
    elif event in {"pause", "resume", "abort"}:
        with contextlib.suppress(EbbflowError):  # a verb that does not fit the state
            if event == "resume":
                fleet.keep(machine.resume(fleet.rollout, fleet.devices.values()))
            else:
                fleet.rollout = getattr(machine, event)(fleet.rollout)
    elif agent is not None:
        device = fleet.devices[agent]
        changes = {
            "leave": lambda: replace(device, available=False),
            "return": lambda: replace(device, available=True),
            "off": lambda: replace(device, connected=False),
            "on": lambda: replace(device, connected=True),
            "tell": lambda: machine.tell(fleet.rollout, device, fleet.now),
            "fetch": lambda: machine.fetching(device, fleet.now),
            "succeed": lambda: told_answer(fleet, device, True),
            "fail": lambda: told_answer(fleet, device, False),
        }
        fleet.devices[agent] = changes[event]()


def told_answer(fleet: Fleet, device: Device, succeeded: bool) -> Device:
    """A device answers for what it was told only."""
    if device.state is DeviceState.WAITING or fleet.rollout.state is RolloutState.ABORTED:
        return device
    return machine.answer(device, succeeded, fleet.now, "" if succeeded else "PROBE_LOSS")


def check_desired(fleet: Fleet) -> None:
    for agent, wanted in fleet.desired().items():
        device = fleet.devices[agent]
        assert wanted in {device.previous_number, NEW}
        if wanted == NEW and device.state is DeviceState.WAITING:
            assert device.phase <= fleet.rollout.phase_index
            assert fleet.rollout.state in machine.HANDING_OUT
        if fleet.rollout.state is RolloutState.ABORTED:
            assert wanted == device.previous_number
        if device.reason == "SILENT":
            assert device.assign_time is not None


def check_evidence(before: Fleet, after: Fleet) -> None:
    """A phase is left only on success in it, or when there was nobody to try it on."""
    for index in range(before.rollout.phase_index, after.rollout.phase_index):
        tried = [d for d in after.devices.values() if d.phase == index and d.state in machine.ANSWERED]
        untried = [d for d in before.devices.values() if d.available and d.state is DeviceState.WAITING]
        assert any(d.state is DeviceState.SUCCEEDED for d in tried) or not [d for d in untried if d.phase > index]


@settings(max_examples=300, deadline=None)
@given(plan=plans, agents=st.integers(0, 12), history=events)
def test_no_history_breaks_the_rules(plan: tuple[Phase, ...], agents: int, history: list[tuple[str, int]]) -> None:
    fleet = Fleet(plan, agents)
    for event, choice in history:
        before, state, index = copy_of(fleet), fleet.rollout.state, fleet.rollout.phase_index
        happen(fleet, event, choice)
        check_desired(fleet)
        check_evidence(before, fleet)
        assert fleet.rollout.phase_index >= index
        if state is RolloutState.HALTED and event not in {"resume", "abort"}:
            assert fleet.rollout.state is RolloutState.HALTED
        if state in ENDED:
            assert fleet.rollout.state is state
        if event == "tick":
            once = (fleet.rollout, dict(fleet.devices))
            fleet.tick()
            assert (fleet.rollout, fleet.devices) == once


@settings(max_examples=100, deadline=None)
@given(plan=plans, agents=st.integers(1, 12))
def test_a_healthy_fleet_always_gets_its_release(plan: tuple[Phase, ...], agents: int) -> None:
    fleet = Fleet(plan, agents)
    for _ in range(200):
        for agent in fleet.wanting(NEW):
            fleet.answer(agent)
        fleet.tick(SECOND)
    assert fleet.rollout.state is RolloutState.SUCCEEDED
    assert len(fleet.wanting(NEW)) == agents


def copy_of(fleet: Fleet) -> Fleet:
    twin = object.__new__(Fleet)
    twin.now, twin.rollout, twin.devices = fleet.now, fleet.rollout, dict(fleet.devices)
    return twin
