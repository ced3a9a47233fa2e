"""Installs releases: verified by the signed metadata, fetched, probed, and committed only when they serve.

    installed, engine = installer.install(desired, load_engine)   # the old release serves all the while
    hub.swap(engine)
    installer.commit(installed)

Whatever goes wrong before the commit, the old release stays.
"""

import shutil
import threading
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.manifest import MAX_BYTES, Manifest
from ebbflow.common.trust.targets import path_of
from ebbflow.edge.delivery.download import Downloader, Patience, SignedFile, verify
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.probe import LoadEngine, load, probe
from ebbflow.edge.delivery.slots import MAX_TRIES, Slot, Slots, SlotStore
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.engine.base import Engine

RESERVE_BYTES = 32 << 20
"""Disk space that an installation leaves alone, for the agent's own records."""

_PRECISIONS = {
    resources_pb2.PRECISION_BF16: "bf16",
    resources_pb2.PRECISION_INT8: "int8",
    resources_pb2.PRECISION_INT4: "int4",
}


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
    probe_loss: float = 0.0
    """Measured loss on the probe in nats per token; 0 if it was not measured."""


@dataclass(frozen=True)
class _Wanted:
    student_id: str
    number: int
    precision: str
    rollout: str
    files: dict[str, SignedFile]


class Installer:
    """Installs and starts releases. Thread-safe: one installation at a time, started releases are not in its way."""

    def __init__(
        self, folder: Path, trust: TrustClient, source: ArtefactSource, patience: Patience | None = None
    ) -> None:
        """Uses `folder` for slots and partial files."""
        self._store = SlotStore(folder)
        self._trust, self._source, self._patience = trust, source, patience
        self._lock = threading.RLock()

    def install(self, desired: agent_pb2.DesiredRelease, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine]:
        """Fetches, verifies, loads and probes a release. The caller swaps the engine in and then calls `commit`.

        Args:
            desired: what the cloud assigned.
            load_engine: loads weights into an engine.

        Raises:
            EbbflowError: METADATA_EXPIRED, ARTEFACT_UNTRUSTED, RELEASE_TOO_OLD, DISK_FULL, FILE_CORRUPT, PROBE_FAILED,
                OUT_OF_MEMORY, EXTRA_MISSING, or why the cloud could not be asked. `metadata["fetched_bytes"]` says how
                many bytes were fetched, `metadata["probe_loss"]` the measured loss if there is one.
        """
        with self._lock:
            downloader = None
            try:
                wanted = self._verified(desired)
                partials = self._store.home(wanted.student_id) / "partial"
                downloader = Downloader(self._source, partials, self._patience)
                installed, engine = self._again(wanted, load_engine) or self._anew(wanted, downloader, load_engine)
            except EbbflowError as error:
                error.metadata["fetched_bytes"] = str(downloader.fetched_bytes if downloader else 0)
                raise
            return replace(installed, fetched_bytes=downloader.fetched_bytes), engine

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
        release before it takes its place.

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
            if slots.starts >= MAX_TRIES and slots.previous and self._usable(student_id, slots.previous):
                slots = slots.fallen_back()
            try:
                return self._load(student_id, slots, load_engine)
            except EbbflowError:
                if not slots.previous or not self._usable(student_id, slots.previous):
                    raise
                return self._load(student_id, slots.fallen_back(), load_engine)

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

    def _verified(self, desired: agent_pb2.DesiredRelease) -> _Wanted:
        """Says which files to install, as far as the signed metadata stands behind them."""
        student_id = names.parse(desired.student, "students")
        of, number = names.parse_release(desired.release)
        precision = _PRECISIONS.get(desired.precision)
        if of != student_id or precision is None:
            raise EbbflowError(Reason.INVALID_REQUEST, f"{desired.release[:80]} is no release to install")
        self._trust.refresh()
        lowest = self._trust.min_release(student_id)
        if number < lowest:
            message = f"release {number} of {student_id} is below {lowest}, the lowest that may be installed"
            raise EbbflowError(Reason.RELEASE_TOO_OLD, message, release=number, min_release=lowest)
        kinds = {"manifest": "manifest", "tokenizer": "tokenizer", "weights": precision}
        files = {what: self._signed_file(student_id, number, kind) for what, kind in kinds.items()}
        return _Wanted(student_id, number, precision, desired.rollout, files)

    def _signed_file(self, student_id: str, number: int, kind: str) -> SignedFile:
        path = path_of(student_id, number, kind)
        target = self._trust.target(path)
        if target.custom != roles.custom(student_id, number, kind) or set(target.hashes) != {"sha256"}:
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"{path} is signed as another file", target=path)
        return SignedFile(target.hashes["sha256"], target.length)

    def _again(self, wanted: _Wanted, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine] | None:
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

    def _anew(
        self, wanted: _Wanted, downloader: Downloader, load_engine: LoadEngine
    ) -> tuple[InstalledRelease, Engine]:
        slot = self._stage(wanted, downloader)
        return self._try(wanted, slot, load_engine)

    def _stage(self, wanted: _Wanted, downloader: Downloader) -> Slot:
        """Fills the free slot."""
        slots = self._store.read(wanted.student_id)
        slot = Slot(slots.free, wanted.number, wanted.precision, wanted.rollout, wanted.files)
        if slots.pending == slot and slots.tries >= MAX_TRIES:
            message = f"release {wanted.number} of {wanted.student_id} ended the agent {slots.tries} times on loading"
            raise EbbflowError(Reason.PROBE_FAILED, message)
        self._check_space(wanted.student_id, slot, downloader)
        self._store.write(wanted.student_id, slots.cleared(slot))
        self._store.tidy(wanted.student_id, slot)
        downloader.keep_only(wanted.files.values())
        for what in ("manifest", "tokenizer", "weights"):
            self._fill(wanted, slot, what, downloader)
        self._store.write(wanted.student_id, slots.cleared(slot).staged(slot))
        return slot

    def _fill(self, wanted: _Wanted, slot: Slot, what: str, downloader: Downloader) -> None:
        file, path = wanted.files[what], self._store.path(wanted.student_id, slot, what)
        if what == "manifest" and file.size_bytes > MAX_BYTES:
            raise EbbflowError(Reason.FILE_CORRUPT, f"the manifest is longer than {MAX_BYTES} bytes")
        if not path.exists() and not self._store.adopt(wanted.student_id, file, path):
            downloader.download(file, path)
        if what == "manifest":
            self._installed(wanted.student_id, slot)

    def _try(self, wanted: _Wanted, slot: Slot, load_engine: LoadEngine) -> tuple[InstalledRelease, Engine]:
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

    def _usable(self, student_id: str, slot: Slot) -> bool:
        """Whether a fallback is whole and not below what the metadata, as verified last, allows."""
        try:
            lowest = self._trust.min_release(student_id)
        except EbbflowError:
            lowest = 1
        return slot.release >= lowest and self._store.intact(student_id, slot)

    def _describes(self, slot: Slot, installed: InstalledRelease) -> bool:
        weights_path = self._store.path(installed.student, slot, "weights")
        return (slot.release, slot.precision, weights_path) == (
            installed.number,
            installed.precision,
            installed.weights_path,
        )

    def _check_space(self, student_id: str, slot: Slot, downloader: Downloader) -> None:
        """Refuses before the first byte what would fill the disk."""
        paths = {what: self._store.path(student_id, slot, what) for what in slot.files}
        held = {what: path.stat().st_size if path.exists() else 0 for what, path in paths.items()}
        needed = freed = 0
        for what, file in slot.files.items():
            if held[what] != file.size_bytes:
                needed, freed = needed + downloader.missing_bytes(file), freed + held[what]
        free = shutil.disk_usage(self._store.home(student_id)).free
        if needed and needed + RESERVE_BYTES > free + freed:
            message = f"the release needs {needed} bytes beside {RESERVE_BYTES} in reserve; {free + freed} are free"
            raise EbbflowError(Reason.DISK_FULL, message, needed_bytes=needed, free_bytes=free + freed)
