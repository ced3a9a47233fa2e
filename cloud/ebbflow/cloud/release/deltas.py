"""Deltas between the files of releases: built when somebody asks, once for each pair, and kept as blobs.

A delta is only a saving: it may be lost, be missing or be built twice by two replicas, and nothing goes wrong.
"""

import datetime as dt
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.locks import exclusive
from ebbflow.cloud.registry.tables import Delta, Json
from ebbflow.common.errors import EbbflowError, Reason

_log = logging.getLogger(__name__)

FORMAT = "ebbflow.delta/1"
WORTH = 0.9
"""Share of the full file up to which a delta is offered: below it there is time to win on any line."""
PATIENCE_S = 600.0
"""How long a pair whose build failed is left alone."""
_HOPELESS = frozenset({Reason.FILE_CORRUPT, Reason.INVALID_REQUEST, Reason.DELTA_INVALID})
"""What the coder says of files, whose hashes are right, that have no delta: for ever."""


@dataclass(frozen=True)
class Pair:
    """Two files of weights, by their hexadecimal SHA-256."""

    base_sha256: str
    target_sha256: str


@dataclass(frozen=True)
class Found:
    """What is known of a pair."""

    pair: Pair
    sha256: str | None
    """Blob that holds the delta; None if the full file is about as short."""
    size_bytes: int
    statistics: Json
    """See `DeltaInfo.statistics`; empty if the files have no delta."""


def known(session: Session, pairs: Iterable[Pair]) -> dict[Pair, Found]:
    """Returns what was built before; the blobs may be lost since."""
    wanted = set(pairs)
    query = sa.select(Delta).where(
        Delta.format == FORMAT,
        Delta.target_sha256.in_({pair.target_sha256 for pair in wanted}),
        Delta.base_sha256.in_({pair.base_sha256 for pair in wanted}),
    )
    found = (_found(row) for row in session.scalars(query))
    return {one.pair: one for one in found if one.pair in wanted}


class DeltaBuilder:
    """Builds one delta at a time in a thread of its own. Thread-safe."""

    def __init__(
        self, registry: Registry, blobs: BlobStore, scratch: Path, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Takes its collaborators.

        Args:
            registry: keeps what is known.
            blobs: holds the files, and gets the deltas.
            scratch: folder on a disk with room for three files of weights; made when it is needed.
            now_s: seconds that never run backwards.
        """
        self._registry, self._blobs, self._scratch, self._now_s = registry, blobs, scratch, now_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="deltas")
        self._lock = threading.Lock()
        self._running: dict[Pair, Future[Found]] = {}
        self._failed: dict[Pair, tuple[float, Exception]] = {}

    def begin(self, pairs: Sequence[Pair], remembered: dict[Pair, Found]) -> "list[Future[Found]]":
        """Returns the result of each pair as it will be, and begins what has not begun. Waits for no build.

        Everybody who asks for a pair while it is being built gets the same result.

        Args:
            pairs: what is wanted, in the order in which it is built.
            remembered: what `known` says of them.

        Returns:
            Futures in the order of `pairs`. They fail with EbbflowError: BLOB_NOT_FOUND, FILE_CORRUPT, DISK_FULL or
            what else keeps a delta from being built for now.
        """
        return [self._ready(pair, remembered.get(pair)) or self._submit(pair) for pair in pairs]

    def close(self) -> None:
        """Waits for the build that runs, and gives the others up."""
        self._thread.shutdown(cancel_futures=True)

    def _ready(self, pair: Pair, found: Found | None) -> "Future[Found] | None":
        done: Future[Found] = Future()
        with self._lock:
            failed = self._failed.get(pair)
        if found and (found.sha256 is None or self._blobs.has(found.sha256)):
            done.set_result(found)
        elif failed and self._now_s() - failed[0] < PATIENCE_S:
            done.set_exception(failed[1])
        else:
            return None
        return done

    def _submit(self, pair: Pair) -> "Future[Found]":
        with self._lock:
            if pair not in self._running:
                self._running[pair] = self._thread.submit(self._run, pair)
            return self._running[pair]

    def _run(self, pair: Pair) -> Found:
        try:
            found = self._from_elsewhere(pair) or self._build(pair)
            with self._lock:
                self._failed.pop(pair, None)
            return found
        except Exception as error:
            what = error.reason.name if isinstance(error, EbbflowError) else type(error).__name__
            _log.warning("no delta to %s: %s", pair.target_sha256[:12], what)
            with self._lock:
                self._failed[pair] = self._now_s(), error
            raise
        finally:
            with self._lock:
                del self._running[pair]

    def _from_elsewhere(self, pair: Pair) -> Found | None:
        """What another replica, or whoever asked just before, has built meanwhile."""
        with self._registry.reading() as session:
            found = known(session, [pair]).get(pair)
        return found if found and (found.sha256 is None or self._blobs.has(found.sha256)) else None

    def _build(self, pair: Pair) -> Found:
        self._scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        begin_s = self._now_s()
        with (
            tempfile.TemporaryDirectory(dir=self._scratch, prefix="delta-") as folder,
            self._blobs.lend(pair.base_sha256, Path(folder)) as base,
            self._blobs.lend(pair.target_sha256, Path(folder)) as target,
        ):
            found = self._encode(pair, base, target, Path(folder) / "delta")
            full_bytes = target.stat().st_size
        self._keep(found, clock.now())
        spent_s = self._now_s() - begin_s
        _log.info(
            "delta to %s: %d of %d bytes in %.1f s", pair.target_sha256[:12], found.size_bytes, full_bytes, spent_s
        )
        return found

    def _encode(self, pair: Pair, base: Path, target: Path, out: Path) -> Found:
        from ebbflow.common.codes import delta  # numpy and the native coder: only where deltas are built

        try:
            info = delta.encode(base, target, out)
        except EbbflowError as error:
            if error.reason not in _HOPELESS:
                raise
            return Found(pair, None, 0, {})
        worth = info.size_bytes <= WORTH * target.stat().st_size
        return Found(pair, self._blobs.put_file(out).sha256 if worth else None, info.size_bytes, info.statistics)

    def _keep(self, found: Found, now: dt.datetime) -> None:
        row = Delta(
            base_sha256=found.pair.base_sha256,
            target_sha256=found.pair.target_sha256,
            format=FORMAT,
            blob_sha256=found.sha256,
            size_bytes=found.size_bytes,
            statistics=found.statistics,
            create_time=now,
        )
        with self._registry.transaction() as session:
            exclusive(session, "deltas")  # another replica may have built the same one
            session.merge(row)


def _found(row: Delta) -> Found:
    return Found(Pair(row.base_sha256, row.target_sha256), row.blob_sha256, row.size_bytes, row.statistics)
