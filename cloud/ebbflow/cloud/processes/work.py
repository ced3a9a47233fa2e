"""`ebbflow cloud work`: distils what is queued, and signs releases as the distiller."""

import logging
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from securesystemslib.signer import Signer

from ebbflow.cloud.distillation.endings import Stopping
from ebbflow.cloud.distillation.worker import Worker
from ebbflow.cloud.processes import logs
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.release import publish, repository
from ebbflow.cloud.release.anchor import Anchor
from ebbflow.cloud.release.repository import Trust
from ebbflow.common.errors import EbbflowError

_log = logging.getLogger(__name__)


def run(settings: CloudSettings) -> None:
    """Runs until SIGTERM or SIGINT; a running job is then given back after its step, with a checkpoint.

    Raises:
        EbbflowError: NOT_INITIALISED, KEY_UNUSABLE, SCHEMA_OUTDATED, DATABASE_UNAVAILABLE and what else keeps it from
            starting.
    """
    logs.configure(settings.log_level)
    stop = stop_on_signals()
    use_threads(settings.threads)
    signer = settings.signer("distiller")
    anchor = Anchor(settings.paths.anchor("distiller"), settings.paths.trust_root)
    registry = Registry.open(settings.database_url)
    worker = Worker(
        registry=registry,
        blobs=settings.blob_store(),
        folder=settings.paths.work,
        name=f"{socket.gethostname()}:{os.getpid()}",
        lease_s=settings.lease_s,
        checkpoint_interval_s=settings.checkpoint_interval_s,
        stopping=stop.is_set,
    )
    interval_s = settings.tick_interval_s
    try:
        # In a thread of its own, so that a release need not wait for the next distillation to end.
        with beside(stop, "proposer", interval_s, lambda: propose(registry, signer, anchor.trusted)):
            repeat(stop, interval_s, lambda: work(worker, stop))
    finally:
        registry.close()


def work(worker: Worker, stop: threading.Event) -> None:
    """Carries jobs through until none waits."""
    try:
        while not stop.is_set() and worker.run_once():
            pass
        worker.sweep()
    except Stopping:
        _log.info("gave the running distillation back")


def propose(registry: Registry, signer: Signer, trust: Trust = repository.trusted) -> None:
    """Signs what the distiller has to sign now."""
    with registry.transaction() as session:
        proposal = publish.propose(session, signer, trust=trust)
    if proposal is not None:
        _log.info("proposed version %d of the releases", proposal.version)


def repeat(stop: threading.Event, interval_s: float, step: Callable[[], None]) -> None:
    """Takes a step every `interval_s` until `stop`; a failure that has a name is logged and tried again."""
    while not stop.is_set():
        try:
            step()
        except EbbflowError as error:
            _log.warning("%s: %s", error.reason.name, error)
        stop.wait(interval_s)


@contextmanager
def beside(stop: threading.Event, name: str, interval_s: float, step: Callable[[], None]) -> Iterator[None]:
    """Repeats a step in a thread while the block runs; that one of the two ends sets `stop`, and so ends the other.

    Raises:
        Exception: what the step failed with that has no name, once the block has ended too. Half a process would look
            alive to its supervisor, which starts again only what has ended.
    """
    failures: list[Exception] = []

    def run() -> None:
        try:
            repeat(stop, interval_s, step)
        except Exception as error:  # noqa: BLE001 - raised below, where it ends the process
            frames = "".join(traceback.format_tb(error.__traceback__))  # not its text, which may hold SQL parameters
            _log.error("the %s ends this process: unhandled %s\n%s", name, type(error).__name__, frames)
            failures.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=run, name=name)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    for error in failures:
        raise error


def stop_on_signals() -> threading.Event:
    """Returns an event that SIGTERM or SIGINT sets; needs the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def use_threads(threads: int) -> None:
    """Gives torch so many threads; 0 means as many as there are cores for this process."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
