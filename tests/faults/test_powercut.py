"""The simulated disk: what was synced stays, what was not may be lost in part, and nothing else changes."""

import errno
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import powercut
from faults.disks import CUTS, act
from faults.machine import compile_shim
from faults.powercut import Kind

WRITE = "fd = os.open({0!r}, os.O_WRONLY | os.O_CREAT); os.write(fd, {1!r}); {2}; os.close(fd)\n"
SYNC_FOLDER = "fd = os.open('.', os.O_RDONLY | os.O_DIRECTORY); os.fsync(fd); os.close(fd)\n"

Content = frozenset[tuple[str, bytes]]
Act = Callable[..., set[Content]]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_shim(tmp_path_factory.mktemp("shim"))


def content_of(files: Path) -> Content:
    return frozenset((str(path.relative_to(files)), path.read_bytes()) for path in files.rglob("*") if path.is_file())


@pytest.fixture
def after_cuts(tmp_path: Path, shim: Path) -> Act:
    """Carries the same orders out on many disks, and returns what power cuts leave of them."""

    def run(orders: str, **control: int) -> set[Content]:
        folders = [tmp_path / str(seed) for seed in range(CUTS)]
        assert act(folders, shim, orders, control) == [0] * CUTS
        for seed, folder in enumerate(folders):
            powercut.cut(folder / "files", folder / "journal", random.Random(seed))
        return {content_of(folder / "files") for folder in folders}

    return run


def test_what_was_synced_stays(after_cuts: Act) -> None:
    assert after_cuts(WRITE.format("a", b"whole", "os.fsync(fd)")) == {frozenset({("a", b"whole")})}


def test_what_was_never_synced_may_be_gone_or_torn(after_cuts: Act) -> None:
    found = after_cuts(WRITE.format("a", b"x" * 4096, "0"))
    assert frozenset() in found
    assert frozenset({("a", b"x" * 4096)}) in found
    assert any(0 < len(dict(content).get("a", b"")) < 4096 for content in found)


def test_a_rename_without_a_sync_of_its_folder_may_be_lost_with_the_old_file_in_its_place(after_cuts: Act) -> None:
    orders = WRITE.format("a", b"old", "os.fsync(fd)") + WRITE.format("b", b"new", "os.fsync(fd)") + SYNC_FOLDER
    lost, kept = frozenset({("a", b"old"), ("b", b"new")}), frozenset({("a", b"new")})
    assert after_cuts(orders + "os.rename('b', 'a')") == {lost, kept}


def test_a_rename_that_was_synced_stays(after_cuts: Act) -> None:
    orders = WRITE.format("a", b"old", "os.fsync(fd)") + WRITE.format("b", b"new", "os.fsync(fd)")
    assert after_cuts(orders + "os.rename('b', 'a')\n" + SYNC_FOLDER) == {frozenset({("a", b"new")})}


def test_overwritten_bytes_may_come_back(after_cuts: Act) -> None:
    orders = WRITE.format("a", b"old", "os.fsync(fd)") + WRITE.format("a", b"new", "0")
    assert after_cuts(orders) == {frozenset({("a", b"old")}), frozenset({("a", b"new")})}


def test_a_deleted_file_may_come_back(after_cuts: Act) -> None:
    orders = WRITE.format("a", b"old", "os.fsync(fd)") + "os.unlink('a')"
    assert after_cuts(orders) == {frozenset(), frozenset({("a", b"old")})}


def test_a_sync_after_a_failed_one_saves_nothing_of_what_was_given_up(after_cuts: Act) -> None:
    syncs = "\ntry: os.fsync(fd)\nexcept OSError: os.fsync(fd)\n"
    orders = "fd = os.open('a', os.O_WRONLY | os.O_CREAT); os.write(fd, b'whole')" + syncs
    found = after_cuts(orders, kinds=1 << Kind.SYNC, times=1, errno=5)
    assert frozenset({("a", b"whole")}) in found
    assert frozenset({("a", b"")}) in found


def test_a_process_ends_before_the_operation_that_was_chosen(tmp_path: Path, shim: Path) -> None:
    orders = "".join(WRITE.format(name, b"x", "0") for name in "abc")
    for operation in range(1, 7):
        folder = tmp_path / str(operation)
        assert act([folder], shim, orders, {"kill_at": operation}) == [-signal.SIGKILL]
        done = dict(content_of(folder / "files"))
        assert (len(done), sum(map(len, done.values()))) == (operation // 2, (operation - 1) // 2)
        assert len(list(powercut.read(folder / "journal"))) >= operation - 1
    assert act([tmp_path / "whole"], shim, orders, {"kill_at": 7}) == [0]


def test_a_full_disk_takes_what_fits(tmp_path: Path, shim: Path) -> None:
    orders = "fd = os.open('a', os.O_WRONLY | os.O_CREAT); assert os.write(fd, b'x' * 100) == 60\n"
    orders += "try: os.write(fd, b'y')\nexcept OSError as error: os._exit(error.errno)"
    assert act([tmp_path / "disk"], shim, orders, {"space": 60}) == [errno.ENOSPC]
    assert content_of(tmp_path / "disk" / "files") == {("a", b"x" * 60)}


def test_the_clock_is_off_by_what_was_asked(tmp_path: Path, shim: Path) -> None:
    year_s = 365 * 86_400
    orders = WRITE.format("a", b"", "os.write(fd, str(int(__import__('time').time())).encode())")
    act([tmp_path / "disk"], shim, orders, {"clock": -year_s * 10**9})
    assert abs(int(dict(content_of(tmp_path / "disk" / "files"))["a"]) + year_s - time.time()) < 60
