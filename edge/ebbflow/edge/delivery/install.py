"""Installs releases: verified by the signed metadata, fetched, probed, and committed only when they serve.

    installed, engine = installer.install(desired, load_engine)   # the old release serves all the while
    hub.swap(engine)
    installer.commit(installed)

Whatever goes wrong before the commit, the old release stays.
"""

import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ebbflow.api.v1 import agent_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.manifest import Manifest
from ebbflow.edge.delivery.download import Downloader, Patience
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.files import verify
from ebbflow.edge.delivery.obtain import Obtainer
from ebbflow.edge.delivery.probe import LoadEngine, load, probe
from ebbflow.edge.delivery.progress import Progress
from ebbflow.edge.delivery.slots import MAX_TRIES, Slot, Slots, SlotStore
from ebbflow.edge.delivery.stage import Attempt, Stager
from ebbflow.edge.delivery.traffic import Brake, Traffic, TransferPausedError
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.delivery.wanted import Wanted, verified
from ebbflow.edge.engine.base import Engine


@dataclass(frozen=True)
class InstalledRelease:
    """A release whose files are on this device, whole and verified."""

    student: str
    """Student id, such as "faq"."""
    number: int
    precision: str
    manifest: Manifest
    tokenizer_path: Path
    weights_path: Path
    fetched_bytes: int = 0
    """Bytes that came over the network for this installation."""
    resumed_bytes: int = 0
    """Bytes of it that had come before, in attempts that were cut."""
    probe_loss: float = 0.0
    """Measured loss on the probe in nats per token; 0 if it was not measured."""


class Installer:
    """Installs and starts releases. Thread-safe: one installation at a time, started releases are not in its way.

    Attributes:
        progress: what is being fetched, for other threads to read.
    """

    def __init__(
        self,
        folder: Path,
        trust: TrustClient,
        source: ArtefactSource,
        patience: Patience | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        """Uses `folder` for slots and partial files; `traffic` says when and how fast to fetch."""
        self._store, self.progress = SlotStore(folder), Progress()
        self._trust, self._source, self._patience = trust, source, patience
        self._traffic = traffic or Traffic()
        self._stager = Stager(self._store, Obtainer(source, self._store, trust, self.progress), self._traffic)
        self._lock = threading.RLock()

    def install(
        self, desired: agent_pb2.DesiredRelease, load_engine: LoadEngine, brake: Brake | None = None
    ) -> tuple[InstalledRelease, Engine]:
        """Fetches, verifies, loads and probes a release. The caller swaps the engine in and then calls `commit`.

        Args:
            desired: what the cloud assigned.
            load_engine: loads weights into an engine.
            brake: lets another thread stop the transfer.

        Raises:
            EbbflowError: METADATA_EXPIRED, ARTEFACT_UNTRUSTED, RELEASE_TOO_OLD, DISK_FULL, FILE_CORRUPT, PROBE_FAILED,
                OUT_OF_MEMORY, EXTRA_MISSING, or why the cloud could not be asked. `metadata["fetched_bytes"]` says how
                many bytes were fetched, `metadata["resumed_bytes"]` how many had come before, `metadata["probe_loss"]`
                the measured loss if there is one.
            TransferPausedError: no transfer window is open, or the brake was pulled; call again to go on.
        """
        with self._lock:
            attempt = None
            try:
                wanted = verified(self._trust, desired)
                attempt = self._attempt(wanted, brake or Brake())
                installed, engine = self._again(wanted, load_engine) or self._anew(attempt, load_engine)
            except (EbbflowError, TransferPausedError) as error:
                _tell(error, attempt)
                raise
            finally:
                self.progress.end()
            return replace(
                installed, fetched_bytes=attempt.downloader.fetched_bytes, resumed_bytes=attempt.resumed_bytes
            ), engine

    def commit(self, installed: InstalledRelease) -> None:
        """Makes an installed release the one that serves, also after a restart. The one before stays as a fallback.

        Raises:
            EbbflowError: STATE_CONFLICT if another installation has begun since; DISK_FULL.
        """
        with self._lock:
            slots = self._store.read(installed.student)
            if slots.current and self._describes(slots.current, installed):
                return
            if not slots.pending or not self._describes(slots.pending, installed):
                message = f"release {installed.number} of {installed.student} is no longer the one being installed"
                raise EbbflowError(Reason.STATE_CONFLICT, message)
            self._store.write(installed.student, slots.committed())

    def discard(self, installed: InstalledRelease) -> None:
        """Gives up an installed release that was not committed."""
        with self._lock:
            slots = self._store.read(installed.student)
            if slots.pending and self._describes(slots.pending, installed):
                self._store.write(installed.student, slots.dropped())

    def start(self, student_id: str, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine] | None:
        """Loads the release that serves, at the start of the process and without the network.

        Its files are hashed first. If they are damaged, or loading fails or has ended the process too often, the
        release before it takes its place; one that was revoked or is too old only if there is no other way to serve.

        Returns:
            The release and its engine, or None if the student was never installed.

        Raises:
            EbbflowError: FILE_CORRUPT, OUT_OF_MEMORY, ... if neither release can be loaded; a new installation heals
                that.
        """
        with self._lock:
            slots = self._store.read(student_id)
            if not slots.current:
                return None
            problem = None
            for choice in self._choices(student_id, slots):
                try:
                    return self._load(student_id, choice, load_engine)
                except EbbflowError as error:
                    problem = problem or error
            self._store.write(student_id, slots)
            raise problem or EbbflowError(Reason.FILE_CORRUPT, f"{student_id} has no release")

    def current(self, student_id: str) -> InstalledRelease | None:
        """Returns the committed release, or None. Only its manifest is verified."""
        slot = self._store.read(student_id).current
        try:
            return self._installed(student_id, slot) if slot else None
        except EbbflowError:
            return None

    def students(self) -> list[str]:
        """Ids of the students that are installed or being installed."""
        return self._store.students()

    def retain(self, student_ids: Collection[str]) -> list[str]:
        """Deletes the files of every other student and returns their ids."""
        with self._lock:
            removed = [student_id for student_id in self._store.students() if student_id not in student_ids]
            for student_id in removed:
                self._store.remove(student_id)
            return removed

    def _attempt(self, wanted: Wanted, brake: Brake) -> Attempt:
        self.progress.begin(wanted.student_id, wanted.number)
        partials = self._store.home(wanted.student_id) / "partial"
        downloader = Downloader(
            self._source, partials, self._patience, traffic=self._traffic, brake=brake, progress=self.progress
        )
        return Attempt(wanted, downloader, brake)

    def _again(self, wanted: Wanted, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine] | None:
        """Loads what is wanted if it is what serves already."""
        slots = self._store.read(wanted.student_id)
        slot = slots.current
        if slot is None or (slot.release, slot.precision, slot.files) != (
            wanted.number,
            wanted.precision,
            wanted.files,
        ):
            return None
        return (
            self._load(wanted.student_id, slots, load_engine) if self._store.intact(wanted.student_id, slot) else None
        )

    def _anew(self, attempt: Attempt, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine]:
        student_id = attempt.wanted.student_id
        slot = self._stager.fill(attempt, lambda slot: self._installed(student_id, slot))
        return self._try(attempt.wanted, slot, load_engine)

    def _try(self, wanted: Wanted, slot: Slot, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine]:
        """Loads and probes what is staged; counted before, so that a crash counts too."""
        slots = self._store.read(wanted.student_id).trying()
        self._store.write(wanted.student_id, slots)
        installed = self._installed(wanted.student_id, slot)
        try:
            engine, loss = probe(installed.manifest, wanted.precision, installed.weights_path, load_engine)
        except EbbflowError:
            self._store.write(wanted.student_id, slots.dropped())
            raise
        return replace(installed, probe_loss=loss), engine

    def _load(self, student_id: str, slots: Slots, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine]:
        slot = slots.current
        if slot is None or not self._store.intact(student_id, slot):
            raise EbbflowError(Reason.FILE_CORRUPT, f"the installed release of {student_id} is damaged")
        installed = self._installed(student_id, slot)
        self._store.write(student_id, slots.starting())
        engine = load(installed.weights_path, load_engine)
        self._store.write(student_id, slots.started())
        return installed, engine

    def _installed(self, student_id: str, slot: Slot) -> InstalledRelease:
        """Reads the manifest in a slot, and checks that it speaks of this release and these weights."""
        path = self._store.path(student_id, slot, "manifest")
        if not verify(path, slot.files["manifest"]):
            raise EbbflowError(Reason.FILE_CORRUPT, f"the manifest of the installed release of {student_id} is damaged")
        manifest = Manifest.from_json(path.read_bytes())
        variant = manifest.variants.get(slot.precision)
        if (manifest.student, manifest.release) != (student_id, slot.release) or variant is None:
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, "the manifest is of another release or lacks this precision")
        if variant.size_bytes != slot.files["weights"].size_bytes:
            raise EbbflowError(
                Reason.ARTEFACT_UNTRUSTED, "manifest and signed metadata disagree on the weights' length"
            )
        return InstalledRelease(
            student_id,
            slot.release,
            slot.precision,
            manifest,
            tokenizer_path=self._store.path(student_id, slot, "tokenizer"),
            weights_path=self._store.path(student_id, slot, "weights"),
        )

    def _choices(self, student_id: str, slots: Slots) -> list[Slots]:
        """What to try at a start, best first."""
        if not slots.previous:
            return [slots]
        may_return = self._trust.may_return(student_id, slots.previous.release)
        if slots.starts < (MAX_TRIES if may_return else 2 * MAX_TRIES):
            return [slots, slots.fallen_back()]
        return [slots.fallen_back(), slots]

    def _describes(self, slot: Slot, installed: InstalledRelease) -> bool:
        weights_path = self._store.path(installed.student, slot, "weights")
        return (slot.release, slot.precision, weights_path) == (
            installed.number,
            installed.precision,
            installed.weights_path,
        )


def _tell(error: EbbflowError | TransferPausedError, attempt: Attempt | None) -> None:
    """Adds to an error what came over the network."""
    fetched, resumed = (attempt.downloader.fetched_bytes, attempt.resumed_bytes) if attempt else (0, 0)
    if isinstance(error, TransferPausedError):
        error.fetched_bytes, error.resumed_bytes = fetched, resumed
    else:
        error.metadata |= {"fetched_bytes": str(fetched), "resumed_bytes": str(resumed)}
