"""`ebbflow cloud serve`: the control plane, and with it, unless told otherwise, the processes that it works with."""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from typing import Any

from ebbflow.client.context import FILE_NAME, AdminContext, write_context
from ebbflow.cloud.processes import logs
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.processes.supervise import Supervisor, children_of
from ebbflow.cloud.processes.tick import Ticker
from ebbflow.cloud.services import listeners
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.hub import Hub
from ebbflow.common import allocator
from ebbflow.common.files import write_atomic
from ebbflow.common.rpc.server import stop_on_signals

_log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Time that running calls get at the end."""


def run(settings: CloudSettings, embedded: bool = True) -> None:
    """Runs until SIGTERM or SIGINT.

    Args:
        settings: where and how.
        embedded: whether to run teacher, worker and gate as child processes too.

    Raises:
        EbbflowError: NOT_INITIALISED, SCHEMA_OUTDATED, DATABASE_UNAVAILABLE, PORT_IN_USE and what else keeps it from
            starting.
    """
    logs.configure(settings.log_level)
    allocator.keep_chunks()

    async def until_stopped() -> None:
        await serve(settings, stop_on_signals(), embedded=embedded)

    asyncio.run(until_stopped())


async def serve(settings: CloudSettings, stop: asyncio.Event, *, embedded: bool) -> None:
    """Runs until `stop` is set, then drains."""
    cloud = await asyncio.to_thread(Cloud.open, settings)
    try:
        hub = Hub(cloud)
        bound = listeners.build(cloud, hub)
        await bound.start()
        tasks = [hub.run(settings.tick_interval_s), Ticker(cloud, hub).run(settings.tick_interval_s)]
        if embedded:
            tasks.append(Supervisor(children_of(settings), settings.paths.log).run())
        try:
            await asyncio.to_thread(_tell, settings, bound)
            await _until(stop, tasks)
        finally:
            await bound.stop(hub, GRACE_S)
    finally:
        await asyncio.to_thread(cloud.close)


async def _until(stop: asyncio.Event, work: list[Coroutine[Any, Any, None]]) -> None:
    """Runs work in the background until `stop`; work that fails ends everything with its error."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in [stopped, *tasks]:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _reachable(settings: CloudSettings, bound: listeners.Listeners) -> str:
    """An address of the main listener that the server certificate covers, for admins on this machine."""
    host, _, port = bound.main_address.rpartition(":")
    if host.strip("[]") not in {"0.0.0.0", "::"}:  # noqa: S104 - these mean "every address", which nobody can dial
        return bound.main_address
    local = [name for name in settings.hosts if name in {"localhost", "127.0.0.1", "::1"}]
    return f"{(local or settings.hosts)[0]}:{port}"


def _tell(settings: CloudSettings, bound: listeners.Listeners) -> None:
    """Writes down where the listeners really are, for the admin's context and for whoever started this process."""
    paths = settings.paths
    lines = [f'main = "{bound.main_address}"', f'enrolment = "{bound.enrolment_address}"', ""]
    context = paths.admin / FILE_NAME
    if context.exists():
        kept = AdminContext.load(context)
        files = [path.read_bytes() for path in (kept.authority, kept.certificate, kept.key)]
        address = _reachable(settings, bound)
        if kept.address != address:
            write_context(paths.admin, address, *files)
    write_atomic(paths.endpoints, "\n".join(lines).encode(), 0o644)
    _log.info("ready: main %s, enrolment %s", bound.main_address, bound.enrolment_address)
