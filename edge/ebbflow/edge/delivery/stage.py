"""Fills the free slot with the files of a release, as far as windows, disk and network allow."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.manifest import MAX_BYTES
from ebbflow.edge.delivery.download import Downloader
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.obtain import Obtainer, Plan
from ebbflow.edge.delivery.slots import MAX_TRIES, Slot, Slots, SlotStore
from ebbflow.edge.delivery.traffic import Brake, Traffic
from ebbflow.edge.delivery.wanted import Wanted

RESERVE_BYTES = 32 << 20
"""Disk space that an installation leaves alone, for the agent's own records."""
_OTHERS = ("manifest", "tokenizer")


@dataclass
class Attempt:
    """One call of `install`."""

    wanted: Wanted
    downloader: Downloader
    brake: Brake
    resumed_bytes: int = 0

    def keep(self, plan: Plan | None, files: list[SignedFile], paths: list[Path]) -> None:
        """Counts what came before, and deletes the partial files that are of no use."""
        kept = {*self.wanted.files.values(), *files}
        self.resumed_bytes = sum(self.downloader.partial_bytes(file) for file in kept)
        if plan is None or plan.asked:
            self.downloader.keep_only(kept, paths)


class Stager:
    """Fills slots. For one installation at a time."""

    def __init__(self, store: SlotStore, obtainer: Obtainer, traffic: Traffic) -> None:
        self._store, self._obtainer, self._traffic = store, obtainer, traffic

    def fill(self, attempt: Attempt, check: Callable[[Slot], object]) -> Slot:
        """Fills the free slot.

        Args:
            attempt: what is wanted, and how to fetch.
            check: called with the slot once its manifest is there, before anything long is fetched.

        Raises:
            EbbflowError: DISK_FULL, FILE_CORRUPT, PROBE_FAILED after too many tries, or why a file did not come.
            TransferPausedError: no window is open, or the brake was pulled.
        """
        wanted, downloader, student_id = attempt.wanted, attempt.downloader, attempt.wanted.student_id
        slots = self._store.read(student_id)
        slot = Slot(slots.free, wanted.number, wanted.precision, wanted.rollout, wanted.files)
        if slots.pending == slot and slots.tries >= MAX_TRIES:
            message = f"release {wanted.number} of {student_id} ended the agent {slots.tries} times on loading"
            raise EbbflowError(Reason.PROBE_FAILED, message)
        found = self._store.find(student_id, slot, slots)
        plan = self._plan(attempt, slots, slot, found)
        self._store.write(student_id, slots.cleared(slot))
        if plan:
            plan = self._obtainer.secure(student_id, plan)
        self._store.tidy(student_id, slot, found)
        attempt.keep(plan, *(self._obtainer.kept(student_id, plan) if plan else ([], [])))
        for what in _OTHERS:
            self._fetch(attempt, slot, what, found)
            if what == "manifest":
                check(slot)
        if plan:
            self._obtainer.fill(student_id, plan, downloader, self._store.path(student_id, slot, "weights"))
        else:
            self._fetch(attempt, slot, "weights", found)
        self._store.settle(student_id, slot)
        self._store.write(student_id, slots.cleared(slot).staged(slot))
        downloader.keep_only(())
        return slot

    def _plan(self, attempt: Attempt, slots: Slots, slot: Slot, found: Mapping[str, Path]) -> Plan | None:
        """Finds ways to the weights for which there is room; None if they are here already.

        Waits for a transfer window before anything is touched, if anything must be fetched.
        """
        wish = None if "weights" in found else self._obtainer.wish(attempt.wanted, slots, slot.name)
        if not {"manifest", "tokenizer"} <= found.keys() or (wish and not wish.derived()):
            self._traffic.admit(attempt.brake)
        plan = self._obtainer.plan(wish) if wish else None
        others = sum(attempt.downloader.missing_bytes(slot.files[what]) for what in _OTHERS if what not in found)
        free_bytes = self._free_bytes(attempt.wanted.student_id, slot, found)
        costs = [others + step.disk_bytes for step in plan.steps] if plan else [others]
        fitting = [cost == 0 or cost + RESERVE_BYTES <= free_bytes for cost in costs]
        if not any(fitting):
            message = f"the release needs {min(costs)} bytes beside {RESERVE_BYTES} in reserve; {free_bytes} are free"
            raise EbbflowError(Reason.DISK_FULL, message, needed_bytes=min(costs), free_bytes=free_bytes)
        return plan and replace(plan, steps=[step for step, fits in zip(plan.steps, fitting, strict=True) if fits])

    def _free_bytes(self, student_id: str, slot: Slot, found: Mapping[str, Path]) -> int:
        """Room on the disk once the slot is emptied of what does not belong there."""
        paths = [self._store.path(student_id, slot, what) for what in slot.files]
        freed = sum(path.stat().st_size for path in paths if path not in found.values() and path.exists())
        return shutil.disk_usage(self._store.home(student_id)).free + freed

    def _fetch(self, attempt: Attempt, slot: Slot, what: str, found: Mapping[str, Path]) -> None:
        student_id, file = attempt.wanted.student_id, slot.files[what]
        path = self._store.path(student_id, slot, what)
        if what == "manifest" and file.size_bytes > MAX_BYTES:
            raise EbbflowError(Reason.FILE_CORRUPT, f"the manifest is longer than {MAX_BYTES} bytes")
        if what not in found:
            attempt.downloader.download(file, path)
        elif found[what] != path:
            self._store.adopt(found[what], path)
