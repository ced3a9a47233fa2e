"""The device tells its owner in plain words what leaves it and what that has cost."""

import datetime as dt
from collections.abc import Callable

from securesystemslib.signer import CryptoSigner, Key

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.feedback.plans import PlanSigner, Timing, make_plan
from ebbflow.common.errors import Reason
from ebbflow.common.privacy.calibration import with_lifetime
from ebbflow.edge.feedback.identity import Identity
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling, admit
from ebbflow.edge.feedback.show import describe
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)


def test_before_anything_happened(store: FeedbackStore, now: dt.datetime) -> None:
    text = describe(store, Ceiling(), Identity(), now)
    assert "epsilon 4 at delta 1e-06 for each user and 30 days" in text
    assert "12 full windows are epsilon 17.4" in text
    assert "All windows together: epsilon 0.00 spent; not limited." in text
    assert "nothing yet" in text
    assert "0 interactions of 0 users" in text
    assert "Users take part unless they said no. Said yes: 0, said no: 0, paused: 0." in text
    assert "adapter" not in text
    assert "got its identity" not in text


def test_after_two_rounds(store: FeedbackStore, admitted: Callable[..., AdmittedPlan], now: dt.datetime) -> None:
    for i in range(2):
        store.release_batch(admitted(round_id=f"r{i}"), [], lambda _: b"", now)
    declined = admitted(round_id="r2")
    signed = pb.SignedPlan.FromString(declined.signed_plan)
    store.decline(signed, Reason.POLICY_TOO_WEAK, declined, now + dt.timedelta(hours=1))
    text = describe(store, Ceiling(), Identity(), now)
    assert "faq, window from 2026-11-03: epsilon 2.72 spent, 1.28 left (delta 1e-06; 2 reports)" in text
    assert "over all students: epsilon 2.72" in text
    assert "renews on 2026-12-03" in text
    assert "2 reports wait to be sent" in text
    assert "faq, policy version 1: epsilon 4 at delta 1e-06 for 30 days and 4 rounds, without a limit" in text
    assert "Rounds may not ask for adapter updates. The cloud keeps reports for 90 days." in text
    assert "2026-11-03 13:00 declined: POLICY_TOO_WEAK\n  2026-11-03 12:00 answered" in text


def test_lifetimes_of_policy_and_device(
    store: FeedbackStore, signer: CryptoSigner, keys: dict[str, Key], now: dt.datetime
) -> None:
    policy = with_lifetime(pb.PrivacyPolicy(), 6.0)
    document = pb.PolicyDocument(student="students/faq", version=2, policy=policy)
    bins = [pb.Bin(bin_id="files", texts=["files"])]
    plan = make_plan("r1", "faq", PlanSigner(signer).sign_policy(document), bins, Timing(now, DAY, DAY))
    ceiling = Ceiling(lifetime_epsilon=9.0, adapters=True)
    store.release_batch(admit(PlanSigner(signer).sign(plan), keys, ceiling, now), [], lambda _: b"", now)
    text = describe(store, ceiling, Identity(), now)
    assert "All windows together: epsilon 1.86 spent; epsilon 9." in text
    assert "policy version 2: " in text
    assert "epsilon 6.00 over all windows, of which 1.86 is spent." in text
    assert "This device also answers rounds of adapter updates" in text


def test_a_new_identity_says_how_long_it_waits(store: FeedbackStore, now: dt.datetime) -> None:
    waits = Identity(now - 10 * DAY)
    text = describe(store, Ceiling(), waits, now)
    assert "This device got its identity on 2026-10-24. Its users report from 2026-11-23 on" in text
    assert "got its identity" not in describe(store, Ceiling(), Identity(now, new_device=True), now)
    assert "got its identity" not in describe(store, Ceiling(), waits, now + 21 * DAY)


def test_people_are_counted_and_not_named(store: FeedbackStore, now: dt.datetime) -> None:
    store.record_interaction("faq", "r", "ada@example.org", "a question", "an answer", now=now)
    store.set_consent("ada@example.org", allowed=True)
    store.set_paused("ada@example.org", paused=True)
    store.set_consent("ben@example.org", allowed=False)
    text = describe(store, Ceiling(), Identity(), now)
    assert "Said yes: 1, said no: 1, paused: 1." in text
    assert "1 interactions of 1 users" in text
    assert "example.org" not in text
    assert "a question" not in text
