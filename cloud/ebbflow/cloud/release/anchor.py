"""What distiller and gate trust: the root that they were given, and what follows from it; never the registry's word.

Each keeps in a folder of its own what it verified last, as a client of The Update Framework does, so that whoever
writes to the registry can neither exchange the root nor bring an older list of releases back.
"""

from pathlib import Path

from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization import DeserializationError

from ebbflow.cloud.registry.tables import TrustMetadata
from ebbflow.cloud.release import repository
from ebbflow.cloud.release.repository import Trusted
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.trust import roles


class Anchor:
    """Follows the registry's metadata from a pinned root on. One process for each folder."""

    def __init__(self, folder: Path, pinned: Path) -> None:
        """Takes the root in `pinned`, unless `folder` holds a newer one that was reached from it.

        Raises:
            EbbflowError: NOT_INITIALISED if there is neither, FILE_CORRUPT.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        if not (folder / "root.json").exists():
            if not pinned.exists():
                message = (
                    f"the root to begin with, {pinned}, is not there: copy trust/root.json out of the folder that"
                    " `ebbflow cloud init` made"
                )
                raise EbbflowError(Reason.NOT_INITIALISED, message, path=pinned)
            write_atomic(folder / "root.json", pinned.read_bytes())
        self._root()

    def trusted(self, session: Session) -> Trusted:
        """Follows the published metadata and returns what is genuine.

        Raises:
            EbbflowError: ARTEFACT_UNTRUSTED if a signature does not hold or a version went back; NOT_INITIALISED.
        """
        roots = self._follow(session)
        known_targets, known_student = self._kept("targets"), self._kept("student")
        row = repository.required(session, roles.TARGETS)
        targets = repository.decode(row, Targets)
        if not repository.verifies(roots[-1], roles.TARGETS, targets):
            raise repository.altered(roles.TARGETS)
        _check_no_step_back(roles.TARGETS, known_targets, targets)
        student_row = repository.required(session, roles.STUDENT)
        student = repository.decode(student_row, Targets)
        _check_no_step_back(roles.STUDENT, known_student, student)
        current = repository.verifies(targets.signed, roles.STUDENT, student)
        if not current and not self._stood_before(session, roots, known_targets, student):
            raise repository.altered(roles.STUDENT)
        self._keep("student", student_row)  # before `targets`: what holds an older list up must not go first
        if current:
            self._keep("targets", row)
        return Trusted(targets.signed, student.signed, current)

    def _stood_before(
        self, session: Session, roots: list[Root], known: Metadata[Targets] | None, student: Metadata[Targets]
    ) -> bool:
        """Whether the keys of before a change have signed: the last that were seen at work, or any since then."""
        oldest = known.signed.version if known else 0
        before = [targets for targets in repository.older_targets(session, roots) if targets.version > oldest]
        holders = [*before, known.signed] if known else before
        return any(repository.verifies(targets, roles.STUDENT, student) for targets in holders)

    def _follow(self, session: Session) -> list[Root]:
        """Goes from root to root, as a client does; returns those on the way, oldest first."""
        chain = [self._root()]
        while row := session.get(TrustMetadata, (roles.ROOT, chain[-1].signed.version + 1)):
            new = repository.decode(row, Root)
            held = all(repository.verifies(of.signed, roles.ROOT, new) for of in (chain[-1], new))
            if not held or new.signed.version != row.version:
                raise repository.altered(roles.ROOT)
            self._keep("root", row)
            chain.append(new)
        return [root.signed for root in chain]

    def _root(self) -> Metadata[Root]:
        path = self._folder / "root.json"
        try:
            root = Metadata[Root].from_bytes(path.read_bytes())
        except (OSError, DeserializationError) as error:
            raise EbbflowError(Reason.FILE_CORRUPT, f"{path} holds no root", path=path) from error
        if not isinstance(root.signed, Root):
            raise EbbflowError(Reason.FILE_CORRUPT, f"{path} holds no root", path=path)
        return root

    def _kept(self, name: str) -> Metadata[Targets] | None:
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        try:
            return Metadata[Targets].from_bytes(path.read_bytes())
        except DeserializationError as error:
            raise EbbflowError(Reason.FILE_CORRUPT, f"{path} is damaged; remove it", path=path) from error

    def _keep(self, name: str, row: TrustMetadata) -> None:
        path = self._folder / f"{name}.json"
        if not path.exists() or path.read_bytes() != row.content:
            write_atomic(path, row.content)


def _check_no_step_back(role: str, known: Metadata[Targets] | None, found: Metadata[Targets]) -> None:
    if known is None or found.signed.version > known.signed.version:
        return
    if found.signed.version < known.signed.version or found.signed_bytes != known.signed_bytes:
        message = f"the registry shows version {found.signed.version} of {role}, not the one that was seen before"
        raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message, role=role)
