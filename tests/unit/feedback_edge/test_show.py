"""The device tells its owner in plain words what leaves it and what that has cost."""

import datetime as dt
from collections.abc import Callable

from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling
from ebbflow.edge.feedback.show import describe
from ebbflow.edge.feedback.store import FeedbackStore


def test_before_anything_happened(store: FeedbackStore, now: dt.datetime) -> None:
    text = describe(store, Ceiling(), now)
    assert "epsilon 4 at delta 1e-06 for each user and 30 days" in text
    assert "12 full windows are epsilon 17.4" in text
    assert "nothing yet" in text
    assert "0 interactions of 0 users" in text


def test_after_two_rounds(store: FeedbackStore, admitted: Callable[..., AdmittedPlan], now: dt.datetime) -> None:
    for i in range(2):
        store.release_batch(admitted(round_id=f"r{i}"), [], lambda _: b"", now)
    text = describe(store, Ceiling(), now)
    assert "faq, window from 2026-11-03: epsilon 2.72 spent, 1.28 left (delta 1e-06; 2 reports)" in text
    assert "over all students: epsilon 2.72" in text
    assert "renews on 2026-12-03" in text
    assert "2 reports wait to be sent" in text
