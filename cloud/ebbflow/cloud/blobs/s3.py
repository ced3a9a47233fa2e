"""Blobs in a bucket of any service that speaks the S3 API: `<prefix>ab/abcdef…`, one object each."""

import datetime as dt
import hashlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ebbflow.cloud.blobs.base import CHUNK_BYTES, SHA256, Blob, Reader, checked
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import atomic, full_disk_named

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_log = logging.getLogger(__name__)

_NOT_FOR_US = frozenset({403, 405, 501})
"""HTTP's "forbidden", and the two that services use for what they do not have. Asking again changes none of them."""


class S3BlobStore:
    """The cluster's store. Credentials come from boto3's usual places: environment, profile or role."""

    def __init__(self, bucket: str, prefix: str = "", endpoint_url: str | None = None) -> None:
        """Uses a bucket that exists.

        Raises:
            EbbflowError: CONFIG_INVALID if the bucket is not there or not ours; SERVER_UNAVAILABLE if nobody answers.
        """
        self.bucket, self.prefix = bucket, prefix
        self._told = False  # that uploads which broke off cannot be swept
        retries = Config(retries={"mode": "standard", "max_attempts": 4}, connect_timeout=5, read_timeout=60)
        self._client: S3Client = boto3.client("s3", endpoint_url=endpoint_url, config=retries)
        try:
            self._client.head_bucket(Bucket=bucket)
        except ClientError as error:
            message = f"the bucket {bucket} is not there, or this process may not use it"
            raise EbbflowError(Reason.CONFIG_INVALID, message, bucket=bucket) from error
        except BotoCoreError as error:
            raise EbbflowError(
                Reason.SERVER_UNAVAILABLE, f"the object store of bucket {bucket} does not answer"
            ) from error

    def put(self, chunks: Iterable[bytes]) -> Blob:
        """See `BlobStore.put`. The name is known only at the end, so the bytes wait in a temporary file."""
        digest, size_bytes = hashlib.sha256(), 0
        with full_disk_named(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
            for chunk in chunks:
                digest.update(chunk)
                size_bytes += len(chunk)
                file.write(chunk)
            file.seek(0)
            self._upload(digest.hexdigest(), file)
        return Blob(digest.hexdigest(), size_bytes)

    def put_file(self, path: Path) -> Blob:
        """See `BlobStore.put_file`."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = file.tell()
            file.seek(0)
            self._upload(sha256, file)
        return Blob(sha256, size_bytes)

    def open(self, sha256: str, offset_bytes: int = 0) -> Iterator[bytes]:
        """See `BlobStore.open`."""
        reader = self.reader(sha256, offset_bytes)
        chunks = iter(lambda: reader.read(CHUNK_BYTES), b"")
        return checked(chunks, sha256 if offset_bytes == 0 else None, f"s3://{self.bucket}")

    def reader(self, sha256: str, offset_bytes: int = 0) -> Reader:
        """See `BlobStore.reader`. One request, whose answer is read as it is asked for."""
        if self.size(sha256) <= offset_bytes and offset_bytes:
            return io.BytesIO()  # a range that begins at the end is an error to S3
        request: dict[str, Any] = {"Range": f"bytes={offset_bytes}-"} if offset_bytes else {}
        body: Reader = self._client.get_object(Bucket=self.bucket, Key=self._key(sha256), **request)["Body"]
        return body

    @contextmanager
    def lend(self, sha256: str, scratch: Path) -> Iterator[Path]:
        """See `BlobStore.lend`."""
        with tempfile.TemporaryDirectory(dir=scratch, prefix="lent-") as folder:
            path = Path(folder) / sha256
            self.fetch(sha256, path)
            yield path

    def size(self, sha256: str) -> int:
        """See `BlobStore.size`."""
        if not SHA256.fullmatch(sha256):
            raise EbbflowError(Reason.BLOB_NOT_FOUND, f"no blob {sha256[:64]}", sha256=sha256[:64])
        try:
            return self._client.head_object(Bucket=self.bucket, Key=self._key(sha256))["ContentLength"]
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:  # noqa: PLR2004 - HTTP's "not found"
                raise
            raise EbbflowError(Reason.BLOB_NOT_FOUND, f"no blob {sha256}", sha256=sha256) from error

    def read(self, sha256: str) -> bytes:
        """See `BlobStore.read`."""
        return b"".join(self.open(sha256))

    def fetch(self, sha256: str, path: Path) -> None:
        """See `BlobStore.fetch`."""
        with atomic(path) as file:
            for chunk in self.open(sha256):
                file.write(chunk)

    def has(self, sha256: str) -> bool:
        """See `BlobStore.has`."""
        try:
            return self.size(sha256) >= 0
        except EbbflowError:
            return False

    def delete(self, sha256: str) -> None:
        """See `BlobStore.delete`."""
        if SHA256.fullmatch(sha256):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(sha256))

    def sweep(self, before: dt.datetime) -> None:
        """See `BlobStore.sweep`: large files are sent in parts. Where that is not allowed a warning says so, once."""
        try:
            self._abort_uploads(before)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") not in _NOT_FOR_US:
                raise
            if not self._told:
                _log.warning(
                    "what is left of uploads that broke off stays in the bucket %s: it does not let this process look"
                    " for them (s3:ListBucketMultipartUploads) or end them (s3:AbortMultipartUpload)",
                    self.bucket,
                )
            self._told = True

    def _abort_uploads(self, before: dt.datetime) -> None:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self.prefix)
        for upload in (each for page in pages for each in page.get("Uploads", [])):
            key = upload["Key"]
            if upload["Initiated"] < before and self._is_ours(key):
                try:
                    self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload["UploadId"])
                except self._client.exceptions.NoSuchUpload:
                    continue  # it ended meanwhile, or another replica was quicker

    def _is_ours(self, key: str) -> bool:
        """Whether a blob of this store would have the key; others may use the bucket too."""
        sha256 = key.rpartition("/")[2]
        return bool(SHA256.fullmatch(sha256)) and key == self._key(sha256)

    def _key(self, sha256: str) -> str:
        return f"{self.prefix}{sha256[:2]}/{sha256}"

    def _upload(self, sha256: str, file: IO[bytes]) -> None:
        # An object appears whole or not at all; uploading it again would only cost time.
        if not self.has(sha256):
            self._client.upload_fileobj(file, self.bucket, self._key(sha256))
