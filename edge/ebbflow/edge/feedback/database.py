"""The agent's local database: connections, and SQLite's errors in the words of the catalogue."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.feedback import schema

_BUSY_S = 30.0
_TRY_S = 0.1
_REST_S = 0.2  # longer than SQLite's other connections sleep between their looks at the write lock
_REASONS = {
    "SQLITE_FULL": (Reason.DISK_FULL, "no space left for"),
    "SQLITE_CORRUPT": (Reason.FILE_CORRUPT, "damaged:"),
    "SQLITE_NOTADB": (Reason.FILE_CORRUPT, "not a database:"),
}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        reason = _REASONS.get(getattr(error, "sqlite_errorname", ""))
        if reason is None:
            raise
        raise EbbflowError(reason[0], f"{reason[1]} {path}", path=path) from error


def _make_private(path: Path) -> None:
    """Makes the file unless it is there; nobody else may read it.

    A file that is there is not opened: closing it again would drop the locks that SQLite holds on it for another
    connection of this process, and the next process that closes the file would delete the write-ahead log under both.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)


class Database:
    """One connection to `agent.db`, for any thread, one transaction at a time.

    Attributes:
        path: the file; mode 0600, as are its write-ahead log and shared memory.
    """

    def __init__(self, path: Path, synchronous: Literal["FULL", "NORMAL"]) -> None:
        """Opens the file, or makes it.

        Args:
            path: where; its folder must exist.
            synchronous: FULL waits for the disk at each commit; NORMAL may lose the last commits in a power cut.

        Raises:
            EbbflowError: FILE_CORRUPT, DISK_FULL, or SCHEMA_NEWER if a later version wrote it.
        """
        self.path = path
        self._lock = threading.Lock()
        _make_private(path)
        with _named(path):
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(synchronous)
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self, synchronous: str) -> None:
        for pragma in ("journal_mode=WAL", f"synchronous={synchronous}", "secure_delete=ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        with self.transaction() as connection:
            schema.bring_up_to_date(connection, self.path)
        self._connection.execute("PRAGMA foreign_keys=ON")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Holds the write lock for a block; commits at its end, rolls back if it raises."""
        with self._lock, _named(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Reads one consistent state."""
        with self._lock, _named(self.path):
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.execute("ROLLBACK")

    def scrub(self, within_s: float) -> None:
        """Empties the write-ahead log, where deleted rows would linger.

        Others write meanwhile, through this connection or another: SQLite holds the write lock while it waits for
        those who read, so it waits for a moment only, and then again.

        Args:
            within_s: how long to try; at least once.

        Raises:
            EbbflowError: DEADLINE_EXCEEDED if another connection reads all the time.
        """
        deadline_s = time.monotonic() + within_s
        while not self._empty_log():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                message = f"other processes keep {self.path} busy: what was removed is not out of its log yet"
                raise EbbflowError(Reason.DEADLINE_EXCEEDED, message, path=self.path)
            time.sleep(min(_REST_S, left_s))

    def _empty_log(self) -> bool:
        with self._lock, _named(self.path), self._patience(_TRY_S):
            return not self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]

    @contextmanager
    def _patience(self, seconds: float) -> Iterator[None]:
        """Waits for other connections for so long, and as long as ever again after the block."""
        self._connection.execute(f"PRAGMA busy_timeout={int(seconds * 1000)}")
        try:
            yield
        finally:
            self._connection.execute(f"PRAGMA busy_timeout={int(_BUSY_S * 1000)}")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()
