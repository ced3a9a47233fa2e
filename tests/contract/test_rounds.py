"""Rounds open for whom they should and as often as they may, on every database."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from feedback_world import AGENTS, DAY, NOW, Device, add_fleet, close_all, count, open_round

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback import charges, rounds
from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Assignment,
    Round,
    RoundState,
)
from ebbflow.common.errors import EbbflowError, Reason


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    return registry


def test_the_cohort_is_who_serves_the_student_and_is_frozen(fleet: Registry) -> None:
    round_ = open_round(fleet)
    with fleet.transaction() as session:
        session.add(Assignment(agent_id="stranger", student_id="faq", serving_number=1))
    with fleet.reading() as session:
        assert rounds.counts(session, [round_.id])[round_.id][0] == len(AGENTS)
        for agent in AGENTS:
            [signed] = rounds.signed_plans(session, rounds.waiting_for(session, agent, NOW))
            assert pb.RoundPlan.FromString(signed.plan).round == f"rounds/{round_.id}"
        for agent in ("stranger", "elsewhere", "revoked", "empty"):
            assert rounds.signed_plans(session, rounds.waiting_for(session, agent, NOW)) == []
        assert rounds.signed_plans(session, rounds.waiting_for(session, AGENTS[0], NOW + DAY)) == []


def asked(registry: Registry, agent: str) -> list[str]:
    with registry.reading() as session:
        plans = rounds.signed_plans(session, rounds.waiting_for(session, agent, NOW))
        charged = {charge.round for charge in charges.known(session, agent)}
    wanted = [pb.RoundPlan.FromString(signed.plan).round for signed in plans]
    assert not charged & set(wanted), "what was charged is not asked again"
    return wanted


def test_an_agent_that_has_answered_is_not_sent_the_plan_again(fleet: Registry, devices: list[Device]) -> None:
    first = f"rounds/{open_round(fleet).id}"
    signed = devices[0].answer(fleet, [])
    assert asked(fleet, AGENTS[0]) == [first], "nothing has arrived yet"
    devices[0].submit(fleet, signed)
    assert (asked(fleet, AGENTS[0]), asked(fleet, AGENTS[1])) == ([], [first])
    second = f"rounds/{open_round(fleet, NOW + DAY / 24).id}"
    assert (asked(fleet, AGENTS[0]), asked(fleet, AGENTS[1])) == ([second], [first, second])


def test_a_refused_batch_ends_only_the_round_that_it_was_for(fleet: Registry, devices: list[Device]) -> None:
    round_ = f"rounds/{open_round(fleet).id}"
    good = devices[0].answer(fleet, [])
    for bad in (
        pb.SignedBatch(batch=good.batch, signature=b"of nobody"),
        devices[0].resign(good, lambda batch: setattr(batch, "round", "rounds/elsewhere")),
    ):
        with pytest.raises(EbbflowError):
            devices[0].submit(fleet, bad)
        assert asked(fleet, AGENTS[0]) == [round_], "nobody knows that it was for this round"
    with pytest.raises(EbbflowError):
        devices[0].submit(fleet, devices[0].resign(good, lambda batch: batch.noisy.append(1)))
    assert (asked(fleet, AGENTS[0]), asked(fleet, AGENTS[1])) == ([], [round_])
    devices[0].submit(fleet, good)
    assert asked(fleet, AGENTS[0]) == []


def test_opening_and_closing_tell_the_fleet(fleet: Registry) -> None:
    seen = []
    for act in (lambda: open_round(fleet), lambda: close_all(fleet)):
        act()
        with fleet.reading() as session:
            seen.append(changes.revisions(session)["plan"])
    assert seen == [1, 2]


def test_a_window_has_its_rounds_and_not_one_more(fleet: Registry) -> None:
    for _ in range(4):
        open_round(fleet)
    with pytest.raises(EbbflowError) as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert open_round(fleet, NOW + 30 * DAY).window == "2026-12-03"


def test_replicas_that_open_at_once_share_one_budget(fleet: Registry) -> None:
    def attempt(_: int) -> bool:
        try:
            open_round(fleet)
        except EbbflowError as error:
            assert error.reason is Reason.BUDGET_EXHAUSTED  # noqa: PT017 - both outcomes are expected
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(attempt, range(8))) == 4


def test_a_student_that_nobody_serves_has_no_round(fleet: Registry) -> None:
    with fleet.transaction() as session:
        session.execute(sa.delete(Assignment))
    with pytest.raises(EbbflowError, match="no agent serves") as caught:
        open_round(fleet)
    assert caught.value.reason is Reason.STATE_CONFLICT
    assert count(fleet, Round) == 0


def test_overdue_rounds_close_by_themselves(fleet: Registry) -> None:
    first, second = open_round(fleet), open_round(fleet, NOW + DAY / 2)
    assert rounds.close_overdue(fleet, NOW + DAY) == [first.id]
    assert rounds.close_overdue(fleet, NOW + DAY) == []
    with fleet.reading() as session:
        assert session.get_one(Round, second.id).state == RoundState.OPEN


def test_a_round_that_cannot_be_closed_keeps_no_other_open(fleet: Registry, caplog: pytest.LogCaptureFixture) -> None:
    first, second = open_round(fleet), open_round(fleet)
    with fleet.transaction() as session:
        row = session.get_one(Round, first.id)
        # Its turn comes first; and it is the younger one, because a round is compared with those before it.
        row.plan, row.end_time, row.create_time = b"damaged", row.end_time - DAY / 24, row.create_time + DAY / 24
    for closed in ([second.id], []):
        assert rounds.close_overdue(fleet, NOW + DAY) == closed
    with fleet.reading() as session:
        assert session.get_one(Round, first.id).state == RoundState.OPEN
    assert [f"rounds/{first.id}" in record.getMessage() for record in caplog.records] == [True, True]
    with fleet.transaction() as session:
        session.get_one(Round, first.id).plan = first.plan
    assert rounds.close_overdue(fleet, NOW + DAY) == [first.id], "it has its turn again"


def test_an_unknown_round_cannot_be_closed(fleet: Registry) -> None:
    with fleet.transaction() as session, pytest.raises(EbbflowError) as caught:
        rounds.close_round(session, "nope")
    assert caught.value.reason is Reason.ROUND_NOT_FOUND
