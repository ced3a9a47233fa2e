"""What a blob store promises."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.blobs.base import CHUNK_BYTES
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.common.errors import EbbflowError, Reason


@given(chunks=st.lists(st.binary(max_size=2000), max_size=20), offset=st.integers(0, 3000))
def test_what_is_put_comes_back_from_any_offset(
    chunks: list[bytes], offset: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = LocalBlobStore(tmp_path_factory.mktemp("blobs"))
    data = b"".join(chunks)
    blob = store.put(chunks)
    assert blob.sha256 == hashlib.sha256(data).hexdigest()
    assert blob.size_bytes == len(data) == store.size(blob.sha256)
    assert store.read(blob.sha256) == data
    assert b"".join(store.open(blob.sha256, offset)) == data[offset:]


def test_putting_again_is_harmless(blobs: LocalBlobStore) -> None:
    assert blobs.put([b"a"]) == blobs.put([b"a"])


def test_chunks_stay_small(blobs: LocalBlobStore) -> None:
    blob = blobs.put([os.urandom(CHUNK_BYTES * 2 + 5)])
    assert [len(chunk) for chunk in blobs.open(blob.sha256)] == [CHUNK_BYTES, CHUNK_BYTES, 5]


@pytest.mark.parametrize("name", ["0" * 64, "", "../../etc/passwd", "A" * 64])
def test_an_unknown_name_is_named_before_the_first_chunk(blobs: LocalBlobStore, name: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        blobs.open(name)
    assert caught.value.reason is Reason.BLOB_NOT_FOUND


def test_a_damaged_blob_is_never_delivered_as_good(blobs: LocalBlobStore, tmp_path: Path) -> None:
    blob = blobs.put([b"weights" * 1000])
    path = blobs.folder / blob.sha256[:2] / blob.sha256
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for read in (lambda: blobs.read(blob.sha256), lambda: blobs.fetch(blob.sha256, tmp_path / "copy")):
        with pytest.raises(EbbflowError) as caught:
            read()
        assert caught.value.reason is Reason.FILE_CORRUPT
    assert not (tmp_path / "copy").exists()


def test_an_upload_that_breaks_off_leaves_nothing(blobs: LocalBlobStore) -> None:
    def broken() -> object:
        yield b"first"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        blobs.put(broken())  # type: ignore[arg-type]
    assert list(blobs.folder.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], check=True)
    try:
        store = LocalBlobStore(mount)
        small = store.put([b"kept"])
        with pytest.raises(EbbflowError) as caught:
            store.put([os.urandom(1024)] * 100)
        assert caught.value.reason is Reason.DISK_FULL
        assert store.read(small.sha256) == b"kept"
        assert [path for path in mount.iterdir() if path.name.startswith(".put")] == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)
