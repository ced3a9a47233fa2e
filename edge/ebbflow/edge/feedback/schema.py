"""The tables of the agent's local database, and how those of an earlier version become them."""

import sqlite3

from ebbflow.common.errors import EbbflowError, Reason

VERSION = 2

_INTERACTIONS = """
CREATE TABLE interactions (
    id TEXT PRIMARY KEY,
    student TEXT NOT NULL,
    release TEXT NOT NULL,
    user BLOB NOT NULL,
    prompt TEXT NOT NULL,
    answer TEXT NOT NULL,
    outcome INTEGER NOT NULL DEFAULT 0,
    create_time REAL NOT NULL
) STRICT;
CREATE INDEX interactions_by_student ON interactions (student, create_time);
CREATE INDEX interactions_by_user ON interactions (user, create_time);
CREATE INDEX interactions_by_time ON interactions (create_time);
"""

# Entries are the account: every sum is taken over them. `batch_id` is null where the cloud told of the charge.
# `accounts` holds the words of the policy that a window was last charged under.
_LEDGER = """
CREATE TABLE accounts (
    student TEXT NOT NULL,
    window TEXT NOT NULL,
    rho_cap_nano INTEGER NOT NULL CHECK (rho_cap_nano >= 0),
    epsilon REAL NOT NULL,
    delta REAL NOT NULL,
    PRIMARY KEY (student, window)
) STRICT;
CREATE TABLE entries (
    round TEXT PRIMARY KEY,
    batch_id TEXT UNIQUE,
    student TEXT NOT NULL,
    window TEXT NOT NULL,
    rho_nano INTEGER NOT NULL CHECK (rho_nano > 0),
    charge_time REAL NOT NULL,
    end_time REAL NOT NULL
) STRICT;
CREATE INDEX entries_by_end ON entries (end_time);
"""

_OUTBOX = """
CREATE TABLE outbox (
    batch_id TEXT PRIMARY KEY REFERENCES entries (batch_id),
    round TEXT NOT NULL UNIQUE,
    plan_sha256 BLOB NOT NULL,
    signed_batch BLOB NOT NULL,
    end_time REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'sent', 'refused', 'expired')),
    reason TEXT NOT NULL DEFAULT ''
) STRICT;
"""

_RECORDS = """
CREATE TABLE user_keys (
    fingerprint BLOB PRIMARY KEY
) STRICT;
CREATE TABLE policies (
    student TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    policy BLOB NOT NULL
) STRICT;
CREATE TABLE plans (
    sha256 BLOB PRIMARY KEY,
    round TEXT NOT NULL,
    student TEXT NOT NULL,
    policy_version INTEGER NOT NULL,
    decision TEXT NOT NULL CHECK (decision IN ('answered', 'declined')),
    reason TEXT NOT NULL,
    decide_time REAL NOT NULL,
    signed_plan BLOB NOT NULL
) STRICT;
CREATE INDEX plans_by_time ON plans (decide_time);
CREATE TABLE users (
    user BLOB PRIMARY KEY,
    allowed INTEGER CHECK (allowed IN (0, 1)),
    paused INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1))
) STRICT;
"""

_SET_ASIDE_1 = """
ALTER TABLE accounts RENAME TO accounts_1;
ALTER TABLE entries RENAME TO entries_1;
ALTER TABLE outbox RENAME TO outbox_1;
"""

# Version 1 did not keep when a round ended. The batch knows it for a week; after that the latest of charge and the
# beginnings of both windows lies in the same windows as the true end.
_COPY_1 = """
INSERT INTO accounts (student, window, rho_cap_nano, epsilon, delta)
    SELECT student, window, rho_cap_nano, epsilon, delta FROM accounts_1;
INSERT INTO entries (round, batch_id, student, window, rho_nano, charge_time, end_time)
    SELECT e.round, e.batch_id, e.student, e.window, e.rho_nano, e.create_time, COALESCE(
        o.end_time, max(e.create_time, CAST(strftime('%s', e.window) AS REAL),
        CAST(strftime('%s', e.device_window) AS REAL)))
    FROM entries_1 AS e LEFT JOIN outbox_1 AS o ON o.batch_id = e.batch_id ORDER BY e.rowid;
INSERT INTO outbox (batch_id, round, plan_sha256, signed_batch, end_time, state, reason)
    SELECT batch_id, round, plan_sha256, signed_batch, end_time, state, reason FROM outbox_1 ORDER BY rowid;
DROP TABLE outbox_1;
DROP TABLE entries_1;
DROP TABLE accounts_1;
DROP TABLE device_accounts;
"""

_UPGRADES = {
    0: (_INTERACTIONS, _LEDGER, _OUTBOX, _RECORDS),
    1: (_SET_ASIDE_1, _LEDGER, _OUTBOX, _COPY_1, _RECORDS),
}


def bring_up_to_date(connection: sqlite3.Connection, path: object) -> None:
    """Makes the tables of this version, in the transaction that is open; foreign keys must be off.

    Args:
        connection: in a writing transaction.
        path: of the file, for messages.

    Raises:
        EbbflowError: SCHEMA_NEWER if a later version wrote the file.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > VERSION:
        raise EbbflowError(Reason.SCHEMA_NEWER, f"{path} was written by a later version", path=path)
    if version == VERSION:
        return
    for script in _UPGRADES[version]:
        for statement in script.split(";")[:-1]:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version={VERSION}")
