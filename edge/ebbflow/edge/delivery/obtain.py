"""Brings the weights of a release onto the device in the cheapest way that works; the full file always does.

A way that turns out wrong costs the bytes that it took, never the release: the next one is tried, and in the end every
byte is held against the signed hash, whichever way it came.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from ebbflow.common.codes import delta
from ebbflow.common.codes.derive import derive_int4
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named, sync_folder
from ebbflow.edge.delivery.download import Downloader
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.files import SignedFile, verify
from ebbflow.edge.delivery.plan import Held, Offer, Step, Way, Wish
from ebbflow.edge.delivery.progress import Progress
from ebbflow.edge.delivery.slots import Slot, Slots, SlotStore
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.delivery.wanted import Wanted, signed_file

log = structlog.get_logger(__name__)

_FIND_S = 20.0
"""How long the cloud may take to find deltas, and beside it the time to build one:"""
_BUILT_BYTES_PER_S = 20e6
_LINK_DOWN = frozenset({Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.QUOTA_EXHAUSTED})
"""The full file would not come either: what has come is kept, and the next attempt goes on."""

_STUCK_ATTEMPTS = 3


@dataclass(frozen=True)
class Plan:
    """Ways to the weights, cheapest first."""

    wish: Wish
    steps: list[Step]
    asked: bool = False
    """Whether the cloud said which deltas there are."""


class Obtainer:
    """Knows the ways. For one installation at a time."""

    def __init__(self, source: ArtefactSource, store: SlotStore, trust: TrustClient, progress: Progress) -> None:
        self._source, self._store, self._trust, self.progress = source, store, trust, progress
        self._shunned: set[str] = set()
        self._stuck: Counter[str] = Counter()

    def wish(self, wanted: Wanted, slots: Slots, free: str) -> Wish:
        """Looks for what the weights can be made from.

        Args:
            wanted: the release.
            slots: what the pointer says.
            free: name of the slot that will be filled.
        """
        folder = self._folder(wanted.student_id)
        partial = {path.name: path.stat().st_size for path in folder.glob("*") if path.is_file()}
        held = tuple(self._held(wanted.student_id, slots, free))
        return Wish(wanted.files["weights"], wanted.precision, wanted.number, held, partial)

    def plan(self, wish: Wish) -> Plan:
        """Finds the ways. Asks the cloud for deltas, unless nothing need be fetched or there is no base."""
        offers: list[Offer] | None = []
        if wish.derived() is None and (bases := wish.bases()):
            offers = self._ask(wish, bases)
        return Plan(wish, wish.steps(offers or [], self._shunned), asked=offers is not None)

    def secure(self, student_id: str, plan: Plan) -> Plan:
        """Takes the first way's base out of the slot that is about to be emptied; ways that lose theirs are out."""
        first, *others = plan.steps
        if first.base and first.base.doomed:
            kept = self._folder(student_id) / _base_name(first.base)
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            first.base.path.replace(kept)
            first = replace(first, base=replace(first.base, path=kept, doomed=False))
        left = [step for step in others if not step.base or not step.base.doomed]
        return replace(plan, steps=[first, *left])

    def fill(self, student_id: str, plan: Plan, downloader: Downloader, path: Path) -> None:
        """Makes `path` the wanted file.

        Raises:
            EbbflowError: as `Downloader.download`.
            TransferPausedError: likewise.
        """
        for place, step in enumerate(plan.steps):
            size_bytes = step.offer.file.size_bytes if step.offer else plan.wish.file.size_bytes
            self.progress.choose(step.way, 0 if step.way is Way.DERIVED else size_bytes)
            if step.way is Way.FULL:
                downloader.download(plan.wish.file, path)
                return
            before_bytes = downloader.fetched_bytes
            try:
                self._make(student_id, step, plan.wish.file, downloader, path)
            except EbbflowError as error:
                if error.reason in _LINK_DOWN and not self._is_stuck(step, downloader.fetched_bytes - before_bytes):
                    raise
                self._give_up(step, error, downloader)
                if step.base and step.base not in [other.base for other in plan.steps[place + 1 :]]:
                    self._let_go(student_id, step.base)
            else:
                log.info("weights_made", way=step.way.value, fetched_bytes=downloader.fetched_bytes)
                return

    def kept(self, student_id: str, plan: Plan) -> tuple[list[SignedFile], list[Path]]:
        """Partial files, and other files beside them, that the plan needs."""
        files = [plan.wish.file, *(step.offer.file for step in plan.steps if step.offer)]
        folder = self._folder(student_id)
        return files, [step.base.path for step in plan.steps if step.base and step.base.path.parent == folder]

    def _held(self, student_id: str, slots: Slots, free: str) -> Iterator[Held]:
        """Weights on the device, as the pointer has them; what is made of them is checked in the end."""
        for slot in (slots.current, slots.previous):
            path = slot and self._store.path(student_id, slot, "weights")
            if slot and path and path.is_file():
                yield self._derivable(student_id, _held_in(slot, path, doomed=slot.name == free))
        for path in sorted(self._folder(student_id).glob("*.base")):
            if held := _held_beside(path):
                yield self._derivable(student_id, held)

    def _derivable(self, student_id: str, held: Held) -> Held:
        if held.precision != "int8":
            return held
        try:
            return replace(held, derives=signed_file(self._trust, student_id, held.release, "int4"))
        except EbbflowError:  # the release is no longer listed, or has no INT4
            return held

    def _ask(self, wish: Wish, bases: list[str]) -> list[Offer] | None:
        timeout_s = _FIND_S + wish.file.size_bytes / _BUILT_BYTES_PER_S
        try:
            return self._source.deltas(wish.file.sha256, bases, timeout_s)
        except EbbflowError as error:
            log.info("no_deltas", release=wish.release, reason=error.reason.name)
            return None

    def _make(self, student_id: str, step: Step, file: SignedFile, downloader: Downloader, path: Path) -> None:
        folder = self._folder(student_id)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made, derived = folder / "made", folder / "derived"
        try:
            if step.offer:
                fetched = downloader.partial_path(step.offer.file)
                downloader.download(step.offer.file, fetched)
                with _named_failures(), full_disk_named(made):
                    _apply(step, fetched, derived, made, file.size_bytes)
            elif step.base:
                with _named_failures(), full_disk_named(made):
                    derive_int4(step.base.path, made)
            if not verify(made, file):
                raise EbbflowError(Reason.DELTA_INVALID, "what was made is not the signed file")
            made.replace(path)
            sync_folder(path.parent)
        finally:
            for left in (made, derived):
                left.unlink(missing_ok=True)

    def _is_stuck(self, step: Step, fetched_bytes: int) -> bool:
        """Whether a delta has not moved for several attempts, as if it alone could not be read."""
        sha256 = step.offer.file.sha256 if step.offer else ""
        self._stuck[sha256] = 0 if fetched_bytes else self._stuck[sha256] + 1
        return self._stuck[sha256] >= _STUCK_ATTEMPTS

    def _give_up(self, step: Step, error: EbbflowError, downloader: Downloader) -> None:
        log.warning("way_failed", way=step.way.value, reason=error.reason.name, why=str(error))
        if step.offer:
            self._shunned.add(step.offer.file.sha256)
            self.progress.failed_deltas += 1
            downloader.partial_path(step.offer.file).unlink(missing_ok=True)

    def _let_go(self, student_id: str, base: Held) -> None:
        """Deletes a base that was kept for a way that failed."""
        if base.path.parent == self._folder(student_id):
            base.path.unlink(missing_ok=True)

    def _folder(self, student_id: str) -> Path:
        return self._store.home(student_id) / "partial"


def _apply(step: Step, fetched: Path, derived: Path, made: Path, size_bytes: int) -> None:
    base, sha256 = (step.base.path, step.offer.base_sha256) if step.base and step.offer else (made, None)
    if step.derives_base:
        derive_int4(base, derived)
        base = derived
    delta.apply(base, fetched, made, target_size_bytes=size_bytes, base_sha256=sha256)


@contextmanager
def _named_failures() -> Iterator[None]:
    """Whatever the making trips over, the full file is still there."""
    try:
        yield
    except EbbflowError:
        raise
    except Exception as error:
        message = f"the weights could not be made: {type(error).__name__}"
        raise EbbflowError(Reason.DELTA_INVALID, message) from error


def _held_in(slot: Slot, path: Path, *, doomed: bool) -> Held:
    return Held(path, slot.files["weights"], slot.precision, slot.release, doomed=doomed)


def _base_name(held: Held) -> str:
    """Name under which a base outlives its slot, also over a restart."""
    return f"{held.release}.{held.precision}.{held.file.sha256}.{held.file.size_bytes}.base"


def _held_beside(path: Path) -> Held | None:
    try:
        release, precision, sha256, size_bytes, _ = path.name.split(".")
        return Held(path, SignedFile(sha256, int(size_bytes)), precision, int(release))
    except ValueError:
        return None
