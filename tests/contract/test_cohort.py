"""Who is asked in a round, on every database."""

import datetime as dt
from typing import Any

import pytest
import sqlalchemy as sa
from feedback_world import AGENTS, DAY, NOW, SIGNER, add_fleet, open_round
from google.protobuf.duration_pb2 import Duration

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import round_pb2
from ebbflow.api.v1.round_pb2_grpc import RoundServiceStub
from ebbflow.cloud.feedback import cohort, policies, round_rows
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Agent,
    Assignment,
    Population,
    PopulationState,
    PrivacyAccount,
    PrivacyEntry,
    Round,
    RoundMember,
    Student,
)
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.accounting import rho_nano_cap

Plane = Any


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    return registry


def members(registry: Registry, round_: Round) -> list[str]:
    with registry.reading() as session:
        query = sa.select(RoundMember.agent_id).where(RoundMember.round_id == round_.id)
        return sorted(session.scalars(query))


def enrolled(registry: Registry, agent_id: str, time: dt.datetime) -> None:
    with registry.transaction() as session:
        agent = session.get_one(Agent, agent_id)
        agent.new_device, agent.create_time = False, time


def test_an_identity_younger_than_a_window_is_not_asked(fleet: Registry) -> None:
    enrolled(fleet, AGENTS[0], NOW - 29 * DAY)
    enrolled(fleet, AGENTS[1], NOW - 30 * DAY)
    assert members(fleet, open_round(fleet)) == [AGENTS[1], AGENTS[2]]
    assert members(fleet, open_round(fleet, NOW + DAY)) == list(AGENTS)


def test_an_identity_is_not_asked_in_a_window_that_began_before_it_was_a_week_old(fleet: Registry) -> None:
    """Windows of 30 days begin on 2026-11-03 and 2026-12-03."""
    enrolled(fleet, AGENTS[0], NOW - 7 * DAY)
    assert members(fleet, open_round(fleet, NOW + 24 * DAY)) == [AGENTS[1], AGENTS[2]]
    assert members(fleet, open_round(fleet, NOW + 30 * DAY)) == list(AGENTS)


def test_where_all_have_to_wait_the_cure_is_named(fleet: Registry) -> None:
    for day, agent_id in enumerate(AGENTS):
        enrolled(fleet, agent_id, NOW - day * DAY)
    with pytest.raises(EbbflowError, match=r"\(3\) .* from 2026-12-03 00:00 UTC on\. .*--new-device") as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.IDENTITY_WAITS
    with fleet.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Round)) == 0


def test_an_agent_whose_lifetime_is_spent_is_not_asked(fleet: Registry) -> None:
    with fleet.transaction() as session:
        student = session.get_one(Student, "faq")
        policy = pb.PrivacyPolicy(lifetime_rho_cap_nano=rho_nano_cap(4.5, 1e-6))
        policies.append(session, student, policy, "", PlanSigner(SIGNER), NOW)
    cost = round_rows.plan_of(open_round(fleet)).mechanism.rho_nano
    assert 4 * cost < rho_nano_cap(4.5, 1e-6) < 6 * cost
    for number in range(5):
        spend(fleet, AGENTS[0], f"old{number}", cost)
    assert members(fleet, open_round(fleet, NOW + 40 * DAY)) == [AGENTS[1], AGENTS[2]]
    for agent_id in AGENTS[1:]:
        for number in range(5):
            spend(fleet, agent_id, f"old{number}", cost)
    with pytest.raises(EbbflowError) as caught:
        open_round(fleet, NOW + 41 * DAY)
    assert caught.value.reason is Reason.LIFETIME_EXHAUSTED


def spend(registry: Registry, agent_id: str, round_id: str, rho_nano: int) -> None:
    """A charge of long ago."""
    account = {"agent_id": agent_id, "student_id": "faq", "window": "2025-01-01"}
    with registry.transaction() as session:
        if session.get(PrivacyAccount, tuple(account.values())) is None:
            session.add(PrivacyAccount(**account, rho_cap_nano=10**9, rho_spent_nano=0, delta=1e-6))
            session.flush()
        session.add(
            PrivacyEntry(
                batch_id=f"{agent_id}-{round_id}", round_id=round_id, rho_nano=rho_nano, create_time=NOW, **account
            )
        )


def test_the_release_that_most_serve_is_chosen_and_those_who_can_answer_are_counted() -> None:
    fleet = [cohort.Member(str(at), number) for at, number in enumerate([3, 3, 4, 4, 2, 5])]
    assert cohort.serving_most(fleet) == 4
    assert [cohort.able(fleet, 4, staleness) for staleness in (0, 1, 2)] == [2, 4, 5]


# Over gRPC


def serving(plane: Plane) -> Any:
    plane.student()
    plane.release()
    plane.agent("kiosk-7")
    plane.roll_out("faq", 1)
    plane.serve("kiosk-7", "faq", 1)
    return RoundServiceStub(plane.admin().channel)


def ask(**options: Any) -> round_pb2.OpenRoundRequest:
    return round_pb2.OpenRoundRequest(student="students/faq", **options)


async def test_an_operator_chooses_metrics_measure_and_limits(plane: Plane) -> None:
    stub = serving(plane)
    metrics = [pb.Metric(kind=pb.Metric.KIND_ACCEPTED, cap=2), pb.Metric(kind=pb.Metric.KIND_NEAR, cap=1)]
    request = ask(metrics=metrics, measure=pb.RoundPlan.MEASURE_STUDENT, max_users=50)
    plan = (await stub.OpenRound(request)).round.plan
    assert list(plan.metrics) == metrics
    assert (plan.measure, plan.max_users, plan.near_micro) == (pb.RoundPlan.MEASURE_STUDENT, 50, 300_000)
    assert plan.mechanism.sensitivity_squared == 1 + 4 + 1
    assert [bin_.bin_id for bin_ in plan.bins] == ["datetime", "regex", "json"]
    assert (await stub.OpenRound(ask())).round.plan.near_micro == 0


async def test_a_round_votes_on_the_prompts_of_a_generation(plane: Plane) -> None:
    stub = serving(plane)
    prompts = [{"promptId": f"2-{at}", "text": f"prompt {at}", "topic": "json"} for at in range(5)]
    with plane.registry.transaction() as session:
        row: dict[str, Any] = {"round_id": None, "create_time": NOW, "settings": {}, "student_id": "faq"}
        session.add(Population(generation=2, state=PopulationState.READY, prompts=prompts, **row))
        session.add(Population(generation=3, state=PopulationState.QUEUED, **row))
    plan = (await stub.OpenRound(ask(population=2))).round.plan
    assert [(bin_.bin_id, list(bin_.texts)) for bin_ in plan.bins] == [(f"2-{at}", [f"prompt {at}"]) for at in range(5)]
    for generation, reason in ((3, Reason.STATE_CONFLICT), (9, Reason.POPULATION_NOT_FOUND)):
        with pytest.raises(EbbflowError) as caught:
            await stub.OpenRound(ask(population=generation))
        assert caught.value.reason is reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"metrics": [pb.Metric(kind=pb.Metric.KIND_NEAR, cap=2)]}, Reason.PLAN_INVALID),
        ({"metrics": [pb.Metric(kind=pb.Metric.KIND_FAILED)]}, Reason.PLAN_INVALID),
        ({"max_users": 2_000_000}, Reason.PLAN_INVALID),
        ({"measure": 7}, Reason.PLAN_INVALID),
        ({"adapter": round_pb2.AdapterSettings(), "population": 1}, Reason.INVALID_REQUEST),
        ({"adapter": round_pb2.AdapterSettings(), "near_micro": 1}, Reason.INVALID_REQUEST),
        ({"adapter": round_pb2.AdapterSettings(), "measure": 1}, Reason.INVALID_REQUEST),
    ],
)
async def test_senseless_options_open_nothing(plane: Plane, options: dict[str, Any], reason: Reason) -> None:
    stub = serving(plane)
    with pytest.raises(EbbflowError) as caught:
        await stub.OpenRound(ask(**options))
    assert caught.value.reason is reason
    with plane.registry.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Round)) == 0


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({}, 10),
        ({"measure": pb.RoundPlan.MEASURE_STUDENT}, 600),
        ({"adapter": round_pb2.AdapterSettings()}, 600),
    ],
)
async def test_a_round_that_ends_before_anybody_can_answer_is_refused(
    plane: Plane, options: dict[str, Any], least: int
) -> None:
    stub = serving(plane)
    for seconds in (least - 1, -1):
        with pytest.raises(EbbflowError, match=f"at least {least} seconds") as caught:
            await stub.OpenRound(ask(duration=Duration(seconds=seconds), **options))
        assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_REQUEST, "duration")
    if "adapter" not in options:  # its policy allows none
        plan = (await stub.OpenRound(ask(duration=Duration(seconds=least), **options))).round.plan
        assert plan.end_time.seconds - plan.start_time.seconds == least + 7 * 24 * 3600


async def test_a_fresh_identity_without_the_operators_word_waits(plane: Plane) -> None:
    plane.student()
    plane.release()
    plane.agent("kiosk-7", new_device=False)
    with plane.registry.transaction() as session:
        session.add(Assignment(agent_id="kiosk-7", student_id="faq", serving_number=1))
    with pytest.raises(EbbflowError) as caught:
        await RoundServiceStub(plane.admin().channel).OpenRound(ask())
    assert caught.value.reason is Reason.IDENTITY_WAITS
