"""The pointer and its two slots, driven through every order of events."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.slots import FILE_NAMES, Slot, Slots, SlotStore


def slot(name: str, release: int, rollout: str = "rollouts/one") -> Slot:
    files = {what: SignedFile(f"{release:064x}", release) for what in FILE_NAMES}
    return Slot(name, release, "int8", rollout, files)


class Pointer(RuleBasedStateMachine):
    """Applies the transitions in any order that callers can produce, each through the disk."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.store = SlotStore(self.folder)
        self.committed: list[int] = []

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @property
    def slots(self) -> Slots:
        return self.store.read("faq")

    def write(self, slots: Slots) -> None:
        self.store.write("faq", slots)
        assert self.slots == slots

    @rule(release=st.integers(1, 5), rollout=st.sampled_from(["rollouts/one", "rollouts/two"]))
    def clear(self, release: int, rollout: str) -> None:
        self.write(self.slots.cleared(slot(self.slots.free, release, rollout)))
        assert self.slots.previous is None

    @rule(release=st.integers(1, 5))
    def stage(self, release: int) -> None:
        wanted = slot(self.slots.free, release)
        tries = self.slots.tries if self.slots.pending == wanted else 0
        self.write(self.slots.cleared(wanted).staged(wanted))
        assert self.slots.tries == tries

    @precondition(lambda self: self.slots.pending)
    @rule()
    def crash_while_trying(self) -> None:
        before = self.slots.tries
        self.write(self.slots.trying())
        assert self.slots.tries == before + 1

    @precondition(lambda self: self.slots.pending)
    @rule()
    def refuse(self) -> None:
        self.write(self.slots.dropped())
        assert self.slots.tries == 0

    @precondition(lambda self: self.slots.pending)
    @rule()
    def commit(self) -> None:
        pending, current = self.slots.pending, self.slots.current
        self.write(self.slots.committed())
        assert (self.slots.current, self.slots.previous) == (pending, current)

    @precondition(lambda self: self.slots.current)
    @rule()
    def start(self) -> None:
        self.write(self.slots.starting())
        assert self.slots.starts > 0
        self.write(self.slots.started())

    @precondition(lambda self: self.slots.previous)
    @rule()
    def fall_back(self) -> None:
        previous = self.slots.previous
        self.write(self.slots.fallen_back())
        assert self.slots.current == previous

    @invariant()
    def no_two_releases_share_a_slot(self) -> None:
        if not hasattr(self, "store"):
            return
        slots = self.slots
        others = [slot.name for slot in (slots.previous, slots.pending) if slot]
        assert len(others) <= 1
        assert slots.current is None or slots.current.name not in others
        assert slots.current is None or slots.free != slots.current.name
        assert all(name == slots.free for name in others)


Pointer.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPointer = Pointer.TestCase
