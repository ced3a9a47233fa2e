"""A client of the signed metadata that has seen everything so far: python-tuf itself, with a cache that it keeps."""

import re
from collections.abc import Iterator
from pathlib import Path

from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater

from ebbflow.api.v1.artefact_pb2 import ReadMetadataRequest
from ebbflow.client.admin import AdminClient
from ebbflow.common.errors import Code, EbbflowError

_ANY_FILE = "student/-/-"
_FILE_NAME = re.compile(r"[^/]+$")


class Observer:
    """Follows the metadata for ever; python-tuf refuses what is older than what it has seen."""

    def __init__(self, folder: Path, client: AdminClient) -> None:
        folder.mkdir()
        self._folder = folder
        self._root = _read(client, "1.root.json")
        self.versions: dict[str, int] = {}

    def look(self, client: AdminClient) -> Targets:
        """Verifies what is published now, and that nothing went back or was left out; returns the list of releases."""
        updater = Updater(
            str(self._folder),
            "ebbflow:///metadata/",
            target_base_url="ebbflow:///targets/",
            fetcher=_Fetcher(client),
            bootstrap=self._root,
        )
        updater.refresh()
        assert updater.get_targetinfo(_ANY_FILE) is None
        student = Metadata[Targets].from_bytes(self._kept("student")).signed
        found = {
            "timestamp": Metadata[Timestamp].from_bytes(self._kept("timestamp")).signed.version,
            "snapshot": Metadata[Snapshot].from_bytes(self._kept("snapshot")).signed.version,
            "student": student.version,
        }
        for role, version in found.items():
            assert version >= self.versions.get(role, 0), f"{role} went back to {version} from {self.versions[role]}"
        for role in ("snapshot", "student"):
            for version in range(self.versions.get(role, 1), found[role] + 1):
                _read(client, f"{version}.{role}.json")  # none is missing in between
        self.versions = found
        return student

    def _kept(self, role: str) -> bytes:
        return (self._folder / f"{role}.json").read_bytes()


class _Fetcher(FetcherInterface):
    def __init__(self, client: AdminClient) -> None:
        self._client = client

    def _fetch(self, url: str) -> Iterator[bytes]:
        match = _FILE_NAME.search(url)
        assert match
        try:
            return iter([_read(self._client, match[0])])
        except EbbflowError as error:
            if error.code is Code.NOT_FOUND:
                raise DownloadHTTPError(str(error), 404) from error
            raise


def _read(client: AdminClient, file_name: str) -> bytes:
    answers = client.artefacts.ReadMetadata(ReadMetadataRequest(file_name=file_name), timeout=10)
    return b"".join(answer.chunk for answer in answers)
