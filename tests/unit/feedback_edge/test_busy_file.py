"""Another process holds `agent.db`, a backup say: what must be kept is kept in order, and nobody waits for long."""

import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback import store as store_module
from ebbflow.edge.feedback.database import Database
from ebbflow.edge.feedback.store import FeedbackStore

RELEASE = "students/faq/releases/1"


def other(path: Path, *statements: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for statement in statements:
        connection.execute(statement).fetchall()
    return connection


@contextmanager
def read(path: Path) -> Iterator[None]:
    """Somebody else reads one state of the file."""
    with closing(other(path, "BEGIN", "SELECT COUNT(*) FROM interactions")):
        yield


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Somebody else holds the write lock."""
    with closing(other(path, "BEGIN IMMEDIATE")):
        yield


def submit(store: FeedbackStore, id_: str, user: str = "ada") -> "Future[None]":
    return store.submit_interaction(id_, "faq", RELEASE, user, f"prompt {id_}", "an answer")


def kept(path: Path) -> list[tuple[str, int]]:
    with closing(other(path)) as connection:
        return connection.execute("SELECT id, outcome FROM interactions ORDER BY rowid").fetchall()


def test_writes_pass_a_scrub_that_waits_for_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    store = FeedbackStore(path)
    for user in ("ada", "ben"):
        store.record_interaction("faq", RELEASE, user, "ADAS-SECRET" if user == "ada" else "text", "answer")
    with ThreadPoolExecutor(2) as threads:
        with read(path):
            purges = [threads.submit(store.purge_user, user) for user in ("ada", "nobody")]
            wait(purges, 0.5)
            for i in range(4):
                begin_s = time.monotonic()
                store.record_interaction("faq", RELEASE, f"u{i}", "question", "answer")
                store.set_consent(f"v{i}", allowed=True)
                assert time.monotonic() - begin_s < 1.5
            assert not any(purge.done() for purge in purges), "what was removed is in the log as long as it is read"
        assert [purge.result(10) for purge in purges] == [1, 0]
    assert store.count() == (5, 5)
    for file in tmp_path.iterdir():
        assert b"ADAS-SECRET" not in file.read_bytes(), file
    store.close()


def test_a_scrub_gives_up_in_its_time(tmp_path: Path) -> None:
    FeedbackStore(tmp_path / "agent.db").close()
    database = Database(tmp_path / "agent.db", "NORMAL")
    with read(tmp_path / "agent.db"):
        with database.transaction() as connection:
            connection.execute("INSERT INTO users (user, allowed) VALUES (x'00', 1)")
        begin_s = time.monotonic()
        with pytest.raises(EbbflowError) as caught:
            database.scrub(0.6)
        assert 0.6 <= time.monotonic() - begin_s < 3
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    database.scrub(0.6)
    database.close()


def test_an_outcome_comes_behind_the_record_that_waits(store: FeedbackStore, tmp_path: Path) -> None:
    with written(tmp_path / "agent.db"):
        records = [submit(store, id_) for id_ in "ab"]
        outcomes = [store.submit_outcome("b", rpb.OUTCOME_REJECTED), store.submit_outcome("c", rpb.OUTCOME_REJECTED)]
        assert not wait(records + outcomes, 0.3).done
    outcomes[0].result(10)
    with pytest.raises(EbbflowError) as caught:
        outcomes[1].result(10)
    assert caught.value.reason is Reason.INTERACTION_NOT_FOUND
    assert kept(tmp_path / "agent.db") == [("a", 0), ("b", rpb.OUTCOME_REJECTED)]


def test_a_purge_takes_what_waits_before_it_and_nothing_that_comes_after(store: FeedbackStore, tmp_path: Path) -> None:
    with written(tmp_path / "agent.db"):
        submit(store, "a")
        submit(store, "b", "ben")
        purge = store.submit_purge("ada")
        last = submit(store, "c")
        assert not wait([last], 0.3).done
        assert not purge.done()
    assert purge.result(10) == 1
    last.result(10)
    assert [id_ for id_, _ in kept(tmp_path / "agent.db")] == ["b", "c"]


def test_a_refusal_holds_for_what_comes_behind_it(store: FeedbackStore, tmp_path: Path) -> None:
    with written(tmp_path / "agent.db"):
        submit(store, "a")
        store.submit_consent("ada", allowed=False)
        submit(store, "b")
        store.submit_consent("ada", allowed=True)
        last = submit(store, "c")
    last.result(10)
    assert [id_ for id_, _ in kept(tmp_path / "agent.db")] == ["a", "c"]


def test_no_more_than_so_many_records_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WAITING", 8)
    with closing(FeedbackStore(tmp_path / "agent.db")) as store:
        with written(tmp_path / "agent.db"):
            for i in range(8):
                submit(store, f"i{i}")
            with pytest.raises(EbbflowError) as caught:
                submit(store, "one more")
            assert caught.value.reason is Reason.QUEUE_FULL
            with pytest.raises(EbbflowError) as caught:
                store.submit_outcome("i0", rpb.OUTCOME_EDITED)
            assert caught.value.reason is Reason.QUEUE_FULL
            refusal = store.submit_consent("ada", allowed=False)  # a user's word is never turned away
        refusal.result(10)
        assert store.count() == (8, 1)
        submit(store, "later", "ben").result(10)
        assert store.count() == (9, 2)


def test_what_waits_is_written_before_the_file_is_closed(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path / "agent.db")
    lock = other(tmp_path / "agent.db", "BEGIN IMMEDIATE")
    for id_ in "abc":
        submit(store, id_)
    timer = threading.Timer(0.5, lock.close)
    timer.start()
    store.close()
    timer.join()
    assert [id_ for id_, _ in kept(tmp_path / "agent.db")] == ["a", "b", "c"]
    with pytest.raises(EbbflowError) as caught:
        submit(store, "d")
    assert caught.value.reason is Reason.AGENT_STOPPING
    store.close()


def test_a_file_that_stays_locked_does_not_keep_the_process_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbflow.edge.feedback.database._BUSY_S", 0.4)
    monkeypatch.setattr(store_module, "_CLOSE_S", 0.6)
    store = FeedbackStore(tmp_path / "agent.db")
    with written(tmp_path / "agent.db"):
        records = [submit(store, f"i{i}") for i in range(20)]
        begin_s = time.monotonic()
        store.close()
        assert time.monotonic() - begin_s < 3
    assert all(record.done() for record in records)
    assert records[-1].cancelled()
