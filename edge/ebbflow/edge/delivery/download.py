"""Brings one file onto the device: resumed after any cut, never longer than signed, hashed before it counts."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named, sync_folder
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.watchdog import PROGRESS_BYTES

READ_BYTES = 1 << 20

_AGAIN = frozenset({Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.INTERNAL, Reason.QUOTA_EXHAUSTED})
_USELESS = frozenset({Reason.ARTEFACT_UNTRUSTED, Reason.FILE_CORRUPT, Reason.DISK_FULL})


@dataclass(frozen=True)
class SignedFile:
    """What the signed metadata says of a file."""

    sha256: str
    """Lower-case hexadecimal."""
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a transfer that makes no progress is tried again."""

    attempts: int = 5
    """Tries in a row without progress."""
    first_wait_s: float = 0.2
    """Longest wait before the second try; doubles from try to try, and each wait is drawn at random below it."""


def verify(path: Path, file: SignedFile) -> bool:
    """Whether a file is there and is exactly the signed one. Reads it all, in bounded memory."""
    try:
        with path.open("rb") as opened:
            return path.stat().st_size == file.size_bytes and _hash(opened).hexdigest() == file.sha256
    except OSError:
        return False


class Downloader:
    """Downloads files through partial files in one folder, named by their hash.

    Attributes:
        fetched_bytes: bytes that came over the network so far.
    """

    def __init__(
        self,
        source: ArtefactSource,
        folder: Path,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._source, self._folder = source, folder
        self._patience, self._sleep = patience or Patience(), sleep
        self.fetched_bytes = 0

    def missing_bytes(self, file: SignedFile) -> int:
        """How many bytes of a file are still to be fetched, as far as its length tells."""
        partial = self._partial(file)
        return max(0, file.size_bytes - (partial.stat().st_size if partial.exists() else 0))

    def keep_only(self, files: Collection[SignedFile]) -> None:
        """Deletes the partial files of anything else."""
        wanted = {self._partial(file) for file in files}
        for path in self._folder.glob("*"):
            if path not in wanted:
                path.unlink(missing_ok=True)

    def download(self, file: SignedFile, path: Path) -> None:
        """Makes `path` the signed file; until it is whole and verified, `path` stays as it was.

        Raises:
            EbbflowError: ARTEFACT_UNTRUSTED if the cloud sends other bytes than signed, more or fewer; DISK_FULL; or
                why the cloud could not be asked, in which case the next call goes on where this one ended.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = self._partial(file)
        resumed = partial.exists()
        try:
            self._fill(file, partial)
        except EbbflowError as error:
            if error.reason is not Reason.ARTEFACT_UNTRUSTED or not resumed:
                raise
            # The damage may lie in what was kept from before, for example over a power cut: once more from the start.
            self._fill(file, partial)
        partial.replace(path)
        sync_folder(path.parent)

    def _partial(self, file: SignedFile) -> Path:
        return self._folder / file.sha256

    def _fill(self, file: SignedFile, partial: Path) -> None:
        """Completes and verifies a partial file; deletes it when its bytes are of no use any more."""
        try:
            with full_disk_named(partial), partial.open("a+b") as opened:
                opened.seek(0)
                digest = _hash(opened)
                self._receive(file, opened, digest)
                opened.flush()
                os.fsync(opened.fileno())
            if digest.hexdigest() != file.sha256:
                raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the bytes do not hash to the signed {file.sha256}")
        except EbbflowError as error:
            if error.reason in _USELESS:
                partial.unlink(missing_ok=True)
            raise

    def _receive(self, file: SignedFile, opened: BinaryIO, digest: "hashlib._Hash") -> None:
        failures = 0
        while (before := opened.tell()) < file.size_bytes:
            problem = self._read_some(file, opened, digest)
            failures = failures + 1 if opened.tell() - before < PROGRESS_BYTES else 0
            if opened.tell() < file.size_bytes and failures >= self._patience.attempts:
                raise problem
            if failures:
                wait_s = self._patience.first_wait_s * 2 ** (failures - 1)
                self._sleep(random.SystemRandom().uniform(0, wait_s))
        if opened.tell() > file.size_bytes:
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"more than the signed {file.size_bytes} bytes are there")

    def _read_some(self, file: SignedFile, opened: BinaryIO, digest: "hashlib._Hash") -> EbbflowError:
        """Reads until the stream ends or breaks, and returns what to say if that was not enough."""
        try:
            for chunk in self._source.blob(file.sha256, opened.tell()):
                self.fetched_bytes += len(chunk)
                if opened.tell() + len(chunk) > file.size_bytes:
                    message = f"the cloud sends more than the signed {file.size_bytes} bytes"
                    raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message)
                opened.write(chunk)
                digest.update(chunk)
        except EbbflowError as error:
            if error.reason not in _AGAIN:
                raise
            opened.flush()
            return error
        message = f"the cloud sends fewer than the signed {file.size_bytes} bytes"
        return EbbflowError(Reason.ARTEFACT_UNTRUSTED, message)


def _hash(opened: BinaryIO) -> "hashlib._Hash":
    digest = hashlib.sha256()
    while block := opened.read(READ_BYTES):
        digest.update(block)
    return digest
