"""Moving bytes: resumed after any cut, patient with slow links, honest about why it failed."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from delivery_world import World
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import Updater

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.delivery.download import Downloader, Patience
from ebbflow.edge.delivery.fetcher import METADATA_URL, TARGETS_URL, ArtefactFetcher, ArtefactSource
from ebbflow.edge.delivery.files import SignedFile

SIZE = 2_000_000
GONE = [0] * 100
"""Cuts every call before its first byte, as often as gRPC itself tries again."""


def blob(world: World, size_bytes: int = SIZE) -> SignedFile:
    stored = world.blobs.put([bytes(range(256)) * (size_bytes // 256)])
    return SignedFile(stored.sha256, stored.size_bytes)


def downloader(world: World, source: ArtefactSource | None = None) -> Downloader:
    patience = Patience(attempts=3, first_wait_s=0.02)
    return Downloader(source or world.device().source, world.folder / "partial", patience)


def whole(path: Path, file: SignedFile) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_many_cuts_cost_no_byte_twice(world: World) -> None:
    file, path = blob(world), world.folder / "file"
    world.faults.cuts = [100_000, 1, 300_000, 50_000, 500_000]
    fetching = downloader(world)
    fetching.download(file, path)
    assert whole(path, file)
    assert fetching.fetched_bytes == file.size_bytes
    assert world.faults.blob_bytes <= file.size_bytes + 6 * (1 << 14)
    assert not list((world.folder / "partial").iterdir())


def test_a_server_that_falls_silent_again_and_again_only_delays(world: World) -> None:
    file, path = blob(world, 200_000), world.folder / "file"
    world.faults.stall_after = 60_000
    downloader(world, world.device(silence_s=0.2).source).download(file, path)
    world.faults.released.set()
    assert whole(path, file)


def test_a_server_that_is_restarted_half_way_only_delays(world: World) -> None:
    file, path = blob(world), world.folder / "file"
    source = world.device().source
    waits = iter([True])

    def restart_once(_: float) -> None:
        if next(waits, False):
            world.stop()
            world.restart()
        time.sleep(0.2)

    world.faults.cuts = [500_000, 0]
    Downloader(source, world.folder / "partial", Patience(attempts=20, first_wait_s=0.1), restart_once).download(
        file, path
    )
    assert whole(path, file)
    assert max(world.faults.offsets) >= 500_000


def test_a_device_that_is_restarted_half_way_goes_on_where_it_was(world: World) -> None:
    file, path = blob(world), world.folder / "file"
    world.faults.cuts = [700_000, *GONE]
    with pytest.raises(EbbflowError) as caught:
        downloader(world).download(file, path)
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    world.faults.cuts = []
    assert not path.exists()
    fetching = downloader(world)
    assert fetching.missing_bytes(file) < SIZE - 690_000
    fetching.download(file, path)
    assert whole(path, file)
    assert fetching.fetched_bytes < SIZE - 690_000


def test_an_installation_over_a_server_that_goes_away_leaves_the_old_release_and_resumes(world: World) -> None:
    world.publish(1)
    world.device().install(1)
    world.publish(2, padding_bytes=SIZE)
    world.faults.cuts = [1 << 20, 900_000, *GONE]  # the manifest passes, and the tokenizer is that of release 1
    with pytest.raises(EbbflowError) as caught:
        world.device().install(2)
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    assert int(caught.value.metadata["fetched_bytes"]) > 800_000
    world.faults.cuts = []
    assert world.device().serving() == 1
    assert world.device().install(2).fetched_bytes < SIZE - 800_000
    assert world.device().serving() == 2


def test_what_was_damaged_on_the_device_is_fetched_anew(world: World) -> None:
    file, path = blob(world), world.folder / "file"
    (world.folder / "partial").mkdir()
    for junk in (b"\0" * 1000, b"\0" * (SIZE + 5000)):
        (world.folder / "partial" / file.sha256).write_bytes(junk)
        downloader(world).download(file, path)
        assert whole(path, file)


def test_partial_files_of_other_releases_are_deleted(world: World) -> None:
    file, other = blob(world), blob(world, 1024)
    (world.folder / "partial").mkdir()
    for kept in (file, other):
        (world.folder / "partial" / kept.sha256).write_bytes(b"x")
    downloader(world).keep_only([file])
    assert [path.name for path in (world.folder / "partial").iterdir()] == [file.sha256]


def test_a_slow_link_is_never_given_up(world: World) -> None:
    """The whole takes five times as long as a silence may."""
    file, path = blob(world, 400_000), world.folder / "file"

    def answer(_asked: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            for begin in range(0, len(chunk), 10_000):
                time.sleep(0.05)
                yield chunk[begin : begin + 10_000]

    world.faults.answer = answer
    fetching = downloader(world, world.device(silence_s=0.4).source)
    begin = time.monotonic()
    fetching.download(file, path)
    assert time.monotonic() - begin > 5 * 0.4
    assert whole(path, file)
    assert world.faults.offsets == [0]


def test_a_slow_disk_is_not_taken_for_a_slow_server(world: World) -> None:
    file = blob(world, 400_000)
    source = world.device(silence_s=0.2).source
    pieces: list[bytes] = []
    for chunk in source.blob(file.sha256):
        time.sleep(0.3 if len(pieces) < 3 else 0)
        pieces.append(bytes(chunk))
    assert hashlib.sha256(b"".join(pieces)).hexdigest() == file.sha256


def test_an_unknown_blob_is_said_at_once(world: World) -> None:
    with pytest.raises(EbbflowError) as caught:
        downloader(world).download(SignedFile("e" * 64, 10), world.folder / "file")
    assert caught.value.reason is Reason.BLOB_NOT_FOUND
    assert len(world.faults.offsets) == 1


def test_a_blob_that_is_damaged_in_the_cloud_is_not_kept(world: World) -> None:
    file = blob(world)
    path = next(path for path in (world.folder.parent / "blobs").rglob(file.sha256))
    with path.open("r+b") as opened:
        opened.write(b"rust")
    with pytest.raises(EbbflowError) as caught:
        downloader(world).download(file, world.folder / "file")
    assert caught.value.reason in {Reason.ARTEFACT_UNTRUSTED, Reason.FILE_CORRUPT}
    assert not list((world.folder / "partial").iterdir())


def test_a_server_that_is_not_there_is_named(world: World) -> None:
    world.publish(1)
    device = world.device()
    world.stop()
    with pytest.raises(EbbflowError) as caught:
        device.install(1)
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE


def test_a_refusal_arrives_as_it_was_raised(world: World) -> None:
    world.faults.refuse = EbbflowError(Reason.CERTIFICATE_REVOKED, "shut out", agent="agents/kiosk-1")
    with pytest.raises(EbbflowError, match="shut out") as caught:
        world.device().trust.refresh()
    assert caught.value.reason is Reason.CERTIFICATE_REVOKED
    assert caught.value.metadata == {"agent": "agents/kiosk-1"}


def test_another_channel_takes_over(world: World) -> None:
    file = blob(world)
    device = world.device()
    device.channel.close()
    other = world.device("other")
    device.source.use(other.channel)
    downloader(world, device.source).download(file, world.folder / "file")


def test_a_plain_channel_does_as_well(world: World) -> None:
    endpoint = world.endpoint()
    with grpc.secure_channel(endpoint.address, endpoint.credentials()) as channel:
        source = ArtefactSource(channel, silence_s=0.3)
        assert b"".join(source.metadata("1.root.json")) == world.root
        with pytest.raises(EbbflowError) as caught:
            list(source.metadata("2.root.json"))
        assert caught.value.reason is Reason.METADATA_NOT_FOUND
        world.faults.stall_after = 0
        with pytest.raises(EbbflowError) as caught:
            list(source.blob(blob(world).sha256))
        assert caught.value.reason is Reason.DEADLINE_EXCEEDED
        world.faults.released.set()


def test_any_tuf_client_can_update_through_the_fetcher(world: World) -> None:
    world.publish(1)
    folder = world.folder / "plain"
    (folder / "targets").mkdir(parents=True)
    fetcher = ArtefactFetcher(world.device().source)
    updater = Updater(str(folder), METADATA_URL, str(folder / "targets"), TARGETS_URL, fetcher, bootstrap=world.root)
    info = updater.get_targetinfo("student/faq/1.int8.safetensors")
    assert info
    path = Path(updater.download_target(info))
    assert path.stat().st_size == info.length


def test_the_fetcher_speaks_tufs_words(world: World) -> None:
    fetcher = ArtefactFetcher(world.device(silence_s=0.2).source)
    with pytest.raises(DownloadHTTPError) as caught:
        fetcher.fetch(METADATA_URL + "2.root.json")
    assert caught.value.status_code == 404
    file = blob(world)
    world.faults.stall_after = 1 << 15
    with pytest.raises(SlowRetrievalError):
        list(fetcher.fetch(f"{TARGETS_URL}student/faq/{file.sha256}.1.int8.safetensors"))
    world.faults.released.set()
    world.faults.stall_after, world.faults.cuts = None, [1 << 15]
    with pytest.raises(DownloadError):
        list(fetcher.fetch(f"{TARGETS_URL}student/faq/{file.sha256}.1.int8.safetensors"))
