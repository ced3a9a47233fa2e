"""What a rollout says that it does next."""

import datetime as dt
from dataclasses import replace

import pytest

from ebbflow.cloud.registry.tables import DeviceState, RolloutState
from ebbflow.cloud.rollout import decision, machine
from ebbflow.cloud.rollout.phases import Phase
from ebbflow.cloud.rollout.state import Decision, Device, Rollout
from ebbflow.cloud.rollout.windows import Window

NOW = dt.datetime(2026, 11, 1, 12, tzinfo=dt.UTC)
MINUTE = dt.timedelta(minutes=1)
PLAN = (Phase(count=3, min_answers=2, soak=10 * MINUTE), Phase(success_share=0.5, failure_share=0.5))


def devices(*states: str, phase: int = 0, connected: bool = True) -> list[Device]:
    return [
        Device(
            agent_id=f"agent-{phase}-{n}",
            phase=phase,
            previous_number=1,
            state=DeviceState(state),
            not_before_time=NOW,
            assign_time=NOW,
            connected=connected,
        )
        for n, state in enumerate(states)
    ]


def rollout(**fields: object) -> Rollout:
    return replace(Rollout(release_number=2, phases=PLAN, phase_begin_time=NOW), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (RolloutState.WAITING_FOR_APPROVAL, Decision("begin phase 1", "a second person must approve it")),
        (RolloutState.PAUSED, Decision("go on with phase 1", "somebody paused it and must resume it")),
        (RolloutState.HALTED, Decision("nothing until somebody resumes or aborts it", "phase 1: it failed")),
        (RolloutState.ABORTED, Decision("", "it has ended")),
        (RolloutState.SUPERSEDED, Decision("", "it has ended")),
        (RolloutState.SUCCEEDED, Decision("bring release 2 to later agents", "none waits for it")),
    ],
)
def test_each_state_says_what_comes_next(state: RolloutState, expected: Decision) -> None:
    assert decision.next_decision(rollout(state=state, reason="phase 1: it failed"), [], NOW) == expected


def test_answers_that_are_missing_are_counted() -> None:
    found = decision.next_decision(rollout(), devices("succeeded", "assigned", "waiting"), NOW)
    assert found == Decision("advance to phase 2", "1 of 2 answers are in")


def test_successes_that_are_missing_are_counted() -> None:
    lenient = replace(PLAN[0], failure_share=0.9)
    found = decision.next_decision(rollout(phases=(lenient, PLAN[1])), devices("succeeded", "failed", "assigned"), NOW)
    assert found == Decision("advance to phase 2", "1 of 2 that answered succeeded, 100% must")


def test_the_end_of_the_soak_time_is_named() -> None:
    soaking = rollout(phase_passed_time=NOW - MINUTE)
    found = decision.next_decision(soaking, devices("succeeded", "succeeded", "succeeded"), NOW)
    assert found == Decision("advance to phase 2", "it soaks", NOW + 9 * MINUTE)


def test_the_last_phase_waits_for_those_under_way() -> None:
    found = decision.next_decision(rollout(phase_index=1), devices("succeeded", "assigned", phase=1), NOW)
    assert found == Decision("finish", "1 device under way")


def test_the_opening_of_the_window_is_named() -> None:
    nightly = (Window(start="22:00", duration=4 * 60 * MINUTE),)
    found = decision.next_decision(rollout(windows=nightly), devices("waiting", "waiting", "waiting"), NOW)
    assert found == Decision("tell 3 devices of phase 1", "the maintenance window is shut", NOW.replace(hour=22))
    done = rollout(windows=nightly, state=RolloutState.SUCCEEDED)
    found = decision.next_decision(done, devices("waiting", connected=False), NOW)
    assert found.earliest_time == NOW.replace(hour=22)


def test_what_the_decision_names_happens_at_that_time_and_not_before() -> None:
    known = devices("succeeded", "succeeded", "succeeded") + devices("waiting", phase=1)
    step = machine.tick(rollout(), known, NOW)
    ends = decision.next_decision(step.rollout, step.devices, NOW).earliest_time
    assert ends is not None
    assert machine.tick(step.rollout, step.devices, ends - dt.timedelta(microseconds=1)).rollout.phase_index == 0
    assert machine.tick(step.rollout, step.devices, ends).rollout.phase_index == 1
