"""Taking the cheapest way to a release's weights: real artefacts, real deltas, and all that can be wrong with them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from delivery_world import World
from delta_line import Line, install, load, sha256_of, wanted

from ebbflow.api.v1 import artefact_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.delivery import stage
from ebbflow.edge.delivery.plan import Way

Deltas = list[artefact_pb2.Delta]


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


@pytest.fixture
def line(world: World) -> Line:
    """Releases 1 and 2 in every precision."""
    made = Line(world)
    made.publish(1)
    made.publish(2)
    return made


def home(world: World, name: str = "device") -> Path:
    return world.folder / name / "students" / "faq"


def weights(world: World, name: str = "device") -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in home(world, name).rglob("weights.safetensors")}


def full_bytes(world: World, number: int, precision: str) -> int:
    return world.student().targets[f"student/faq/{number}.{precision}.safetensors"].length


def others_bytes(world: World, number: int, *, tokenizer: bool = False) -> int:
    targets = world.student().targets
    kinds = ["manifest", *(["tokenizer"] if tokenizer else [])]
    return sum(targets[f"student/faq/{number}.{kind}.json"].length for kind in kinds)


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.5), ("int4", 0.25), ("bf16", 0.6)])
def test_the_next_release_comes_as_a_delta(world: World, line: Line, precision: str, share: float) -> None:
    install(world, 1, precision)
    before = world.faults.blob_bytes
    fetched = install(world, 2, precision).fetched_bytes
    assert fetched == world.faults.blob_bytes - before
    assert 0 < fetched - others_bytes(world, 2) < share * full_bytes(world, 2, precision)
    assert weights(world)["b"] == (world.folder / f"2.{precision}.safetensors").read_bytes()
    assert not list((home(world) / "partial").iterdir())


def test_another_precision_of_the_same_release_is_derived_without_a_byte(world: World, line: Line) -> None:
    install(world, 2, "int8")
    before = world.faults.blob_bytes
    installed = install(world, 2, "int4")
    assert (installed.fetched_bytes, world.faults.blob_bytes) == (0, before)
    assert not world.faults.questions
    assert (world.folder / "2.int4.safetensors").read_bytes() in weights(world).values()


def test_an_int4_delta_begins_from_what_the_int8_file_of_an_older_release_derives_into(
    world: World, line: Line
) -> None:
    install(world, 1, "int8")
    fetched = install(world, 2, "int4").fetched_bytes
    assert world.faults.questions == [[sha256_of(world, 1, "int4")]]
    assert fetched - others_bytes(world, 2) < 0.25 * full_bytes(world, 2, "int4")


def test_a_delta_may_begin_from_the_release_before_which_still_has_its_slot(world: World, line: Line) -> None:
    """2 is refused for int4 (the device went back to bf16), so that only the slot before holds an int4 file."""
    install(world, 1, "int4")
    install(world, 1, "bf16")
    line.publish(3)
    before = sha256_of(world, 1, "int4")
    fetched = install(world, 3, "int4").fetched_bytes
    assert world.faults.questions[-1] == [before]
    assert fetched - others_bytes(world, 3) < 0.3 * full_bytes(world, 3, "int4")
    assert world.device().installer.current("faq") is not None
    assert not list((home(world) / "partial").iterdir())


def test_a_base_that_was_taken_out_of_its_slot_survives_a_cut_and_a_restart(world: World, line: Line) -> None:
    install(world, 1, "int4")
    install(world, 1, "bf16")
    world.faults.cuts = [1 << 20, 1000, *[0] * 40]  # the manifest passes
    with pytest.raises(EbbflowError) as caught:
        install(world, 2, "int4")
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    assert [path.suffix for path in (home(world) / "partial").iterdir()].count(".base") == 1
    world.faults.cuts = []
    installed = install(world, 2, "int4")
    assert installed.fetched_bytes < 0.3 * full_bytes(world, 2, "int4")
    assert installed.resumed_bytes >= 1000
    assert not list((home(world) / "partial").iterdir())


def test_a_partial_delta_survives_a_restart_and_is_resumed(world: World, line: Line) -> None:
    install(world, 1, "int8")
    begin = world.faults.blob_bytes
    world.faults.cuts = [1 << 20, 40_000, *[0] * 40]
    with pytest.raises(EbbflowError):
        install(world, 2, "int8")
    world.faults.cuts = []
    offsets = len(world.faults.offsets)
    installed = install(world, 2, "int8")
    assert world.faults.offsets[offsets:][0] >= 40_000
    assert installed.resumed_bytes >= 40_000
    total = world.faults.blob_bytes - begin
    assert total < others_bytes(world, 2) + 0.5 * full_bytes(world, 2, "int8")


def spoiled(world: World, change: Callable[[bytes], bytes]) -> None:
    """The cloud stores spoiled deltas under the hashes that they have then."""

    def answer(deltas: Deltas) -> Deltas:
        for found in deltas:
            blob = world.blobs.put([change(b"".join(world.blobs.open(found.sha256.hex(), 0)))])
            found.sha256, found.size_bytes = bytes.fromhex(blob.sha256), blob.size_bytes
        return deltas

    world.faults.deltas = answer


def flipped(at: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        place = int(at * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]

    return change


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "junk": lambda data: bytes(range(256)) * (len(data) // 256),
    "head": flipped(0.0),
    "middle": flipped(0.5),
    "late": flipped(0.9),
    "longer": lambda data: data + b"x",
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoiled_delta_costs_its_bytes_and_nothing_else(
    world: World, line: Line, spoil: Callable[[bytes], bytes]
) -> None:
    install(world, 1, "int8")
    spoiled(world, spoil)
    device = world.device()
    before = world.faults.blob_bytes
    installed, _ = device.installer.install(wanted(2, "int8"), load)
    device.installer.commit(installed)
    assert weights(world)["b"] == (world.folder / "2.int8.safetensors").read_bytes()
    assert installed.fetched_bytes == world.faults.blob_bytes - before
    assert installed.fetched_bytes >= full_bytes(world, 2, "int8")
    assert device.installer.progress.failed_deltas == (0 if spoil(b"x" * 600) == b"" else 1)
    assert not list((home(world) / "partial").iterdir())


def test_a_delta_that_failed_is_not_fetched_again_after_a_cut(world: World, line: Line) -> None:
    install(world, 1, "int8")
    spoiled(world, SPOILS["middle"])
    device = world.device()
    spoilt = world.delta(sha256_of(world, 1, "int8"), sha256_of(world, 2, "int8"))
    assert spoilt
    world.faults.cuts = [1 << 20, 1 << 20, 50_000, *[0] * 40]  # manifest, delta, part of the full file
    with pytest.raises(EbbflowError):
        device.installer.install(wanted(2, "int8"), load)
    world.faults.cuts = []
    before = world.faults.blob_bytes
    device.installer.install(wanted(2, "int8"), load)
    assert world.faults.blob_bytes - before <= full_bytes(world, 2, "int8") - 50_000 + (1 << 14)


def offered(change: Callable[[artefact_pb2.Delta], None]) -> Callable[[Deltas], Deltas]:
    def answer(deltas: Deltas) -> Deltas:
        for found in deltas:
            change(found)
        return deltas

    return answer


def unknown_format(found: artefact_pb2.Delta) -> None:
    found.format = "ebbflow.delta/2"


def as_long_as_the_file(found: artefact_pb2.Delta) -> None:
    found.size_bytes = 1 << 40


def from_something_else(found: artefact_pb2.Delta) -> None:
    found.base_sha256 = b"\1" * 32


def of_no_length(found: artefact_pb2.Delta) -> None:
    found.size_bytes = 0


def without_a_name(found: artefact_pb2.Delta) -> None:
    found.sha256 = b"short"


@pytest.mark.parametrize(
    "change", [unknown_format, as_long_as_the_file, from_something_else, of_no_length, without_a_name]
)
def test_an_offer_that_is_of_no_use_is_not_taken(
    world: World, line: Line, change: Callable[[artefact_pb2.Delta], None]
) -> None:
    install(world, 1, "int8")
    world.faults.deltas = offered(change)
    before = world.faults.blob_bytes
    install(world, 2, "int8")
    fetched = world.faults.blob_bytes - before
    assert fetched == full_bytes(world, 2, "int8") + others_bytes(world, 2)


@pytest.mark.parametrize("reason", [Reason.INTERNAL, Reason.DEADLINE_EXCEEDED, Reason.QUOTA_EXHAUSTED])
def test_without_an_answer_the_full_file_comes_and_a_partial_delta_stays_for_the_next_time(
    world: World, line: Line, reason: Reason
) -> None:
    install(world, 1, "int8")
    world.faults.cuts = [1 << 20, 40_000, *[0] * 40]
    with pytest.raises(EbbflowError):
        install(world, 2, "int8")
    world.faults.no_deltas = EbbflowError(reason, "not now")
    world.faults.cuts = [20_000, *[0] * 40]
    with pytest.raises(EbbflowError):
        install(world, 2, "int8")
    world.faults.no_deltas, world.faults.cuts = None, []
    assert install(world, 2, "int8").resumed_bytes >= 40_000


def test_a_delta_that_is_gone_from_the_cloud_gives_way_to_the_full_file(world: World, line: Line) -> None:
    install(world, 1, "int8")
    world.faults.deltas = offered(lambda found: setattr(found, "sha256", b"\7" * 32))
    assert install(world, 2, "int8").fetched_bytes >= full_bytes(world, 2, "int8")


def test_a_damaged_base_gives_way_to_the_full_file(world: World, line: Line) -> None:
    install(world, 1, "int8")
    device = world.device()
    path = home(world) / "a" / "weights.safetensors"
    with path.open("r+b") as opened:
        opened.seek(path.stat().st_size // 2)
        opened.write(b"rust" * 8)
    installed, _ = device.installer.install(wanted(2, "int8"), load)
    device.installer.commit(installed)
    assert device.installer.progress.failed_deltas == 1
    assert weights(world)["b"] == (world.folder / "2.int8.safetensors").read_bytes()


def test_an_endless_delta_is_cut_off_at_its_own_length(world: World, line: Line) -> None:
    install(world, 1, "int8")
    target = sha256_of(world, 2, "int8")

    def endless(asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        yield from chunks
        while asked != target:
            yield b"x" * 50_000

    found = world.delta(sha256_of(world, 1, "int8"), target)
    assert found
    manifest = world.student().targets["student/faq/2.manifest.json"].hashes["sha256"]
    world.faults.answer = lambda asked, chunks: chunks if asked == manifest else endless(asked, chunks)
    fetched = install(world, 2, "int8").fetched_bytes
    assert fetched < full_bytes(world, 2, "int8") + others_bytes(world, 2) + found.size_bytes + 300_000


def test_a_delta_that_alone_cannot_be_read_gives_way_after_three_attempts(world: World, line: Line) -> None:
    install(world, 1, "int8")
    found = world.delta(sha256_of(world, 1, "int8"), sha256_of(world, 2, "int8"))
    assert found

    def silent(asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        if asked == found.sha256.hex():
            world.faults.released.wait(1.5)
        else:
            yield from chunks

    world.faults.answer = silent
    device = world.device(silence_s=0.6)
    for _ in range(2):
        with pytest.raises(EbbflowError) as caught:
            device.installer.install(wanted(2, "int8"), load)
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
    installed, _ = device.installer.install(wanted(2, "int8"), load)
    world.faults.released.set()
    assert installed.fetched_bytes >= full_bytes(world, 2, "int8")
    assert device.installer.progress.failed_deltas == 1


def test_room_for_the_full_file_alone_takes_the_full_file(
    world: World, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(world, 1, "int8")
    full = full_bytes(world, 2, "int8")
    others = others_bytes(world, 2)
    real = shutil.disk_usage(world.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(real.total, 0, stage.RESERVE_BYTES + full + others))
    assert install(world, 2, "int8").fetched_bytes == full + others
    line.publish(3)
    room = stage.RESERVE_BYTES + others_bytes(world, 3) - 1000  # beside the slot that will be emptied
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(real.total, 0, room))
    with pytest.raises(EbbflowError) as caught:
        install(world, 3, "int8")
    assert caught.value.reason is Reason.DISK_FULL


def test_progress_says_how_the_weights_come(world: World, line: Line) -> None:
    install(world, 1, "int8")
    device, seen = world.device(), []

    def watch(asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            progress = device.installer.progress
            seen.append((progress.student, progress.number, progress.way))
            yield chunk

    world.faults.answer = watch
    device.installer.install(wanted(2, "int8"), load)
    assert ("faq", 2, Way.DELTA) in seen
    assert device.installer.progress.student == ""
