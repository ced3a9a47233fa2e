"""Who belongs to which phase, and what a rollout may ask for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.cloud.rollout import phases, spec, wire
from ebbflow.cloud.rollout.phases import Member, Phase
from ebbflow.cloud.rollout.spec import RolloutSpec
from ebbflow.cloud.rollout.windows import Window
from ebbflow.common.errors import EbbflowError, Reason

FLEET = [Member(f"agent-{n:02d}", {"ring": "canary" if n % 5 == 0 else "main"}) for n in range(20)]


def sizes(*plan: Phase, members: list[Member] = FLEET) -> list[int]:
    placed = phases.freeze(members, plan)
    return [sum(phase == index for phase in placed.values()) for index in range(len(plan))]


def test_a_phase_takes_a_share_a_number_or_those_that_match() -> None:
    assert sizes(Phase(share=0.1), Phase()) == [2, 18]
    assert sizes(Phase(count=3), Phase(share=0.5), Phase()) == [3, 10, 7]
    assert sizes(Phase(selector="ring=canary"), Phase()) == [4, 16]


def test_a_selector_with_a_share_or_a_number_takes_that_many_of_those_that_match() -> None:
    assert sizes(Phase(selector="ring=canary", count=3), Phase()) == [3, 17]
    assert sizes(Phase(selector="ring=main", share=0.25), Phase()) == [4, 16]
    assert sizes(Phase(selector="ring=canary", count=99), Phase()) == [4, 16]
    placed = phases.freeze(FLEET, [Phase(selector="ring=canary", count=3), Phase()])
    assert [agent for agent, phase in placed.items() if phase == 0] == ["agent-00", "agent-05", "agent-10"]


def test_nobody_is_in_two_phases() -> None:
    assert sizes(Phase(selector="ring=canary", count=1), Phase(selector="ring=canary"), Phase(share=1.0), Phase()) == [
        1,
        3,
        16,
        0,
    ]


def test_a_selector_that_matches_nobody_is_refused_unless_there_is_nobody_at_all() -> None:
    plan = (Phase(selector="ring=canry"), Phase())
    with pytest.raises(EbbflowError) as caught:
        phases.freeze(FLEET, plan)
    assert caught.value.metadata["field"] == "phases[0].selector"
    assert phases.freeze([], plan) == {}


plans = st.lists(
    st.one_of(st.builds(Phase, share=st.floats(0.01, 1.0)), st.builds(Phase, count=st.integers(1, 30))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=300)
@given(plan=plans, agents=st.integers(0, 40))
def test_every_agent_is_in_exactly_one_phase_and_none_is_in_too_many(plan: list[Phase], agents: int) -> None:
    phases.check(plan)
    members = [Member(f"agent-{n}", {"ring": "main"}) for n in range(agents)]
    placed = phases.freeze(members, plan)
    assert set(placed) == {member.agent_id for member in members}
    for index, phase in enumerate(plan[:-1]):
        most = phase.count or phases.size(phase.share, agents)
        assert sum(found == index for found in placed.values()) <= most


@given(agents=st.integers(0, 2000))
def test_the_built_in_phases_can_work(agents: int) -> None:
    phases.check(phases.defaults(agents))


@given(plan=plans)
def test_the_registry_keeps_phases_as_they_are(plan: list[Phase]) -> None:
    assert [wire.from_json(wire.to_json(phase)) for phase in plan] == plan


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"spread_s": -1.0}, "spread"),
        ({"spread_s": float("nan")}, "spread"),
        ({"spread_s": 8 * 86_400.0}, "spread"),
        ({"windows": (Window(start="noon"),)}, "windows[0].start"),
        ({"phases": (Phase(success_share=0.0),)}, "phases[0].success_share"),
    ],
)
def test_a_rollout_that_cannot_work_is_refused_by_name(fields: dict[str, object], field: str) -> None:
    spec.check(RolloutSpec(student_id="faq", number=1))
    with pytest.raises(EbbflowError) as caught:
        spec.check(RolloutSpec(student_id="faq", number=1, **fields))  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, field)
