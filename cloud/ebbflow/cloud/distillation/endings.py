"""How every job of a worker ends: done, given back, put off, or failed in words."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

from sqlalchemy.orm import Session

from ebbflow.cloud.registry.engine import Registry
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named

_log = logging.getLogger(__name__)

# Failures of this machine that another worker, or this one later, may not have: the lease runs out and the job is
# claimed again.
_PASSING = frozenset({Reason.LEASE_LOST, Reason.DATABASE_UNAVAILABLE})


class Stopping(Exception):  # noqa: N818 - not an error
    """The worker was asked to stop; the job goes on elsewhere or later."""


def carry_through(
    what: str,
    id_: str,
    folder: Path,
    carry: Callable[[], None],
    fail: Callable[[str], None],
    stall: Callable[[str], None],
    memory_cure: str,
) -> None:
    """Does a job, whatever comes of it.

    Args:
        what: the job, for the log.
        id_: by which it is found in the log.
        folder: where it writes.
        carry: does it.
        fail: ends it with a sentence that names cause and cure.
        stall: leaves it for later, with a sentence.
        memory_cure: what to do when memory does not suffice.

    Raises:
        Stopping: the job was given back.
    """
    try:
        with full_disk_named(folder):
            carry()
    except Stopping:
        raise
    except MemoryError:
        fail(f"the worker's memory is full. {memory_cure}")
    except EbbflowError as error:
        if error.reason is Reason.DISK_FULL:
            stall(f"{error.reason.name}: {error}. {error.cure}")
        elif error.reason in _PASSING:
            _log.warning("%s: let go: %s", what, error)
        else:
            fail(f"{error.reason.name}: {error}. {error.cure}")
    except Exception as error:  # noqa: BLE001 - the job must end in words, whatever it was
        frames = "".join(traceback.format_tb(error.__traceback__))  # not its text, which may quote the corpus
        _log.error("%s: unhandled %s\n%s", what, type(error).__name__, frames)
        fail(f"INTERNAL: {type(error).__name__}. Look for {id_} in the worker's log.")


def note(registry: Registry, what: str, write: Callable[[Session], None]) -> None:
    """Writes down how a job ended. Where that fails, the log says so: another worker has the job, or will claim it.

    Args:
        registry: where the job is.
        what: the job, for the log.
        write: writes, in a transaction.
    """
    try:
        with registry.transaction() as session:
            write(session)
    except EbbflowError as error:
        _log.warning("%s: not noted: %s", what, error.reason.name)
