"""What the services work with."""

import asyncio
import contextvars
import datetime as dt
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeVar

from securesystemslib.signer import Signer
from sqlalchemy.orm import Session

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.release.deltas import DeltaBuilder
from ebbflow.cloud.services import audit
from ebbflow.cloud.services.call import current

Result = TypeVar("Result")

SQL_THREADS = 12
"""Below the connections of SQLAlchemy's pool (15), so that no thread waits for one."""
FILE_THREADS = 8


def _pool(threads: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix=name)


@dataclass
class Cloud:
    """The collaborators of every service, and the threads that keep the event loop free."""

    registry: Registry
    blobs: BlobStore
    authority: Authority
    settings: CloudSettings
    plan_signer: PlanSigner
    online_signer: Signer
    endpoint: str = ""
    """host:port that agents are told; set once the listener is bound."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when this replica is about to end: long streams end with it."""
    sql: ThreadPoolExecutor = field(default_factory=lambda: _pool(SQL_THREADS, "sql"))
    files: ThreadPoolExecutor = field(default_factory=lambda: _pool(FILE_THREADS, "files"))
    uploads: ThreadPoolExecutor = field(default_factory=lambda: _pool(FILE_THREADS, "uploads"))
    """Of their own, because each waits for its sender."""

    @classmethod
    def open(cls, settings: CloudSettings) -> "Cloud":
        """Opens everything that the settings name.

        Raises:
            EbbflowError: NOT_INITIALISED, KEY_UNUSABLE, FILE_CORRUPT, DATABASE_UNAVAILABLE, SCHEMA_OUTDATED or
                SCHEMA_NEWER.
        """
        paths = settings.paths
        return cls(
            authority=Authority.load(paths.authority),
            online_signer=settings.signer("online"),
            plan_signer=PlanSigner(settings.signer("feedback")),
            registry=Registry.open(settings.database_url),
            blobs=settings.blob_store(),
            settings=settings,
        )

    @property
    def agent_lifetime(self) -> dt.timedelta:
        """How long an agent's certificate works."""
        return dt.timedelta(days=self.settings.agent_certificate_days)

    @cached_property
    def deltas(self) -> DeltaBuilder:
        """Builds deltas, one at a time."""
        return DeltaBuilder(self.registry, self.blobs, self.settings.home / "scratch")

    async def read(self, work: Callable[[Session], Result]) -> Result:
        """Runs a reading transaction in a thread."""

        def run() -> Result:
            with self.registry.reading() as session:
                return work(session)

        return await self.in_thread(self.sql, run)

    async def write(self, work: Callable[[Session], Result]) -> Result:
        """Runs a transaction in a thread. It ends even if the caller goes away."""

        def run() -> Result:
            with self.registry.transaction() as session:
                return work(session)

        return await self.in_thread(self.sql, run)

    async def change(self, work: Callable[[Session, dt.datetime], Result]) -> Result:
        """Runs a mutating call's transaction in a thread, together with its entry in the audit log."""
        call = current()

        def run(session: Session) -> Result:
            now = clock.now()
            result = work(session, now)
            audit.record(session, call, "OK", now)
            return result

        return await self.write(run)

    async def in_thread(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        """Runs blocking work in a thread that sees the current call."""
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(pool, partial(context.run, work))

    def close(self) -> None:
        """Waits for the threads and closes the registry's connections."""
        self.sql.shutdown()
        self.files.shutdown()
        self.uploads.shutdown()
        self.deltas.close()
        self.registry.close()
