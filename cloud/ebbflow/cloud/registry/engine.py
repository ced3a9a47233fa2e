"""Opens the registry and hands out transactions, alike on SQLite and PostgreSQL."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from ebbflow.cloud.registry import schema
from ebbflow.common.errors import EbbflowError, Reason

BUSY_TIMEOUT_MS = 10_000

LOCK_TIMEOUT_S: Final = 10
"""As long as on SQLite: so long a transaction waits for another one's row or lock on PostgreSQL."""
IDLE_TIMEOUT_S: Final = 600
"""After so long between two statements PostgreSQL ends a transaction, as that of a replica that froze.

Training, evaluating and coding run outside of transactions. What is done within one, between two statements, is to sign
(an HSM or a cloud's service: seconds), to average the adapter updates of a round that closes (a thousand large
ones take many seconds), and to delete blobs: a bucket that is out of reach lets one operation last for over 4 minutes
(4 tries of 65 s), and 10 minutes are enough to forget over 10,000 updates at 50 ms each.
"""
_NETWORK: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # ms
}
"""Tells within about a minute that the server's machine is gone, in place of two hours."""
_LOCKED: Final = "55P03"
_READ_ONLY: Final = "25006"
_PASSING: Final = frozenset({_READ_ONLY, "25P03", "25P04"})
"""Of the failures that psycopg calls internal, those that pass: a server in read-only mode, as after a failover, and
transactions that it ended because they, or the wait within them, lasted for too long."""


class Registry:
    """The SQL database behind the cloud. Thread-safe; every call to `transaction` is one transaction.

    Attributes:
        engine: the SQLAlchemy engine, for migrations.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._write = sessionmaker(engine, expire_on_commit=False)
        self._read = sessionmaker(engine.execution_options(ebbflow_readonly=True), expire_on_commit=False)

    @classmethod
    def open(cls, url: str) -> "Registry":
        """Opens a registry whose schema is current.

        Args:
            url: an SQLAlchemy URL such as "sqlite:////var/lib/ebbflow/registry.db" or
                "postgresql+psycopg://user@host/ebbflow".

        Raises:
            EbbflowError: CONFIG_INVALID for a URL of another kind, DATABASE_UNAVAILABLE if nobody answers,
                SCHEMA_OUTDATED or SCHEMA_NEWER if the tables are of another version.
        """
        engine = create_engine(url)
        try:
            with _named_failures(engine), engine.connect() as connection:
                schema.check(connection)
        except BaseException:
            engine.dispose()
            raise
        return cls(engine)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One transaction that commits at the end of the block and rolls back when it raises.

        Rows stay readable after the commit. On SQLite writers exclude each other from the start (`BEGIN IMMEDIATE`);
        on PostgreSQL use `locks.exclusive` where two replicas must not decide at once.

        Raises:
            EbbflowError: DATABASE_UNAVAILABLE or DISK_FULL; nothing was written.
        """
        with _named_failures(self.engine), self._write.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One transaction that only reads; never waits for writers on SQLite."""
        with _named_failures(self.engine), self._read.begin() as session:
            yield session

    def close(self) -> None:
        """Closes idle connections."""
        self.engine.dispose()


def create_engine(url: str) -> sa.Engine:
    """Makes an engine for one of the two supported databases.

    Raises:
        EbbflowError: CONFIG_INVALID if the URL is of another kind, EXTRA_MISSING if the driver is not installed.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise EbbflowError(Reason.CONFIG_INVALID, "registry_url is not a database URL") from error
    if parsed.get_backend_name() == "sqlite":
        engine = sa.create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    if parsed.get_backend_name() == "postgresql":
        try:
            driver = parsed.set(drivername="postgresql+psycopg")
            return sa.create_engine(driver, pool_pre_ping=True, connect_args=_postgresql_arguments(parsed))
        except ModuleNotFoundError as error:
            message = "PostgreSQL needs the extra `postgres`: pip install 'ebbflow[postgres]'"
            raise EbbflowError(Reason.EXTRA_MISSING, message) from error
    message = f"registry_url must begin with sqlite: or postgresql:, not {parsed.get_backend_name()}:"
    raise EbbflowError(Reason.CONFIG_INVALID, message)


def _postgresql_arguments(url: sa.URL) -> dict[str, str | int]:
    """Limits every wait; what the URL or libpq's environment says goes before."""
    said = set(url.query) | ({"connect_timeout"} if "PGCONNECT_TIMEOUT" in os.environ else set())
    options = url.query.get("options", os.environ.get("PGOPTIONS", ""))
    theirs = options if isinstance(options, str) else " ".join(options)
    ours = f"-c lock_timeout={LOCK_TIMEOUT_S}s -c idle_in_transaction_session_timeout={IDLE_TIMEOUT_S}s"
    # Of two that set the same the server takes the last.
    return {name: value for name, value in _NETWORK.items() if name not in said} | {"options": f"{ours} {theirs}"}


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any) -> None:
    connection.isolation_level = None  # the "begin" event below opens transactions
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: sa.Connection) -> None:
    readonly = connection.get_execution_options().get("ebbflow_readonly")
    connection.exec_driver_sql("BEGIN" if readonly else "BEGIN IMMEDIATE")


@contextmanager
def _named_failures(engine: sa.Engine) -> Iterator[None]:
    """Names the database's own failures; what a statement did wrong stays a bug."""
    try:
        yield
    except sa.exc.OperationalError as error:
        if "disk is full" in str(error.orig) or "No space left" in str(error.orig):
            raise EbbflowError(Reason.DISK_FULL, "the registry's disk is full") from error
        raise _unavailable(engine, error) from error
    except sa.exc.DatabaseError as error:
        if isinstance(error.orig, sqlite3.DatabaseError) and "malformed" in str(error.orig):
            raise EbbflowError(Reason.FILE_CORRUPT, f"the registry {engine.url.database} is damaged") from error
        if isinstance(error.orig, sqlite3.DatabaseError) and "not a database" in str(error.orig):
            raise EbbflowError(Reason.FILE_CORRUPT, f"{engine.url.database} is not a database") from error
        if error.connection_invalidated or _sqlstate(error) in _PASSING:
            engine.dispose()  # else connections to what was the primary would answer, read-only, for ever
            raise _unavailable(engine, error) from error
        raise


def _unavailable(engine: sa.Engine, error: sa.exc.DBAPIError) -> EbbflowError:
    where = f"the registry at {engine.url.render_as_string(hide_password=True)}"
    message = {
        _LOCKED: f"another process holds for too long what is needed of {where}",
        _READ_ONLY: f"{where} is read-only now",
    }.get(_sqlstate(error), f"{where} does not answer")
    return EbbflowError(Reason.DATABASE_UNAVAILABLE, message)


def _sqlstate(error: sa.exc.DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""
