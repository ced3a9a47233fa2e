"""The account is charged once for each round, before anything can leave, and never beyond its caps."""

import datetime as dt
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity import keys as identity
from ebbflow.common.privacy.accounting import epsilon_of
from ebbflow.common.privacy.checks import check_batch, parse_batch
from ebbflow.common.privacy.vector import Contribution
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)
KEY = identity.generate_key()
Admit = Callable[..., AdmittedPlan]


def sign(data: bytes) -> bytes:
    return identity.sign(KEY, data)


def test_a_released_batch_is_what_the_cloud_accepts(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    signed = pb.SignedBatch.FromString(store.release_batch(plan, [Contribution(0)] * 30, sign, now))
    identity.verify(KEY.public_key(), signed.signature, signed.batch)
    check_batch(plan.plan, plan.plan_sha256, parse_batch(signed.batch))


def test_an_agent_without_users_reports_all_the_same(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    signed = pb.SignedBatch.FromString(store.release_batch(plan, [], sign, now))
    check_batch(plan.plan, plan.plan_sha256, parse_batch(signed.batch))


def test_more_users_than_the_plan_counts_still_give_an_acceptable_batch(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    plan = admitted(max_users=5)
    signed = pb.SignedBatch.FromString(store.release_batch(plan, [Contribution(0)] * 500, sign, now))
    check_batch(plan.plan, plan.plan_sha256, parse_batch(signed.batch))


def test_a_retry_has_identical_bytes_and_no_second_charge(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    plan = admitted()
    first = store.release_batch(plan, [Contribution(0)], sign, now)
    again = store.release_batch(plan, [Contribution(1), Contribution(2)], sign, now + DAY)
    assert again == first
    [account] = store.accounts()
    assert account.entries == 1
    assert account.rho_spent_nano == plan.plan.mechanism.rho_nano


def test_the_bytes_survive_a_restart(tmp_path: Path, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    store = FeedbackStore(tmp_path / "agent.db")
    first = store.release_batch(plan, [Contribution(0)], sign, now)
    store.close()
    store = FeedbackStore(tmp_path / "agent.db")
    assert [waiting.signed_batch for waiting in store.pending(now)] == [first]
    assert store.release_batch(plan, [], sign, now) == first
    store.close()


def test_another_plan_for_an_answered_round_is_not_answered(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    store.release_batch(admitted(), [], sign, now)
    with pytest.raises(EbbflowError) as caught:
        store.release_batch(admitted(max_users=7), [], sign, now)
    assert caught.value.reason is Reason.PLAN_INVALID
    assert store.accounts()[0].entries == 1


def test_a_window_has_its_rounds_and_not_one_more(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    for i in range(4):
        store.release_batch(admitted(round_id=f"r{i}"), [], sign, now)
    with pytest.raises(EbbflowError) as caught:
        store.release_batch(admitted(round_id="r4"), [], sign, now)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    [account] = store.accounts()
    assert (account.entries, account.rho_spent_nano) == (4, account.rho_cap_nano)
    assert epsilon_of(account.rho_spent_nano, account.delta) <= 4.0
    assert len(store.pending(now)) == 4


def test_the_next_window_renews_the_budget(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    for i in range(8):
        at = now + 30 * DAY * (i // 4)
        store.release_batch(admitted(round_id=f"r{i}", at=at), [], sign, at)
    assert [account.entries for account in store.accounts()] == [4, 4]


def test_the_ceiling_holds_over_all_students_together(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    for i in range(4):
        store.release_batch(admitted(round_id=f"r{i}", student="faq"), [], sign, now)
    with pytest.raises(EbbflowError) as caught:
        store.release_batch(admitted(round_id="r9", student="poetry"), [], sign, now)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert "this device" in str(caught.value)
    assert [account.student for account in store.accounts()] == ["faq"]
    higher = Ceiling(epsilon=8.0)
    store.release_batch(admitted(round_id="r9", student="poetry", ceiling=higher), [], sign, now)
    assert {account.student for account in store.accounts()} == {"faq", "poetry"}


def test_a_failing_signature_costs_nothing(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    def fails(_: bytes) -> bytes:
        raise EbbflowError(Reason.NOT_ENROLLED, "no key")

    with pytest.raises(EbbflowError):
        store.release_batch(admitted(), [], fails, now)
    assert store.accounts() == []
    assert not store.has_answered("rounds/r1")


def test_a_round_that_ended_while_it_was_computed_costs_nothing(store: FeedbackStore, admitted: Admit) -> None:
    plan = admitted()
    with pytest.raises(EbbflowError) as caught:
        store.release_batch(plan, [], sign, plan.end_time)
    assert caught.value.reason is Reason.ROUND_CLOSED
    assert store.accounts() == []


def test_what_the_cloud_answered_is_not_sent_again(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    for i in range(3):
        store.release_batch(admitted(round_id=f"r{i}"), [], sign, now)
    first, second, third = store.pending(now)
    assert [batch.round for batch in (first, second, third)] == ["rounds/r0", "rounds/r1", "rounds/r2"]
    store.mark_sent(first.batch_id)
    store.mark_refused(second.batch_id, "under_noised")
    assert store.pending(now) == [third]
    assert store.pending(now + 2 * DAY) == []
    assert store.accounts()[0].entries == 3


def test_old_bytes_are_forgotten_and_their_charge_is_not(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    plan = admitted()
    store.release_batch(plan, [], sign, now)
    store.apply_retention(now + 20 * DAY)
    assert store.accounts()[0].entries == 1
    with pytest.raises(EbbflowError) as caught:
        store.release_batch(plan, [], sign, now)
    assert caught.value.reason is Reason.PLAN_INVALID
    assert store.accounts()[0].entries == 1


def test_threads_cannot_spend_twice(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plans = [admitted(round_id=f"r{i % 6}") for i in range(24)]
    done: list[bytes] = []
    refused: list[EbbflowError] = []

    def work(plan: AdmittedPlan) -> None:
        try:
            done.append(store.release_batch(plan, [], sign, now))
        except EbbflowError as error:
            refused.append(error)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(done)) == 4
    assert {error.reason for error in refused} == {Reason.BUDGET_EXHAUSTED}
    [account] = store.accounts()
    assert account.entries == 4
