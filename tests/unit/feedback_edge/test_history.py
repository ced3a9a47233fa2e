"""What the cloud asked of this device can be seen on it, whatever became of it."""

import datetime as dt
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback import history
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.show_plans import as_json, as_text
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)
Admit = Callable[..., AdmittedPlan]


def signed(plan: AdmittedPlan) -> pb.SignedPlan:
    return pb.SignedPlan.FromString(plan.signed_plan)


def strange(number: int, text: str = "") -> pb.SignedPlan:
    """A plan that nobody trusted signed."""
    plan = pb.RoundPlan(round=f"rounds/{number}", student="students/faq", bins=[pb.Bin(bin_id="x", texts=[text])])
    return pb.SignedPlan(plan=plan.SerializeToString(), signature=bytes([number % 256]))


def test_an_answered_plan_is_kept_with_its_signature(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    store.release_batch(plan, [], lambda _: b"", now)
    [decision] = store.decisions()
    assert (decision.round, decision.answered, decision.policy_version) == ("rounds/r1", True, 1)
    assert decision.plan == plan.plan
    assert [text for bin_ in decision.plan.bins for text in bin_.texts] == ["files", "dates", "networks"]


def test_a_declined_plan_is_kept_with_the_reason(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    plan = admitted()
    store.decline(signed(plan), Reason.IDENTITY_WAITS, plan, now)
    [decision] = store.decisions()
    assert (decision.answered, decision.reason, decision.plan) == (False, "IDENTITY_WAITS", plan.plan)


def test_a_plan_that_is_answered_in_the_end_says_so_and_stays_so(
    store: FeedbackStore, admitted: Admit, now: dt.datetime
) -> None:
    plan = admitted()
    store.decline(signed(plan), Reason.IDENTITY_WAITS, plan, now)
    store.release_batch(plan, [], lambda _: b"", now)
    store.decline(signed(plan), Reason.ROUND_CLOSED, None, now + DAY)
    assert [decision.answered for decision in store.decisions()] == [True]


def test_a_flood_of_plans_pushes_out_no_answered_one(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    store.release_batch(admitted(), [], lambda _: b"", now - DAY)
    for number in range(history.KEEP_DECLINED + 20):
        store.decline(strange(number), Reason.PLAN_UNTRUSTED, None, now + number * dt.timedelta(seconds=1))
    decisions = store.decisions(1000)
    assert len(decisions) == history.KEEP_DECLINED + 1
    assert decisions[0].round == f"rounds/{history.KEEP_DECLINED + 19}"
    assert decisions[-1].answered


def test_bytes_that_are_no_plan_and_plans_without_measure_are_kept_small(
    tmp_path: Path, store: FeedbackStore, now: dt.datetime
) -> None:
    store.decline(pb.SignedPlan(plan=b"\xff\xff\xff"), Reason.PLAN_UNTRUSTED, None, now)
    store.decline(strange(1, os.urandom(2 * 2**20).hex()), Reason.PLAN_UNTRUSTED, None, now + DAY)
    first, second = store.decisions()
    assert (first.round, list(first.plan.bins)) == ("rounds/1", [])
    assert second.round == ""
    store.close()
    assert (tmp_path / "agent.db").stat().st_size < 2**20


def test_once_there_is_no_room_for_what_was_asked_nothing_is_answered(
    store: FeedbackStore, admitted: Admit, now: dt.datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.release_batch(admitted(), [], lambda _: b"", now)
    monkeypatch.setattr(history, "MAX_BYTES", 100)
    with pytest.raises(EbbflowError) as caught:
        store.release_batch(admitted(round_id="r2"), [], lambda _: b"", now)
    assert caught.value.metadata["why"] == "history"
    store.apply_retention(now + history.KEEP_ANSWERED + DAY)
    assert store.decisions() == []
    store.release_batch(admitted(round_id="r2"), [], lambda _: b"", now)


def test_the_text_shows_at_whom_bins_aim(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    store.release_batch(admitted(), [], lambda _: b"", now)
    store.decline(strange(7, "does \x1b[2J Anna of flat 3 ask for a lawyer"), Reason.PLAN_UNTRUSTED, None, now + DAY)
    text = as_text(store.decisions(), 2)
    assert "2026-11-03 12:00 rounds/r1 answered" in text
    assert "votes over 3 bins; epsilon 1.86 for each user (delta 1e-06)" in text
    assert "rounds/7 declined: PLAN_UNTRUSTED" in text
    assert "does \N{REPLACEMENT CHARACTER}[2J Anna of flat 3 ask for a lawyer" in text
    assert "\x1b" not in text
    assert "lawyer" not in as_text(store.decisions(), 0)


def test_json_holds_everything(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    store.release_batch(admitted(), [], lambda _: b"", now)
    [found] = json.loads(as_json(store.decisions()))
    assert (found["decision"], found["policyVersion"], found["plan"]["round"]) == ("answered", 1, "rounds/r1")
    assert [bin_["binId"] for bin_ in found["plan"]["bins"]] == ["files", "dates", "networks"]


def test_without_plans_there_is_nothing_to_show(store: FeedbackStore) -> None:
    assert as_text(store.decisions(), 2) == "The cloud has asked nothing of this device yet."
    assert json.loads(as_json([])) == []
