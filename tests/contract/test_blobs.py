"""What every blob store promises."""

import datetime as dt
import hashlib
import os
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto import settings as settings_of_moto
from moto.server import ThreadedMotoServer

from ebbflow.cloud.blobs.base import CHUNK_BYTES, BlobStore, PromptReader
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.blobs.s3 import S3BlobStore
from ebbflow.cloud.release.packing import pack_weights
from ebbflow.common.codes.artefact import read_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    if request.param == "local":
        return LocalBlobStore(tmp_path / "blobs")
    made: BlobStore = request.getfixturevalue("store_of")("ebbflow/")
    return made


@pytest.fixture
def store_of(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], S3BlobStore]:
    """Makes stores in an empty bucket."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = uuid.uuid4().hex
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket=bucket)
    return lambda prefix: S3BlobStore(bucket, prefix, s3_endpoint)


def damage(store: BlobStore, sha256: str, data: bytes) -> None:
    if isinstance(store, LocalBlobStore):
        (store.folder / sha256[:2] / sha256).write_bytes(data)
    elif isinstance(store, S3BlobStore):
        store._client.put_object(Bucket=store.bucket, Key=store._key(sha256), Body=data)


@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(chunks=st.lists(st.binary(max_size=2000), max_size=20), offset=st.integers(0, 3000))
def test_what_is_put_comes_back_from_any_offset(chunks: list[bytes], offset: int, store: BlobStore) -> None:
    data = b"".join(chunks)
    blob = store.put(chunks)
    assert blob.sha256 == hashlib.sha256(data).hexdigest()
    assert blob.size_bytes == len(data) == store.size(blob.sha256)
    assert store.read(blob.sha256) == data
    assert b"".join(store.open(blob.sha256, offset)) == data[offset:]
    with closing(store.reader(blob.sha256, offset)) as reader:
        assert b"".join(iter(lambda: reader.read(777), b"")) == data[offset:]


@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(data=st.binary(max_size=5000), offset=st.integers(0, 6000), turns=st.lists(st.booleans(), max_size=20))
def test_a_reader_may_change_between_waiting_and_not(
    data: bytes, offset: int, turns: list[bool], store: BlobStore
) -> None:
    blob = store.put([data])
    came = b""
    with closing(store.reader(blob.sha256, min(offset, len(data)))) as reader:
        for prompt in turns:
            if prompt and isinstance(reader, PromptReader):
                came += reader.read_at_once(333) or b""
            else:
                came += reader.read(444)
        came += b"".join(iter(lambda: reader.read(555), b""))
    assert came == data[min(offset, len(data)) :]


def test_putting_again_is_harmless(store: BlobStore) -> None:
    assert store.put([b"a"]) == store.put([b"a"])


def test_what_is_deleted_is_gone_and_the_rest_stays(store: BlobStore) -> None:
    gone, kept = store.put([b"gone"]), store.put([b"kept"])
    for _ in range(2):
        store.delete(gone.sha256)
    store.delete("../../elsewhere")
    assert (store.has(gone.sha256), store.read(kept.sha256)) == (False, b"kept")


def begin_upload(store: BlobStore) -> Callable[[], bool]:
    """Leaves a part of a file as a process that is killed does; returns how to see whether it is still there."""
    if isinstance(store, LocalBlobStore):
        descriptor, name = tempfile.mkstemp(dir=store.folder, prefix=".put.")
        os.write(descriptor, b"secret")
        os.close(descriptor)
        return Path(name).exists
    assert isinstance(store, S3BlobStore)
    client, bucket, key = store._client, store.bucket, store._key("ab" * 32)
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"secret")
    return lambda: bool(client.list_multipart_uploads(Bucket=bucket).get("Uploads"))


def test_what_a_killed_upload_left_is_swept_and_one_that_runs_is_not(store: BlobStore) -> None:
    kept = store.put([b"kept"])
    is_there = begin_upload(store)
    store.sweep(dt.datetime(2010, 1, 1, tzinfo=dt.UTC))  # moto says of every upload that it began later in that year
    assert is_there()
    for _ in range(2):
        store.sweep(dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
        assert (is_there(), store.read(kept.sha256)) == (False, b"kept")


@pytest.mark.parametrize("prefix", ["", "ebbflow/", "a.b"])
def test_uploads_of_other_applications_in_the_bucket_are_left_alone(
    store_of: Callable[[str], S3BlobStore], prefix: str
) -> None:
    store = store_of(prefix)
    client, bucket, own = store._client, store.bucket, store._key("ab" * 32)
    others = {
        "backups/database.tar",
        f"{prefix}backup",
        f"{prefix}{'ab' * 32}",
        f"{prefix}cd/{'ab' * 32}",
        f"{prefix}AB/{'AB' * 32}",
        f"{prefix}more/ab/{'ab' * 32}",
        f"{own}.old",
    }
    for key in (*others, own):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    store.sweep(dt.datetime.now(dt.UTC) + dt.timedelta(hours=1))
    left = client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert {upload["Key"] for upload in left} == others


def test_a_bucket_that_hides_its_uploads_is_told_of_once(
    store_of: Callable[[str], S3BlobStore], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of("")
    monkeypatch.setattr(settings_of_moto, "INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from here on it knows nobody
    for _ in range(2):
        store.sweep(dt.datetime.now(dt.UTC))
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("ebbflow")]
    assert "s3:ListBucketMultipartUploads" in message


def test_a_file_and_its_chunks_are_one_blob(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1000))
    assert store.put_file(path) == store.put([path.read_bytes()])


def test_chunks_stay_small(store: BlobStore) -> None:
    blob = store.put([os.urandom(CHUNK_BYTES * 2 + 5)])
    sizes = [len(chunk) for chunk in store.open(blob.sha256)]
    assert sum(sizes) == CHUNK_BYTES * 2 + 5
    assert max(sizes) <= CHUNK_BYTES


@pytest.mark.parametrize("name", ["0" * 64, "", "../../etc/passwd", "A" * 64])
def test_an_unknown_name_is_named_before_the_first_chunk(store: BlobStore, name: str) -> None:
    assert not store.has(name)
    for opening in (store.open, store.reader):
        with pytest.raises(EbbflowError) as caught:
            opening(name)
        assert caught.value.reason is Reason.BLOB_NOT_FOUND


def test_a_lent_file_is_whole_and_nothing_of_it_stays(store: BlobStore, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    blob = store.put([b"weights" * 1000])
    with store.lend(blob.sha256, scratch) as path:
        assert path.read_bytes() == b"weights" * 1000
    assert list(scratch.iterdir()) == []
    assert store.has(blob.sha256)
    damage(store, blob.sha256, b"weights" * 999 + b"Weights")
    with pytest.raises(EbbflowError) as caught, store.lend(blob.sha256, scratch):
        pass
    assert caught.value.reason is Reason.FILE_CORRUPT
    assert list(scratch.iterdir()) == []


def test_a_reader_passes_on_what_is_there(store: BlobStore) -> None:
    blob = store.put([b"weights"])
    damage(store, blob.sha256, b"weighty")
    with closing(store.reader(blob.sha256)) as reader:
        assert reader.read(100) == b"weighty"


def test_a_damaged_blob_is_never_delivered_as_good(store: BlobStore, tmp_path: Path) -> None:
    blob = store.put([b"weights" * 1000])
    damage(store, blob.sha256, b"weights" * 999 + b"Weights")
    for read in (lambda: store.read(blob.sha256), lambda: store.fetch(blob.sha256, tmp_path / "copy")):
        with pytest.raises(EbbflowError) as caught:
            read()
        assert caught.value.reason is Reason.FILE_CORRUPT
    assert not (tmp_path / "copy").exists()


def test_an_upload_that_breaks_off_leaves_nothing(store: BlobStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"first"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.put(broken())
    assert not store.has(hashlib.sha256(b"first").hexdigest())
    if isinstance(store, LocalBlobStore):
        assert list(store.folder.iterdir()) == []


def test_a_bucket_that_is_not_there_is_named(s3_endpoint: str, store: BlobStore) -> None:
    with pytest.raises(EbbflowError, match="no-such-bucket") as caught:
        S3BlobStore("no-such-bucket", "", s3_endpoint)
    assert caught.value.reason is Reason.CONFIG_INVALID


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


def test_a_release_is_packed_with_the_scales_of_its_neighbour_in_any_store(store: BlobStore, tmp_path: Path) -> None:
    config = StudentConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
    )
    first = pack_weights(Student.random(config, 1), b"{}", store, [[1, 2, 3]], tmp_path)
    neighbour = first.variants["int8"].sha256
    second = pack_weights(Student.random(config, 2), b"{}", store, [[1, 2, 3]], tmp_path, neighbour)
    scales = []
    for packed in (first, second):
        store.fetch(packed.variants["int8"].sha256, tmp_path / "int8")
        scales.append(read_variant(tmp_path / "int8").scales("model.embed_tokens.weight"))
    assert (scales[1] >= scales[0]).all()
    assert (scales[1] == scales[0]).any()
