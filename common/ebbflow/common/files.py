"""Files that are either whole or not there, also after a power cut."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ebbflow.common.errors import EbbflowError, Reason


@contextmanager
def atomic(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Opens a temporary file that takes `path`'s place when the block ends, and vanishes when the block raises.

    File and folder are fsynced, so that after a power cut the old or the new content is there, whole.

    Raises:
        EbbflowError: DISK_FULL if the bytes do not fit; `path` keeps its old content.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with full_disk_named(path), os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
        sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns the operating system's "no space left" inside the block into DISK_FULL."""
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise EbbflowError(Reason.DISK_FULL, f"no space left for {path}", path=path) from error


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a small file atomically and durably.

    Raises:
        EbbflowError: DISK_FULL if the bytes do not fit; `path` keeps its old content.
    """
    with atomic(path, mode) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Makes renames inside a folder durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Makes what a file holds durable, whoever wrote it; not its name."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
