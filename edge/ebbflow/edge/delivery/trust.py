"""The device's view of what is genuine: python-tuf's client over our gRPC, with its cache in one folder."""

import datetime as dt
import re
import threading
from pathlib import Path

from securesystemslib.signer import Key
from tuf.api.exceptions import (
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import Updater

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named
from ebbflow.common.trust import roles
from ebbflow.common.trust.targets import manifest_path
from ebbflow.edge.delivery.clock import TrustClock
from ebbflow.edge.delivery.fetcher import METADATA_URL, TARGETS_URL, ArtefactFetcher, ArtefactSource

METADATA = "metadata"
"""What `metadata["of"]` of an ARTEFACT_UNTRUSTED says if it is not a file but the list of files that is not trusted."""
_ANY_STUDENT_FILE = "student/-/-"
"""A path that the role `student` may list and never does: asking for it loads the role."""


class TrustClient:
    """Follows the signed metadata. Thread-safe; one instance per folder.

    Everything but `refresh` works without the network, from what was verified last.
    """

    def __init__(self, folder: Path, root: bytes, source: ArtefactSource, clock: TrustClock | None = None) -> None:
        """Prepares the cache.

        Args:
            folder: where verified metadata is kept; made if it is not there.
            root: the root that was pinned at enrolment, as JSON bytes.
            source: where to read from.
            clock: the time by which signatures expire; by default the device's own, kept in `folder`.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for pattern in ("tmp*", ".clock.*"):  # temporary files of python-tuf and our own that a crash has left
            for left in folder.glob(pattern):
                left.unlink(missing_ok=True)
        self._folder, self._root, self._source = folder, root, source
        self.clock = clock or TrustClock(folder / "clock")
        self._lock = threading.RLock()
        self._updater: Updater | None = None

    def refresh(self) -> None:
        """Brings every role up to date and verifies it.

        Raises:
            EbbflowError: METADATA_EXPIRED, ARTEFACT_UNTRUSTED (a signature, version or hash is wrong), DISK_FULL, or
                why the cloud could not be asked (SERVER_UNAVAILABLE, DEADLINE_EXCEEDED, CERTIFICATE_REVOKED, ...). What
                was verified before stays.
        """
        with self._lock:
            now = self.clock.now()
            try:
                with full_disk_named(self._folder):
                    self._updater = self._load(now)
            except (DownloadError, RepositoryError) as error:
                raise _named(error) from error
            self.clock.accept(now)

    def target(self, path: str) -> TargetFile:
        """Returns length, hash and signed fields of one file of a release, as of the last `refresh`.

        Raises:
            EbbflowError: ARTEFACT_UNTRUSTED if the signed metadata does not list it.
        """
        with self._lock:
            file = self._updater and self._updater.get_targetinfo(path)
        if not file:
            raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the signed metadata does not list {path}", target=path)
        return file

    def min_release(self, student_id: str) -> int:
        """The lowest release of a student that may be installed, as verified last; 1 for a student without one."""
        student = self._cached(roles.STUDENT, self._cached(roles.TARGETS, self._newest_root()))
        numbers = student.unrecognized_fields.get(roles.MIN_RELEASE, {})
        return int(numbers.get(student_id, 1))

    def may_return(self, student_id: str, number: int) -> bool:
        """Whether a release that this device served before may serve again: listed and not too old, as verified last.

        Without any verified metadata it may.
        """
        try:
            student = self._cached(roles.STUDENT, self._cached(roles.TARGETS, self._newest_root()))
        except EbbflowError:
            return True
        lowest = int(student.unrecognized_fields.get(roles.MIN_RELEASE, {}).get(student_id, 1))
        return number >= lowest and manifest_path(student_id, number) in student.targets

    def feedback_keys(self) -> dict[str, Key]:
        """Keys that may sign plans of rounds, by key id, as verified last.

        Raises:
            EbbflowError: METADATA_NOT_FOUND if there was no `refresh` yet.
        """
        delegations = self._cached(roles.TARGETS, self._newest_root()).delegations
        if delegations is None or not delegations.roles or roles.FEEDBACK not in delegations.roles:
            return {}
        return {key_id: delegations.keys[key_id] for key_id in delegations.roles[roles.FEEDBACK].keyids}

    def _load(self, now: dt.datetime) -> Updater:
        updater = Updater(
            str(self._folder),
            METADATA_URL,
            target_base_url=TARGETS_URL,
            fetcher=ArtefactFetcher(self._source),
            bootstrap=self._root,
        )
        # python-tuf takes the device's clock when it is made and offers no other way to give it a better one.
        updater._trusted_set.reference_time = now
        updater.refresh()
        updater.get_targetinfo(_ANY_STUDENT_FILE)
        return updater

    def _newest_root(self) -> Root:
        with self._lock:
            history = self._folder / "root_history"
            versions = [int(match[1]) for path in history.glob("*") if (match := _ROOT_NAME.fullmatch(path.name))]
            for version in sorted(versions, reverse=True):
                root = _decode(history / f"{version}.root.json")
                if root and isinstance(root.signed, Root):
                    return root.signed
        raise _nothing_cached()

    def _cached(self, role: str, delegator: Root | Targets) -> Targets:
        """Reads a role that was verified before, and verifies its signatures again against torn or swapped files."""
        with self._lock:
            metadata = _decode(self._folder / f"{role}.json")
        if metadata is None or not isinstance(metadata.signed, Targets):
            raise _nothing_cached()
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            raise _nothing_cached() from error
        return metadata.signed


_ROOT_NAME = re.compile(r"([1-9][0-9]*)\.root\.json")


def _decode(path: Path) -> "Metadata[Root] | Metadata[Targets] | None":
    try:
        return Metadata.from_bytes(path.read_bytes())
    except (OSError, DeserializationError):
        return None


def _nothing_cached() -> EbbflowError:
    return EbbflowError(Reason.METADATA_NOT_FOUND, "no verified metadata is on this device yet")


def _named(error: DownloadError | RepositoryError) -> EbbflowError:
    if isinstance(error, ExpiredMetadataError):
        return EbbflowError(Reason.METADATA_EXPIRED, f"the signed metadata has expired: {error}")
    if isinstance(error, (RepositoryError, DownloadLengthMismatchError)):
        return EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"the signed metadata does not verify: {error}", of=METADATA)
    if isinstance(cause := error.__cause__, EbbflowError):
        return EbbflowError(cause.reason, str(cause), **cause.metadata)
    return EbbflowError(Reason.SERVER_UNAVAILABLE, "the signed metadata could not be read")
