"""Opens the registry and hands out transactions, alike on SQLite and PostgreSQL."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session, sessionmaker

from ebbflow.cloud.registry import schema
from ebbflow.common.errors import EbbflowError, Reason

BUSY_TIMEOUT_MS = 10_000


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
            return sa.create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
        except ModuleNotFoundError as error:
            message = "PostgreSQL needs the extra `postgres`: pip install 'ebbflow[postgres]'"
            raise EbbflowError(Reason.EXTRA_MISSING, message) from error
    message = f"registry_url must begin with sqlite: or postgresql:, not {parsed.get_backend_name()}:"
    raise EbbflowError(Reason.CONFIG_INVALID, message)


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
        where = engine.url.render_as_string(hide_password=True)
        raise EbbflowError(Reason.DATABASE_UNAVAILABLE, f"the registry at {where} does not answer") from error
    except sa.exc.DatabaseError as error:
        if isinstance(error.orig, sqlite3.DatabaseError) and "malformed" in str(error.orig):
            raise EbbflowError(Reason.FILE_CORRUPT, f"the registry {engine.url.database} is damaged") from error
        if isinstance(error.orig, sqlite3.DatabaseError) and "not a database" in str(error.orig):
            raise EbbflowError(Reason.FILE_CORRUPT, f"{engine.url.database} is not a database") from error
        raise
