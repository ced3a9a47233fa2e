"""What is kept of users: hashed, limited, purgeable, readable by nobody else."""

import datetime as dt
import os
import sqlite3
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.interactions import MAX_TEXT_CHARACTERS, Retention
from ebbflow.edge.feedback.plans import AdmittedPlan
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.feedback.users import UserHasher

DAY = dt.timedelta(days=1)
Admit = Callable[..., AdmittedPlan]


def embed(texts: Sequence[str]) -> npt.NDArray[np.float64]:
    return np.array([[text.count(name) for name in ("files", "dates", "networks")] for text in texts], float)


def ask(store: FeedbackStore, user: str | None, prompt: str, now: dt.datetime, student: str = "faq") -> str:
    return store.record_interaction(student, f"students/{student}/releases/1", user, prompt, "an answer", now=now)


def test_a_users_vote_is_where_the_user_asked(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    for user, topic in (("anna", "files"), ("ben", "dates"), ("cara", "dates")):
        for _ in range(5):
            ask(store, user, topic, now - DAY)
    failed = ask(store, "dora", "networks", now - DAY)
    store.record_outcome(failed, rpb.OUTCOME_REJECTED)
    found = sorted((vote.bin, vote.failed) for vote in store.contributions(admitted(), embed))
    assert found == [(0, False), (1, False), (1, False), (2, True)]


def test_only_the_plans_student_and_time_count(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    ask(store, "anna", "files", now - 8 * DAY)
    ask(store, "ben", "files", now - DAY, student="other")
    ask(store, "cara", "files", now + 2 * DAY)
    assert store.contributions(admitted(), embed) == []


def test_requests_without_a_user_key_share_one_user(store: FeedbackStore, admitted: Admit, now: dt.datetime) -> None:
    for key in (None, None, ""):
        ask(store, key, "files", now - DAY)
    assert len(store.contributions(admitted(), embed)) == 1


def test_purging_leaves_nothing_of_a_user_in_any_file(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    for _ in range(50):
        ask(store, "anna", "ANNAS-SECRET" * 20, now)
    ask(store, "ben", "BENS-TEXT", now)
    assert store.purge_user("anna") == 50
    assert store.purge_user("anna") == 0
    for file in tmp_path.iterdir():
        assert b"ANNAS-SECRET" not in file.read_bytes(), file
    assert store.count() == (1, 1)
    store.close()


def test_user_keys_are_never_written(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    ask(store, "anna@example.org", "files", now)
    for file in tmp_path.iterdir():
        assert b"anna@example" not in file.read_bytes(), file
    store.close()


def test_the_same_user_has_another_hash_on_another_device(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = (UserHasher.load(folder / "users.key") for folder in (tmp_path, tmp_path / "other"))
    again = UserHasher.load(tmp_path / "users.key")
    assert first.hash("anna") == again.hash("anna") != second.hash("anna")
    assert len({first.hash("anna"), first.hash("ben"), first.hash(None)}) == 3
    assert first.hash(None) == first.hash("") != first.hash("nobody")


def test_a_damaged_key_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "users.key").write_bytes(b"short")
    with pytest.raises(EbbflowError) as caught:
        FeedbackStore(tmp_path / "agent.db")
    assert caught.value.reason is Reason.FILE_CORRUPT


@pytest.mark.parametrize("lost", [True, False])
def test_users_do_not_become_others_when_their_key_is_lost(tmp_path: Path, now: dt.datetime, *, lost: bool) -> None:
    """Otherwise each would vote twice, under the old hash and under the new one."""
    store = FeedbackStore(tmp_path / "agent.db")
    ask(store, "anna", "files", now)
    store.close()
    if lost:
        (tmp_path / "users.key").unlink()
    else:
        (tmp_path / "users.key").write_bytes(b"k" * 32)
    for _ in range(2):
        with pytest.raises(EbbflowError) as caught:
            FeedbackStore(tmp_path / "agent.db")
        assert caught.value.reason is Reason.FILE_CORRUPT
        assert "users.key" in str(caught.value)
    for file in tmp_path.iterdir():
        file.unlink()
    store = FeedbackStore(tmp_path / "agent.db")
    assert store.count() == (0, 0)
    store.close()


def test_every_file_is_readable_by_its_owner_only(tmp_path: Path, now: dt.datetime) -> None:
    before = os.umask(0)
    try:
        store = FeedbackStore(tmp_path / "agent.db")
        ask(store, "anna", "files", now)
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {"agent.db", "agent.db-wal", "users.key"} <= set(modes)
    assert set(modes.values()) == {0o600}
    store.close()


def test_interactions_leave_after_their_time(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db", Retention(days=10))
    ask(store, "anna", "old", now - 11 * DAY)
    ask(store, "anna", "new", now - 9 * DAY)
    assert store.apply_retention(now) == 1
    assert store.count() == (1, 1)
    store.close()


def test_what_is_past_its_time_is_on_the_disk_no_more(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db", Retention(days=30, rows_per_user=1))
    ask(store, "anna", "ANNAS-SECRET" * 20, now - 40 * DAY)
    ask(store, "ben", "BENS-SECRET" * 20, now - DAY)
    ask(store, "ben", "BENS-TEXT", now)  # pushes out what Ben asked before
    assert store.apply_retention(now) == 1
    for file in tmp_path.iterdir():
        assert not any(secret in file.read_bytes() for secret in (b"ANNAS-SECRET", b"BENS-SECRET")), file
    assert store.count() == (1, 1)
    store.close()


def test_what_a_clock_that_ran_ahead_recorded_does_not_stay_for_longer(store: FeedbackStore, now: dt.datetime) -> None:
    ask(store, "anna", "files", now + 730 * DAY)
    assert store.apply_retention(now) == 0
    assert store.apply_retention(now + 29 * DAY) == 0
    assert store.apply_retention(now + 31 * DAY) == 1


def test_a_clock_that_is_set_back_for_a_while_makes_nothing_older(store: FeedbackStore, now: dt.datetime) -> None:
    ask(store, "anna", "files", now)
    assert store.apply_retention(now - 20 * DAY) == 0
    assert store.apply_retention(now + 29 * DAY) == 0
    assert store.apply_retention(now + 31 * DAY) == 1


def test_who_reads_does_not_stop_retention_and_the_log_is_emptied_the_next_time(
    tmp_path: Path, now: dt.datetime
) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    ask(store, "anna", "ANNAS-SECRET" * 20, now - 40 * DAY)
    log = tmp_path / "agent.db-wal"
    other = sqlite3.connect(tmp_path / "agent.db", isolation_level=None)
    other.execute("BEGIN")
    assert other.execute("SELECT COUNT(*) FROM interactions").fetchone() == (1,)
    assert store.apply_retention(now) == 1
    assert b"ANNAS-SECRET" in log.read_bytes()
    other.close()
    assert store.apply_retention(now) == 0
    assert b"ANNAS-SECRET" not in log.read_bytes()
    store.close()


def test_one_users_flood_pushes_out_only_that_users_own(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db", Retention(rows_per_user=5))
    ask(store, "ben", "files", now)
    for i in range(20):
        ask(store, "anna", "dates", now + dt.timedelta(seconds=i))
    assert store.count() == (6, 2)
    store.close()


def test_the_same_interaction_twice_is_kept_once(store: FeedbackStore, now: dt.datetime) -> None:
    for _ in range(2):
        store.record_interaction("faq", "r", "anna", "p", "a", interaction_id="i1", now=now)
    assert store.count() == (1, 1)


def test_long_texts_are_cut_and_broken_ones_kept(tmp_path: Path, now: dt.datetime) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    ask(store, "anna", "x" * (MAX_TEXT_CHARACTERS + 1), now)
    ask(store, "ben", "half a pair \ud800", now)
    with sqlite3.connect(tmp_path / "agent.db") as connection:
        lengths = [row[0] for row in connection.execute("SELECT length(prompt) FROM interactions ORDER BY 1 DESC")]
    connection.close()
    assert lengths == [MAX_TEXT_CHARACTERS, len("half a pair ?")]
    store.close()


@pytest.mark.parametrize(
    ("interaction", "outcome", "reason"),
    [
        ("unknown", rpb.OUTCOME_ACCEPTED, Reason.INTERACTION_NOT_FOUND),
        ("known", rpb.OUTCOME_UNSPECIFIED, Reason.INVALID_REQUEST),
        ("known", 17, Reason.INVALID_REQUEST),
    ],
)
def test_a_wrong_outcome_is_refused(
    store: FeedbackStore, now: dt.datetime, interaction: str, outcome: rpb.Outcome.ValueType, reason: Reason
) -> None:
    store.record_interaction("faq", "r", "anna", "p", "a", interaction_id="known", now=now)
    with pytest.raises(EbbflowError) as caught:
        store.record_outcome(interaction, outcome)
    assert caught.value.reason is reason


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "agent.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(EbbflowError) as caught:
        FeedbackStore(tmp_path / "agent.db")
    assert caught.value.reason is Reason.FILE_CORRUPT
    assert "agent.db" in str(caught.value)


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    FeedbackStore(tmp_path / "agent.db").close()
    connection = sqlite3.connect(tmp_path / "agent.db")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(EbbflowError) as caught:
        FeedbackStore(tmp_path / "agent.db")
    assert caught.value.reason is Reason.SCHEMA_NEWER
