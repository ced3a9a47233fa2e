"""Installing a release: what is verified, what stays when it fails, and what is said."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
from delivery_device import desired, load_bigram
from delivery_world import World, a_manifest, weights_of

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.manifest import Manifest, ManifestVariant
from ebbflow.edge.delivery import slots, stage
from ebbflow.edge.engine.base import Engine


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def refused(world: World, number: int, **options: str) -> EbbflowError:
    """Tries to install on the usual device, and returns why that failed."""
    with pytest.raises(EbbflowError) as caught:
        world.device().install(number, **options)
    return caught.value


def test_a_release_is_fetched_probed_committed_and_survives_a_restart(world: World) -> None:
    world.publish(1)
    device = world.device()
    installed = device.install(1)
    assert (installed.student, installed.number, installed.precision) == ("faq", 1, "int8")
    assert installed.fetched_bytes > 300_000
    assert installed.probe_loss == pytest.approx(2.7726, abs=1e-3)
    assert installed.tokenizer_path.read_bytes() == b'{"tokenizer": 1}'
    world.stop()
    again = world.device()
    assert again.serving() == 1
    current = again.installer.current("faq")
    assert current
    assert current.manifest == installed.manifest


def test_the_next_release_takes_the_other_slot_and_fetches_no_file_twice(world: World) -> None:
    world.publish(1)
    first = world.device().install(1)
    world.publish(2)
    second = world.device().install(2)
    assert first.weights_path.exists()
    assert first.weights_path != second.weights_path
    assert world.device().serving() == 2
    before = world.faults.blob_bytes
    back = world.device().install(1)  # a rollback: its files are still in their slot
    assert (back.fetched_bytes, world.faults.blob_bytes) == (0, before)
    assert world.device().serving() == 1


def test_what_serves_already_is_not_fetched_again(world: World) -> None:
    world.publish(1)
    world.device().install(1)
    before = world.faults.blob_bytes
    assert world.device().install(1, rollout="rollouts/two").fetched_bytes == 0
    assert world.faults.blob_bytes == before


def test_only_two_slots_are_kept(world: World) -> None:
    for number in (1, 2, 3):
        world.publish(number)
        world.device().install(number)
    files = list((world.folder / "device" / "students" / "faq").rglob("weights.safetensors"))
    assert len(files) == 2
    assert not list((world.folder / "device" / "students" / "faq" / "partial").iterdir())


def test_an_installed_release_that_is_not_committed_does_not_serve(world: World) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2)
    device = world.device()
    installed, _ = device.installer.install(desired(2), load_bigram)
    assert world.device().serving() == 1
    device.installer.discard(installed)
    with pytest.raises(EbbflowError) as caught:
        device.installer.commit(installed)
    assert caught.value.reason is Reason.STATE_CONFLICT
    assert world.device().serving() == 1


def test_committing_twice_is_the_same_as_once(world: World) -> None:
    world.publish(1)
    device = world.device()
    device.installer.commit(device.install(1))
    assert device.serving() == 1


def test_a_failed_probe_keeps_the_old_release_and_gives_the_numbers(world: World) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2, manifest=lambda size: a_manifest(2, "faq", size, probe_loss=1.0))
    error = refused(world, 2)
    assert error.reason is Reason.PROBE_FAILED
    assert float(error.metadata["probe_loss"]) == pytest.approx(2.7726, abs=1e-3)
    assert (error.metadata["expected_loss"], error.metadata["tolerance"]) == ("1.0", "0.01")
    assert int(error.metadata["fetched_bytes"]) > 300_000
    assert world.device().serving() == 1
    assert refused(world, 2).metadata["fetched_bytes"] == "0"  # a second look costs no bytes


def nan_weights(files: dict[str, bytes]) -> None:
    size_bytes = len(files["int8"])
    files["int8"] = weights_of(2, 300_000, logit=float("nan"))
    assert len(files["int8"]) == size_bytes


def no_weights(files: dict[str, bytes]) -> None:
    files["int8"] = b"\0" * len(files["int8"])


@pytest.mark.parametrize("spoil", [nan_weights, no_weights])
def test_signed_weights_that_do_not_compute(world: World, spoil: Callable[[dict[str, bytes]], None]) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2, change=spoil)
    assert refused(world, 2).reason is Reason.PROBE_FAILED
    assert world.device().serving() == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda size: a_manifest(1, "faq", size),
        lambda size: a_manifest(2, "other", size),
        lambda size: a_manifest(2, "faq", size + 1),
        lambda size: Manifest("faq", 2, {}, {"int4": int4(size)}, a_manifest(2, "faq", size).probe),
    ],
    ids=["another release", "another student", "another length", "another precision"],
)
def test_a_manifest_that_speaks_of_something_else_is_refused_before_the_weights_are_fetched(
    world: World, wrong: Callable[[int], Manifest]
) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2, manifest=wrong)
    error = refused(world, 2)
    assert error.reason is Reason.ARTEFACT_UNTRUSTED
    assert int(error.metadata["fetched_bytes"]) < 10_000
    assert world.device().serving() == 1


def int4(size_bytes: int) -> ManifestVariant:
    return ManifestVariant("student/faq/2.int4.safetensors", size_bytes, 1.0)


def test_a_manifest_that_is_none_is_refused(world: World) -> None:
    world.publish(1, change=lambda files: files.update(manifest=b"{}"))
    assert refused(world, 1).reason is Reason.FILE_CORRUPT
    assert world.device().serving() is None


def test_a_release_that_was_never_signed_is_refused(world: World) -> None:
    world.publish(1)
    world.device().install(1)
    world.pack(2)
    error = refused(world, 2)
    assert error.reason is Reason.ARTEFACT_UNTRUSTED
    assert world.device().serving() == 1


def test_a_release_below_min_release_is_refused_and_another_student_is_not_concerned(world: World) -> None:
    world.publish(2)
    world.publish(1, "other")
    assert refused(world, 1).reason is Reason.RELEASE_TOO_OLD
    world.device().install(1, "other")


@pytest.mark.parametrize(
    ("student", "release"),
    [
        ("faq", "students/faq/releases/1"),
        ("students/faq", "students/other/releases/1"),
        ("students/../x", "students/../x"),
    ],
)
def test_names_that_do_not_fit_are_refused(world: World, student: str, release: str) -> None:
    assignment = desired(1)
    assignment.student, assignment.release = student, release
    with pytest.raises(EbbflowError) as caught:
        world.device().installer.install(assignment, load_bigram)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_too_little_space_is_said_before_the_first_byte(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2)
    real = shutil.disk_usage(world.folder)
    little = Usage(real.total, real.used, stage.RESERVE_BYTES + 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    before = world.faults.blob_bytes
    error = refused(world, 2)
    assert error.reason is Reason.DISK_FULL
    assert int(error.metadata["needed_bytes"]) > 300_000
    assert world.faults.blob_bytes == before
    assert world.device().serving() == 1


def test_a_disk_that_fills_up_on_the_way_keeps_the_old_release(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2)
    device = world.device()

    def full(_: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", full)
        with pytest.raises(EbbflowError) as caught:
            device.install(2)
    assert caught.value.reason is Reason.DISK_FULL
    assert world.device().serving() == 1
    world.device().install(2)


def test_no_memory_for_the_new_release_keeps_the_old_one(world: World) -> None:
    def exhausted(_: Path) -> Engine:
        raise MemoryError

    world.publish(1)
    world.device().install(1)
    world.publish(2)
    with pytest.raises(EbbflowError) as caught:
        world.device().installer.install(desired(2), exhausted)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert world.device().serving() == 1


def weights(world: World, slot: str) -> Path:
    return world.folder / "device" / "students" / "faq" / slot / "weights.safetensors"


def test_a_damaged_file_is_noticed_at_the_start_and_the_release_before_serves(world: World) -> None:
    for number in (1, 2):
        world.publish(number)
        world.device().install(number)
    with weights(world, "b").open("r+b") as file:
        file.seek(1000)
        file.write(b"rust")
    assert world.device().serving() == 1
    world.device().install(2)
    assert world.device().serving() == 2


def test_a_torn_file_of_an_only_release_is_never_served_and_heals(world: World) -> None:
    world.publish(1)
    world.device().install(1)
    os.truncate(weights(world, "a"), 1000)
    with pytest.raises(EbbflowError) as caught:
        world.device().serving()
    assert caught.value.reason is Reason.FILE_CORRUPT
    world.device().install(1)
    assert world.device().serving() == 1


def test_a_release_that_ends_the_process_when_loaded_gives_way_after_three_starts(world: World) -> None:
    for number in (1, 2):
        world.publish(number)
        world.device().install(number)

    class Crash(BaseException):
        pass

    def crash(_: Path) -> Engine:
        raise Crash

    for _ in range(slots.MAX_TRIES):
        with pytest.raises(Crash):
            world.device().installer.start("faq", crash)
    assert world.device().serving() == 1


def test_a_release_that_ends_the_process_when_tried_is_given_up_until_another_rollout(world: World) -> None:
    class Crash(BaseException):
        pass

    def crash(_: Path) -> Engine:
        raise Crash

    world.publish(1)
    world.device().install(1)
    world.publish(2)
    for _ in range(slots.MAX_TRIES):
        with pytest.raises(Crash):
            world.device().installer.install(desired(2), crash)
        assert world.device().serving() == 1
    assert refused(world, 2).reason is Reason.PROBE_FAILED
    world.device().install(2, rollout="rollouts/two")
    assert world.device().serving() == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\0" * 100])
def test_a_damaged_pointer_reads_as_empty_and_heals_without_fetching(world: World, content: bytes) -> None:
    world.publish(1)
    world.device().install(1)
    (world.folder / "device" / "students" / "faq" / "slots.json").write_bytes(content)
    assert world.device().serving() is None
    assert world.device().install(1).fetched_bytes == 0
    assert world.device().serving() == 1


def test_students_that_are_no_longer_wanted_are_deleted(world: World) -> None:
    world.publish(1)
    world.publish(1, "other")
    device = world.device()
    device.install(1)
    device.install(1, "other")
    assert device.installer.students() == ["faq", "other"]
    assert device.installer.retain({"other"}) == ["faq"]
    assert not (world.folder / "device" / "students" / "faq").exists()
    assert device.serving() is None
    assert device.serving("other") == 1


def two_installed(world: World) -> None:
    for number in (1, 2):
        world.publish(number)
        world.device().install(number)


def revoke(world: World, number: int, min_release: int | None = None) -> None:
    """Serves a list without a release, or with a higher lowest one, and lets the device see it."""
    student = world.student()
    if min_release:
        student.unrecognized_fields[roles.MIN_RELEASE] = {"faq": min_release}
    else:
        for path in [path for path in student.targets if path.startswith(f"student/faq/{number}.")]:
            del student.targets[path]
    student.version += 1
    world.forge(student, "distiller", "gate")
    world.device().trust.refresh()


class CrashError(BaseException):
    """The end of the process."""


def crash(_: Path) -> Engine:
    raise CrashError


def crash_at_starts(world: World, times: int) -> None:
    for _ in range(times):
        with pytest.raises(CrashError):
            world.device().installer.start("faq", crash)


@pytest.mark.parametrize("min_release", [None, 2])
def test_a_revoked_release_takes_the_place_of_one_that_crashes_only_when_all_hope_is_gone(
    world: World, min_release: int | None
) -> None:
    two_installed(world)
    revoke(world, 1, min_release)
    crash_at_starts(world, slots.MAX_TRIES)
    assert world.device().serving() == 2
    crash_at_starts(world, 2 * slots.MAX_TRIES)
    assert world.device().serving() == 1  # serving itself never stops because of metadata


def test_a_release_that_may_return_takes_the_place_of_one_that_crashes_at_once(world: World) -> None:
    two_installed(world)
    world.device().trust.refresh()
    crash_at_starts(world, slots.MAX_TRIES)
    assert world.device().serving() == 1


def test_a_revoked_release_that_serves_goes_on_serving_over_a_restart(world: World) -> None:
    two_installed(world)
    revoke(world, 2)
    assert world.device().serving() == 2
    assert refused(world, 2).reason is Reason.ARTEFACT_UNTRUSTED
    assert world.device().serving() == 2


def test_a_damaged_release_gives_way_to_a_revoked_one_rather_than_to_nothing(world: World) -> None:
    two_installed(world)
    revoke(world, 1)
    os.truncate(weights(world, "b"), 1000)
    assert world.device().serving() == 1


def test_when_nothing_loads_the_pointer_stays_as_it_was(world: World) -> None:
    two_installed(world)

    def exhausted(_: Path) -> Engine:
        raise MemoryError

    pointer = world.folder / "device" / "students" / "faq" / "slots.json"
    before = pointer.read_bytes()
    with pytest.raises(EbbflowError) as caught:
        world.device().installer.start("faq", exhausted)
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert pointer.read_bytes() == before
    assert world.device().serving() == 2
