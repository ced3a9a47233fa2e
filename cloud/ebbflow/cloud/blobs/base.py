"""What every blob store promises."""

import datetime as dt
import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ebbflow.common.errors import EbbflowError, Reason

CHUNK_BYTES = 256 * 1024
"""Size of the chunks that `open` yields."""

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """The name of a stored file."""

    sha256: str
    """Lower-case hexadecimal."""
    size_bytes: int


class Reader(Protocol):
    """Reads one file from an offset on. Verifies nothing: for those whose receiver hashes. One thread at a time."""

    def read(self, size_bytes: int, /) -> bytes:
        """Returns the next bytes, `size_bytes` at most; none at the end of the file."""
        ...

    def close(self) -> None:
        """Gives the file or the connection back."""
        ...


@runtime_checkable
class PromptReader(Reader, Protocol):
    """One that knows whether a read would have to wait."""

    def read_at_once(self, size_bytes: int, /) -> memoryview | None:
        """Returns what `read` would, valid until the next call, or nothing if that has to wait for a disk."""
        ...


class BlobStore(Protocol):
    """Files named by the SHA-256 of their content. Thread-safe; never changes a file that it has.

    What this process uses itself is hashed on the way: `read`, `fetch` and `lend` verify, `open` raises at the end of a
    file that does not match when it was read from the beginning. A damaged file raises FILE_CORRUPT. Only `reader`
    passes on what is there, to devices that compare it with what was signed.
    """

    def put(self, chunks: Iterable[bytes]) -> Blob:
        """Stores the concatenated chunks. Idempotent; a file appears whole or not at all.

        Raises:
            EbbflowError: DISK_FULL if they do not fit.
        """
        ...

    def put_file(self, path: Path) -> Blob:
        """Stores a copy of a file.

        Raises:
            EbbflowError: DISK_FULL if it does not fit.
        """
        ...

    def open(self, sha256: str, offset_bytes: int = 0) -> Iterator[bytes]:
        """Yields the bytes from an offset in chunks of at most `CHUNK_BYTES`, in bounded memory.

        Raises:
            EbbflowError: BLOB_NOT_FOUND before the first chunk; FILE_CORRUPT after the last one if the file, read from
                its beginning, does not hash to its name.
        """
        ...

    def reader(self, sha256: str, offset_bytes: int = 0) -> Reader:
        """Opens a file for somebody who verifies it.

        Raises:
            EbbflowError: BLOB_NOT_FOUND.
        """
        ...

    def lend(self, sha256: str, scratch: Path) -> AbstractContextManager[Path]:
        """Gives the path of a verified file for the length of a block. It is the store's: nobody writes to it.

        Args:
            sha256: its name.
            scratch: folder for a copy, if the store has no file of its own; the copy is deleted at the end.

        Raises:
            EbbflowError: BLOB_NOT_FOUND, FILE_CORRUPT, DISK_FULL.
        """
        ...

    def size(self, sha256: str) -> int:
        """Length in bytes.

        Raises:
            EbbflowError: BLOB_NOT_FOUND.
        """
        ...

    def read(self, sha256: str) -> bytes:
        """Returns a small file, verified.

        Raises:
            EbbflowError: BLOB_NOT_FOUND, FILE_CORRUPT.
        """
        ...

    def fetch(self, sha256: str, path: Path) -> None:
        """Copies a file to `path`, verified and atomically.

        Raises:
            EbbflowError: BLOB_NOT_FOUND, FILE_CORRUPT, DISK_FULL.
        """
        ...

    def has(self, sha256: str) -> bool:
        """Whether the file is there."""
        ...

    def delete(self, sha256: str) -> None:
        """Removes a file that nothing names any more. One that is not there is no error."""
        ...

    def sweep(self, before: dt.datetime) -> None:
        """Removes what uploads that broke off with their process have left, if nothing was written since `before`."""
        ...


def checked(chunks: Iterable[bytes], sha256: str | None, where: str) -> Iterator[bytes]:
    """Passes chunks on and, unless `sha256` is None, checks the hash of them all at the end.

    Raises:
        EbbflowError: FILE_CORRUPT after the last chunk if they do not hash to `sha256`.
    """
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if sha256 is not None and digest.hexdigest() != sha256:
        raise EbbflowError(Reason.FILE_CORRUPT, f"blob {sha256} is damaged in {where}", sha256=sha256)
