"""What a call has returned from is on the disk: power cuts right after it take nothing back."""

import random
from pathlib import Path

import pytest
from faults import powercut
from faults.disks import CUTS, act
from faults.machine import compile_shim

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.edge.delivery.slots import Slots, SlotStore

BLOB = "LocalBlobStore(Path('blobs')).put([b'some bytes'])"
IMPORTS = "from pathlib import Path\nfrom ebbflow.cloud.blobs.local import LocalBlobStore\n"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


def after_cuts(folder: Path, shim: Path, before: str, orders: str) -> list[Path]:
    """Carries orders out on many disks, cuts their power, and returns them."""
    folders = [folder / str(seed) for seed in range(CUTS)]
    assert act(folders, shim, orders, before=before) == [0] * CUTS
    for seed, disk in enumerate(folders):
        powercut.cut(disk / "files", disk / "journal", random.Random(seed))
    return [disk / "files" for disk in folders]


def test_a_stored_blob_stays(tmp_path: Path, shim: Path) -> None:
    stored = LocalBlobStore(tmp_path / "reference").put([b"some bytes"])
    for disk in after_cuts(tmp_path, shim, IMPORTS, BLOB):
        assert LocalBlobStore(disk / "blobs").read(stored.sha256) == b"some bytes"


def test_a_blob_in_a_folder_that_another_process_made_stays(tmp_path: Path, shim: Path) -> None:
    """One that died between making the folder and syncing its name."""
    sha256 = LocalBlobStore(tmp_path / "reference").put([b"some bytes"]).sha256
    before = f"os.makedirs('blobs/{sha256[:2]}')\n"
    for disk in after_cuts(tmp_path, shim, IMPORTS, before + BLOB):
        assert LocalBlobStore(disk / "blobs").has(sha256)


def test_a_pointer_that_was_written_stays(tmp_path: Path, shim: Path) -> None:
    before = "from pathlib import Path\nfrom ebbflow.edge.delivery.slots import Slots, SlotStore\n"
    orders = "store = SlotStore(Path('releases'))\nfor tries in range(4): store.write('faq', Slots(tries=tries))"
    for disk in after_cuts(tmp_path, shim, before, orders):
        assert SlotStore(disk / "releases").read("faq") == Slots(tries=3)


def test_files_that_a_process_left_in_a_slot_stay_once_the_slot_is_settled(tmp_path: Path, shim: Path) -> None:
    """One that died between moving a file into the slot and syncing the folder, or before it synced the file."""
    before = (
        "import os\nfrom pathlib import Path\nfrom ebbflow.edge.delivery.files import SignedFile\n"
        "from ebbflow.edge.delivery.slots import FILE_NAMES, Slot, SlotStore\n"
    )
    orders = (
        "store = SlotStore(Path('releases'))\n"
        "files = {what: SignedFile('0' * 64, 5) for what in FILE_NAMES}\n"
        "slot = Slot('b', 1, 'int8', 'rollouts/1', files)\n"
        "store.tidy('faq', slot, {})\n"
        "for what in FILE_NAMES:\n"
        "    path = store.path('faq', slot, what)\n"
        "    Path('made').write_bytes(b'whole')\n"
        "    os.replace('made', path)\n"
        "store.settle('faq', slot)\n"
        "store.write('faq', store.read('faq').staged(slot))\n"
    )
    for disk in after_cuts(tmp_path, shim, before, orders):
        store = SlotStore(disk / "releases")
        slot = store.read("faq").pending
        assert slot is not None
        assert {store.path("faq", slot, what).read_bytes() for what in slot.files} == {b"whole"}
