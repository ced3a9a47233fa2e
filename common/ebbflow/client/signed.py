"""Files of releases for admins: read over the admin's connection, verified by The Update Framework as devices do."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tuf.api.exceptions import DownloadError, DownloadHTTPError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from ebbflow.api.v1.artefact_pb2 import ReadBlobRequest, ReadMetadataRequest
from ebbflow.client.admin import AdminClient
from ebbflow.common.errors import Code, EbbflowError, Reason
from ebbflow.common.files import atomic, write_atomic

PINNED = "pinned.root.json"
_FIRST_ROOT = "1.root.json"
_METADATA_URL = "ebbflow:///metadata/"
_LIFE_S = 86_400.0
"""Deadline of one file; keep-alive ends a dead connection long before."""


class SignedFiles:
    """What the signed metadata lists, and nothing else."""

    def __init__(self, client: AdminClient, folder: Path, root: bytes | None = None) -> None:
        """Brings the signed metadata up to date and verifies it.

        Args:
            client: reads; stays the caller's to close.
            folder: where verified metadata is kept from call to call; made if it is not there.
            root: the trusted root, as its JSON bytes. Without one, the root that the cloud showed first counts, and is
                kept in `folder`.

        Raises:
            EbbflowError: METADATA_EXPIRED; ARTEFACT_UNTRUSTED if a signature or version is wrong; DISK_FULL; or why
                the cloud could not be asked.
        """
        self._client = client
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        bootstrap = root or self._pinned(folder / PINNED)
        try:
            self._updater = Updater(str(folder), _METADATA_URL, fetcher=_Metadata(client), bootstrap=bootstrap)
            self._updater.refresh()
        except (DownloadError, RepositoryError) as error:
            raise _named(error) from error

    def fetch(self, target: str, out: Path) -> None:
        """Writes one file of a release, atomically, if it is the one that was signed.

        Args:
            target: its target path, such as "student/faq/3.int8.safetensors".
            out: where; replaced if it exists.

        Raises:
            EbbflowError: ARTEFACT_UNTRUSTED if the metadata does not list it or the bytes are others; DISK_FULL; or why
                the cloud could not be asked.
        """
        signed = self._signed(target)
        with atomic(out, mode=0o644) as file:
            self._copy(signed, file)

    def _signed(self, target: str) -> TargetFile:
        try:
            signed = self._updater.get_targetinfo(target)
        except (DownloadError, RepositoryError) as error:
            raise _named(error) from error
        if signed is None:
            message = f"the signed metadata does not list {target}"
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message, target=target)
        return signed

    def _copy(self, signed: TargetFile, file: BinaryIO) -> None:
        wanted, left_bytes, found = signed.hashes["sha256"], signed.length, hashlib.sha256()
        request = ReadBlobRequest(sha256=bytes.fromhex(wanted))
        for answer in self._client.artefacts.ReadBlob(request, timeout=_LIFE_S):
            left_bytes -= len(answer.chunk)
            if left_bytes < 0:
                break
            found.update(answer.chunk)
            file.write(answer.chunk)
        if left_bytes or found.hexdigest() != wanted:
            message = f"the cloud's {signed.path} is not the file that was signed"
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message, target=signed.path)

    def _pinned(self, path: Path) -> bytes:
        """The root of the first time; asked for then, over the connection that the admin's context names."""
        if not path.exists():
            write_atomic(path, b"".join(_read(self._client, _FIRST_ROOT)))
        return path.read_bytes()


class _Metadata(FetcherInterface):
    """Reads metadata for python-tuf, which guards the call only: so everything is read at once, and it is small."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            return iter(list(_read(self._client, urlsplit(url).path.rpartition("/")[2])))
        except EbbflowError as error:
            # 404 is how python-tuf learns that there is no newer root.
            missing = error.code is Code.NOT_FOUND
            raise (DownloadHTTPError(str(error), 404) if missing else DownloadError(str(error))) from error


def _read(client: AdminClient, file_name: str) -> Iterator[bytes]:
    answers = client.artefacts.ReadMetadata(ReadMetadataRequest(file_name=file_name))
    return (answer.chunk for answer in answers)


def _named(error: DownloadError | RepositoryError) -> EbbflowError:
    if isinstance(error, ExpiredMetadataError):
        return EbbflowError(Reason.METADATA_EXPIRED, f"the signed metadata has expired: {error}")
    if isinstance(error, RepositoryError):
        return EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the signed metadata does not verify: {error}")
    if isinstance(cause := error.__cause__, EbbflowError):
        return EbbflowError(cause.reason, str(cause), **cause.metadata)
    return EbbflowError(Reason.SERVER_UNAVAILABLE, "the signed metadata could not be read")
