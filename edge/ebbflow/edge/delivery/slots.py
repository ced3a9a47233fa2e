"""Two slots per student: which release serves, which one did before, and which one is being tried.

    <folder>/<student>/slots.json   the pointer; replaced atomically, so that it is always whole
    <folder>/<student>/a/, b/       the files of one release each
    <folder>/<student>/partial/     what has been fetched so far

A crash at any point leaves a pointer that is valid, and files that are hashed before they are served.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named, sync_file, sync_folder, write_atomic
from ebbflow.common.names import check_id
from ebbflow.edge.delivery.files import SignedFile, verify

MAX_TRIES = 3
"""How often a release may end the process while it is being loaded before it is given up."""
_FORMAT = 1

FILE_NAMES = {"manifest": "manifest.json", "tokenizer": "tokenizer.json", "weights": "weights.safetensors"}
"""File in a slot by what it is."""


@dataclass(frozen=True)
class Slot:
    """One release in one slot."""

    name: str
    """"a" or "b"."""
    release: int
    precision: str
    rollout: str
    """The rollout that brought it; a new rollout of the same release is a new chance."""
    files: Mapping[str, SignedFile]
    """By the keys of `FILE_NAMES`."""


@dataclass(frozen=True)
class Slots:
    """What the pointer says. Decisions without IO: every method returns the next state."""

    current: Slot | None = None
    """Serves."""
    previous: Slot | None = None
    """Served before; still whole."""
    pending: Slot | None = None
    """Is being tried."""
    tries: int = 0
    """How often the pending release was loaded without an end being seen."""
    starts: int = 0
    """How often the current release was loaded at a start without an end being seen."""

    @property
    def free(self) -> str:
        """Name of the slot that may be overwritten."""
        return "b" if self.current and self.current.name == "a" else "a"

    def cleared(self, wanted: Slot) -> "Slots":
        """The free slot is about to be overwritten: nothing may point to it but what will be there."""
        same = self.pending == wanted
        return replace(self, previous=None, pending=wanted if same else None, tries=self.tries if same else 0)

    def staged(self, slot: Slot) -> "Slots":
        """The free slot holds all files of a release."""
        return replace(self, pending=slot, tries=self.tries if self.pending == slot else 0)

    def trying(self) -> "Slots":
        """The pending release is about to be loaded."""
        return replace(self, tries=self.tries + 1)

    def dropped(self) -> "Slots":
        """The pending release was refused."""
        return replace(self, pending=None, tries=0)

    def committed(self) -> "Slots":
        """The pending release serves."""
        return Slots(current=self.pending, previous=self.current)

    def starting(self) -> "Slots":
        """The current release is about to be loaded at the start of the process."""
        return replace(self, starts=self.starts + 1)

    def started(self) -> "Slots":
        """The current release was loaded."""
        return replace(self, starts=0)

    def fallen_back(self) -> "Slots":
        """The current release cannot serve; the one before it takes its place."""
        return Slots(current=self.previous)


@dataclass(frozen=True)
class SlotStore:
    """Slots on disk."""

    folder: Path

    def students(self) -> list[str]:
        """Ids of the students that have a folder."""
        return sorted(path.name for path in self.folder.glob("*") if path.is_dir())

    def home(self, student_id: str) -> Path:
        """Folder of a student; made if it is not there."""
        home = self.folder / check_id(student_id, "student")
        if not home.is_dir():
            with full_disk_named(home):
                home.mkdir(parents=True, exist_ok=True, mode=0o700)
                sync_folder(self.folder)
        return home

    def path(self, student_id: str, slot: Slot, what: str) -> Path:
        """Path of one file of a slot."""
        return self.folder / student_id / slot.name / FILE_NAMES[what]

    def read(self, student_id: str) -> Slots:
        """Returns the pointer. One that is damaged or missing reads as empty: the next installation heals it."""
        try:
            return _decode((self.folder / check_id(student_id, "student") / "slots.json").read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return Slots()

    def write(self, student_id: str, slots: Slots) -> None:
        """Replaces the pointer, durably.

        Raises:
            EbbflowError: DISK_FULL; the old pointer stays.
        """
        data = json.dumps({"format": _FORMAT, **asdict(slots)}, sort_keys=True).encode()
        with full_disk_named(self.folder):
            write_atomic(self.home(student_id) / "slots.json", data)

    def intact(self, student_id: str, slot: Slot) -> bool:
        """Whether every file of a slot still has its hash. Reads them all."""
        return all(verify(self.path(student_id, slot, what), file) for what, file in slot.files.items())

    def find(self, student_id: str, slot: Slot, slots: Slots) -> dict[str, Path]:
        """Says which files of a slot are on the device already, in this slot or in the other. Hashes what may be one.

        Args:
            student_id: the student.
            slot: what is wanted in it.
            slots: the pointer; a file that it names as another one is not read.
        """
        known = {
            self.path(student_id, named, what): file
            for named in (slots.previous, slots.pending, slots.current)
            if named
            for what, file in named.files.items()
        }
        found = {}
        for what, file in slot.files.items():
            for name in (slot.name, "b" if slot.name == "a" else "a"):
                path = self.folder / student_id / name / FILE_NAMES[what]
                if known.get(path, file) == file and verify(path, file):
                    found[what] = path
                    break
        return found

    def tidy(self, student_id: str, slot: Slot, found: Mapping[str, Path]) -> None:
        """Makes the folder of a slot, and deletes what does not belong there and what crashes have left behind."""
        for left in self.home(student_id).glob(".slots.json.*"):
            left.unlink(missing_ok=True)
        folder = self.home(student_id) / slot.name
        folder.mkdir(exist_ok=True, mode=0o700)
        for path in folder.iterdir():
            if path not in found.values():
                path.unlink()

    def adopt(self, source: Path, path: Path) -> None:
        """Puts a file of the other slot at `path`, without copying where the file system allows that.

        Raises:
            EbbflowError: DISK_FULL.
        """
        with full_disk_named(path):
            _link(source, path)

    def settle(self, student_id: str, slot: Slot) -> None:
        """Makes the files of a slot durable, with their names.

        Those that were found may come from a process that ended between moving them here and syncing the folder: they
        have their hashes, and a power cut would still take them away.
        """
        paths = [self.path(student_id, slot, what) for what in slot.files]
        with full_disk_named(paths[0]):
            for path in paths:
                sync_file(path)
            sync_folder(paths[0].parent)

    def remove(self, student_id: str) -> None:
        """Deletes everything of a student; the pointer goes first."""
        home = self.folder / check_id(student_id, "student")
        (home / "slots.json").unlink(missing_ok=True)
        shutil.rmtree(home, ignore_errors=True)


def _link(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # some file systems have no links
        temporary = path.with_suffix(".copy")
        shutil.copyfile(source, temporary)
        temporary.replace(path)
    sync_folder(path.parent)


def _decode(data: bytes) -> Slots:
    fields = json.loads(data)
    if fields.pop("format") != _FORMAT:
        raise EbbflowError(Reason.CONFIG_INVALID, "this device's slots were written by a newer version")
    current, previous, pending = (_slot(fields[name]) for name in ("current", "previous", "pending"))
    return Slots(current, previous, pending, int(fields["tries"]), int(fields["starts"]))


def _slot(fields: dict[str, Any] | None) -> Slot | None:
    if fields is None:
        return None
    files = {what: SignedFile(**fields["files"][what]) for what in FILE_NAMES}
    return Slot(**{**fields, "files": files})
