"""A store that version 0.1 wrote opens with everything that it held; what it spent still counts."""

import base64
import datetime as dt
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback.plans import AdmittedPlan, Ceiling
from ebbflow.edge.feedback.store import FeedbackStore

DAY = dt.timedelta(days=1)
COST = 87674987
DUMP = Path(__file__).parent / "agent_1.sql"
USERS_KEY = base64.b64decode("B5cBHvaJ4Wu+H9Zcz0ZC0QPCr5YnOgYN4CFrkMSdTj4=")
"""The key beside that store."""
ROUNDS = [f"rounds/r{number}" for number in range(5)]


def write_version_1(folder: Path) -> Path:
    """Writes the files that version 0.1 had left: five rounds, two of them long over."""
    (folder / "users.key").write_bytes(USERS_KEY)
    connection = sqlite3.connect(folder / "agent.db")
    connection.executescript(f"PRAGMA journal_mode=WAL;{DUMP.read_text()}")
    connection.close()
    return folder / "agent.db"


@pytest.fixture
def upgraded(tmp_path: Path) -> Iterator[FeedbackStore]:
    store = FeedbackStore(write_version_1(tmp_path))
    yield store
    store.close()


def test_every_charge_and_every_word_of_a_policy_is_there(upgraded: FeedbackStore) -> None:
    found = {(account.student, account.window): account for account in upgraded.accounts()}
    assert {key: (account.entries, account.rho_spent_nano) for key, account in found.items()} == {
        ("faq", "2026-09-04"): (2, 2 * COST),
        ("faq", "2026-11-03"): (2, 2 * COST),
        ("poetry", "2026-11-03"): (1, COST),
    }
    assert {(account.rho_cap_nano, account.epsilon, account.delta) for account in found.values()} == {
        (350699948, 4.0, 1e-6)
    }
    assert upgraded.device_spent_nano("2026-09-04", 30) == 2 * COST
    assert upgraded.device_spent_nano("2026-11-03", 30) == 3 * COST
    assert upgraded.lifetime_spent_nano() == 5 * COST
    assert all(upgraded.has_answered(round_) for round_ in ROUNDS)


def test_what_users_did_and_what_waits_is_there(upgraded: FeedbackStore, now: dt.datetime) -> None:
    assert upgraded.count() == (4, 2)
    assert upgraded.purge_user("ada") == 2
    assert [waiting.round for waiting in upgraded.pending(now + 2 * DAY)] == ["rounds/r4"]


def test_a_window_goes_on_where_it_was(
    upgraded: FeedbackStore, admitted: Callable[..., AdmittedPlan], now: dt.datetime
) -> None:
    ceiling = Ceiling(epsilon=8.0)
    for round_id in ("r5", "r6"):
        upgraded.release_batch(admitted(round_id=round_id, ceiling=ceiling), [], lambda _: b"", now)
    with pytest.raises(EbbflowError) as caught:
        upgraded.release_batch(admitted(round_id="r7", ceiling=ceiling), [], lambda _: b"", now)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    with pytest.raises(EbbflowError) as caught:
        upgraded.release_batch(admitted(round_id="r2", ceiling=ceiling), [], lambda _: b"", now)
    assert caught.value.reason is Reason.PLAN_INVALID


def test_an_upgraded_file_is_one_of_this_version(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    FeedbackStore(write_version_1(tmp_path)).close()
    FeedbackStore(tmp_path / "new" / "agent.db").close()

    def shape(path: Path) -> set[tuple[str, str]]:
        connection = sqlite3.connect(path)
        try:
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))
        finally:
            connection.close()

    assert shape(tmp_path / "agent.db") == shape(tmp_path / "new" / "agent.db")
