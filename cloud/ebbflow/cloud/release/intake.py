"""Takes versions of `root` and `targets` that people have signed offline, as strictly as a device would."""

import datetime as dt
import logging
from typing import Final

from securesystemslib.signer import Signer
from sqlalchemy.orm import Session
from tuf.api.metadata import Root, Targets

from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.tables import TrustMetadata
from ebbflow.cloud.release import publish, repository
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import ceremony, roles

MAX_BYTES: Final = 512_000
"""What python-tuf's client reads of a root at most."""

_log = logging.getLogger(__name__)


def accept(session: Session, content: bytes, signer: Signer, now: dt.datetime) -> str:
    """Publishes a version, and signs snapshot and timestamp over it. Repeating it does nothing.

    Args:
        session: the caller's transaction.
        content: the whole file, as signed.
        signer: the key of snapshot and timestamp. If the new root does not name it, they stay as they are, and agents
            install nothing until this process is started with the key that it names.
        now: the time.

    Returns:
        The role.

    Raises:
        EbbflowError: METADATA_REFUSED with everything that is wrong, ARTEFACT_UNTRUSTED, KEY_UNUSABLE.
    """
    if len(content) > MAX_BYTES:
        raise EbbflowError(Reason.METADATA_REFUSED, f"the file is longer than {MAX_BYTES} bytes")
    proposed = ceremony.read(content, "the file")
    repository.lock(session)
    session.expire_all()
    root = repository.decode(repository.required(session, roles.ROOT), Root)
    targets = repository.decode(repository.required(session, roles.TARGETS), Targets)
    draft = ceremony.Draft(proposed, root, targets)
    known = session.get(TrustMetadata, (draft.role, proposed.signed.version))
    if known is not None and ceremony.read(known.content, "the registry").signed_bytes == proposed.signed_bytes:
        return draft.role
    draft.check(now)
    repository.store(session, draft.role, proposed.signed.version, content, now=now)
    if publish.may_sign_online(session, signer):
        repository.sign_online(session, signer, now)
    changes.bump(session, "desired_state")
    for change in draft.changes():
        _log.warning("%s %d: %s", draft.role, proposed.signed.version, change)
    return draft.role
