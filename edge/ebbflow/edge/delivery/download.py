"""Brings one file onto the device: resumed after any cut, never longer than said, hashed before it counts."""

import random
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named, sync_folder
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.frames import Chunk
from ebbflow.edge.delivery.progress import Progress
from ebbflow.edge.delivery.sink import Sink
from ebbflow.edge.delivery.traffic import Brake, Traffic
from ebbflow.edge.delivery.watchdog import PROGRESS_BYTES

AGAIN = frozenset({Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.INTERNAL, Reason.QUOTA_EXHAUSTED})
"""What a cut looks like: tried again from where it happened."""
_USELESS = frozenset({Reason.ARTEFACT_UNTRUSTED, Reason.FILE_CORRUPT, Reason.DISK_FULL})


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How often a transfer that makes no progress is tried again."""

    attempts: int = 5
    """Tries in a row without progress."""
    first_wait_s: float = 0.2
    """Longest wait before the second try; doubles from try to try, and each wait is drawn at random below it."""


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
        *,
        traffic: Traffic | None = None,
        brake: Brake | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Takes where to read from, where to keep what has come, and what the device allows."""
        self._source, self._folder = source, folder
        self._patience, self._sleep = patience or Patience(), sleep
        self._traffic, self._brake = traffic or Traffic(), brake or Brake()
        self._progress = progress or Progress()
        self.fetched_bytes = 0

    def partial_path(self, file: SignedFile) -> Path:
        """Where a file is while it comes."""
        return self._folder / file.sha256

    def partial_bytes(self, file: SignedFile) -> int:
        """How many bytes of a file have come, as far as the length of its partial file tells."""
        partial = self.partial_path(file)
        return partial.stat().st_size if partial.exists() else 0

    def missing_bytes(self, file: SignedFile) -> int:
        """How many bytes of a file are still to be fetched."""
        return max(0, file.size_bytes - self.partial_bytes(file))

    def keep_only(self, files: Collection[SignedFile], paths: Collection[Path] = ()) -> None:
        """Deletes the partial files of anything else, and what crashes have left, but for `paths`."""
        wanted = {*paths, *(self.partial_path(file) for file in files)}
        for path in self._folder.glob("*"):
            if path not in wanted:
                path.unlink(missing_ok=True)

    def download(self, file: SignedFile, path: Path) -> None:
        """Makes `path` the file; until it is whole and verified, `path` stays as it was.

        Raises:
            EbbflowError: ARTEFACT_UNTRUSTED if the cloud sends other bytes than said, more or fewer; DISK_FULL; or
                why the cloud could not be asked, in which case the next call goes on where this one ended.
            TransferPausedError: it was stopped on purpose; the next call goes on likewise.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = self.partial_path(file)
        resumed = partial.exists()
        try:
            self._fill(file, partial)
        except EbbflowError as error:
            if error.reason is not Reason.ARTEFACT_UNTRUSTED or not resumed:
                raise
            # The damage may lie in what was kept from before, for example over a power cut: once more from the start.
            self._fill(file, partial)
        self._traffic.recover()
        partial.replace(path)
        sync_folder(path.parent)

    def _fill(self, file: SignedFile, partial: Path) -> None:
        """Completes and verifies a partial file; deletes it when its bytes are of no use any more."""
        try:
            with full_disk_named(partial), partial.open("a+b") as opened, Sink(opened) as sink:
                self._receive(file, sink)
                sink.settle()
            if sink.hexdigest() != file.sha256:
                raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the bytes do not hash to the signed {file.sha256}")
        except EbbflowError as error:
            if error.reason in _USELESS:
                partial.unlink(missing_ok=True)
            raise

    def _receive(self, file: SignedFile, sink: Sink) -> None:
        failures = 0
        while (before := sink.size_bytes) < file.size_bytes:
            problem = self._read_some(file, sink)
            failures = failures + 1 if sink.size_bytes - before < PROGRESS_BYTES else 0
            if sink.size_bytes < file.size_bytes and failures >= self._patience.attempts:
                raise problem
            if failures:
                wait_s = self._patience.first_wait_s * 2 ** (failures - 1)
                self._sleep(random.SystemRandom().uniform(0, wait_s))
        if sink.size_bytes > file.size_bytes:
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"more than the signed {file.size_bytes} bytes are there")

    def _read_some(self, file: SignedFile, sink: Sink) -> EbbflowError:
        """Reads until the stream ends or breaks, and returns what to say if that was not enough."""
        self._traffic.admit(self._brake)
        self._progress.done_bytes = sink.size_bytes
        try:
            with closing(self._source.blob(file.sha256, sink.size_bytes, self._traffic.chunk_bytes)) as chunks:
                for chunk in chunks:
                    self._take(file, sink, chunk)
        except EbbflowError as error:
            if error.reason not in AGAIN:
                raise
            if error.reason is Reason.DEADLINE_EXCEEDED:
                self._traffic.falter()
            return error
        message = f"the cloud sends fewer than the signed {file.size_bytes} bytes"
        return EbbflowError(Reason.ARTEFACT_UNTRUSTED, message)

    def _take(self, file: SignedFile, sink: Sink, chunk: Chunk) -> None:
        self.fetched_bytes += len(chunk)
        if sink.size_bytes + len(chunk) > file.size_bytes:
            message = f"the cloud sends more than the signed {file.size_bytes} bytes"
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message)
        sink.put(chunk)
        self._progress.done_bytes = sink.size_bytes
        self._traffic.spend(len(chunk), self._brake)
        if sink.size_bytes < file.size_bytes:
            self._traffic.admit(self._brake)
