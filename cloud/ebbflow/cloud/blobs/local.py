"""Blobs in a local folder: `<folder>/ab/abcdef…`, one file each."""

import contextlib
import datetime as dt
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ebbflow.cloud.blobs.base import CHUNK_BYTES, SHA256, Blob, Reader, checked
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import atomic, full_disk_named, sync_folder

_UPLOAD = ".put."
_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
"""Linux: read only what is in the page cache."""


class LocalBlobStore:
    """The default store. Several processes may share a folder."""

    def __init__(self, folder: Path) -> None:
        """Uses `folder`, which is made if it is not there."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, chunks: Iterable[bytes]) -> Blob:
        """See `BlobStore.put`."""
        digest, size_bytes = hashlib.sha256(), 0
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=_UPLOAD)
        temporary = Path(name)
        try:
            with full_disk_named(self.folder), os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                self._keep(temporary, digest.hexdigest())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return Blob(digest.hexdigest(), size_bytes)

    def put_file(self, path: Path) -> Blob:
        """See `BlobStore.put_file`."""
        return self.put(_chunks(path))

    def open(self, sha256: str, offset_bytes: int = 0) -> Iterator[bytes]:
        """See `BlobStore.open`."""
        chunks = _chunks(self._existing(sha256), offset_bytes)
        return checked(chunks, sha256 if offset_bytes == 0 else None, str(self.folder))

    def reader(self, sha256: str, offset_bytes: int = 0) -> Reader:
        """See `BlobStore.reader`."""
        return _Reader(self._existing(sha256), offset_bytes)

    @contextmanager
    def lend(self, sha256: str, scratch: Path) -> Iterator[Path]:
        """See `BlobStore.lend`. It is the stored file itself, so `scratch` stays empty."""
        for _ in self.open(sha256):
            pass
        yield self._path(sha256)

    def size(self, sha256: str) -> int:
        """See `BlobStore.size`."""
        return self._existing(sha256).stat().st_size

    def read(self, sha256: str) -> bytes:
        """See `BlobStore.read`."""
        return b"".join(self.open(sha256))

    def fetch(self, sha256: str, path: Path) -> None:
        """See `BlobStore.fetch`."""
        with atomic(path) as file:
            for chunk in self.open(sha256):
                file.write(chunk)

    def has(self, sha256: str) -> bool:
        """See `BlobStore.has`."""
        return bool(SHA256.fullmatch(sha256)) and self._path(sha256).is_file()

    def delete(self, sha256: str) -> None:
        """See `BlobStore.delete`."""
        if self.has(sha256):
            self._path(sha256).unlink(missing_ok=True)
            sync_folder(self._path(sha256).parent)  # a power cut shall not bring back what was promised to be gone

    def sweep(self, before: dt.datetime) -> None:
        """See `BlobStore.sweep`."""
        for path in self.folder.glob(f"{_UPLOAD}*"):
            with contextlib.suppress(FileNotFoundError):  # it ended meanwhile
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()

    def _path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def _existing(self, sha256: str) -> Path:
        if not self.has(sha256):
            raise EbbflowError(Reason.BLOB_NOT_FOUND, f"no blob {sha256[:64]}", sha256=sha256[:64])
        return self._path(sha256)

    def _keep(self, temporary: Path, sha256: str) -> None:
        path = self._path(sha256)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        temporary.replace(path)
        sync_folder(path.parent)
        sync_folder(self.folder)  # always: whoever made the folder may have died before its name was on the disk


class _Reader:
    """A `PromptReader`: what the page cache holds is read without a thread's hop."""

    def __init__(self, path: Path, offset_bytes: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset_bytes = offset_bytes
        self._buffer = bytearray()

    def read(self, size_bytes: int) -> bytes:
        chunk = os.pread(self._file.fileno(), size_bytes, self._offset_bytes)
        self._offset_bytes += len(chunk)
        return chunk

    def read_at_once(self, size_bytes: int) -> memoryview | None:
        if not _NO_WAIT:
            return None
        if len(self._buffer) < size_bytes:
            self._buffer = bytearray(size_bytes)
        view = memoryview(self._buffer)[:size_bytes]
        try:
            length = os.preadv(self._file.fileno(), [view], self._offset_bytes, _NO_WAIT)
        except OSError:  # not in the cache (EAGAIN), or a file system that cannot tell (EOPNOTSUPP)
            return None
        self._offset_bytes += length
        return view[:length]

    def close(self) -> None:
        self._file.close()


def _chunks(path: Path, offset_bytes: int = 0) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
