"""What every blob store promises."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ebbflow.common.errors import EbbflowError, Reason

CHUNK_BYTES = 256 * 1024
"""Size of the chunks that stores yield: the fastest over a gRPC stream on loopback, between 64 KiB and 1 MiB."""


SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Blob:
    """The name of a stored file."""

    sha256: str
    """Lower-case hexadecimal."""
    size_bytes: int


class BlobStore(Protocol):
    """Files named by the SHA-256 of their content. Thread-safe; never changes a file that it has.

    Whatever leaves the process was hashed on the way: `read` and `fetch` verify, `open` raises at the end of a file
    that does not match when it was read from the beginning. A damaged file raises
    FILE_CORRUPT.
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
