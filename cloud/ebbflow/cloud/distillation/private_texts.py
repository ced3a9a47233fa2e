"""Private texts in the blob store: who still needs them, and how they go.

They stay while a distillation waits or runs, some time longer (setting `private_texts_days`), and then no longer.
Their hash stays in the registry, for the account of what training on them has cost. No message here repeats it.
"""

import datetime as dt
import logging
from base64 import b64encode
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import corpus
from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.registry import locks
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import (
    Delta,
    Distillation,
    DistillationState,
    FeedbackBatch,
    Release,
    Round,
    Student,
)
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_log = logging.getLogger(__name__)

TRY_EVERY = dt.timedelta(hours=1)
"""How often to look again at texts that could not be deleted; what else they may be takes scans to find out."""
_NEVER = dt.datetime.min.replace(tzinfo=dt.UTC)
_LIVING = (DistillationState.QUEUED, DistillationState.RUNNING)
_UNNAMED = frozenset({Reason.BLOB_NOT_FOUND, Reason.FILE_CORRUPT})
"""What the blob store says with the name of the file, which is the hash of the texts."""


def stream(blobs: BlobStore, sha256: str) -> Iterator[Text]:
    """Yields the texts one by one.

    Raises:
        EbbflowError: BLOB_NOT_FOUND or FILE_CORRUPT without the hash; CORPUS_INVALID with the line that is wrong.
    """
    try:
        yield from corpus.stream(blobs, sha256)
    except EbbflowError as error:
        if error.reason not in _UNNAMED:
            raise
        raise EbbflowError(error.reason, _gone(error.reason)) from None


def reserve(session: Session, blobs: BlobStore, sha256: str) -> None:
    """Makes sure that the texts are there when a distillation on them is queued in the caller's transaction.

    Raises:
        EbbflowError: BLOB_NOT_FOUND if they were deleted meanwhile; INVALID_REQUEST if they are a student's corpus.
    """
    _lock(session, sha256)
    if not blobs.has(sha256):
        raise EbbflowError(Reason.BLOB_NOT_FOUND, _gone(Reason.BLOB_NOT_FOUND))
    if student := session.scalar(sa.select(Student.id).where(Student.corpus_sha256 == sha256).limit(1)):
        name = names.make("students", student)
        message = f"these texts are the corpus of {name}, which learns them without protection: they are not private"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="distillation.private_corpus_sha256")
    session.execute(
        sa.update(Distillation)
        .where(Distillation.private_corpus_sha256 == sha256, Distillation.private_corpus_delete_time.is_not(None))
        .values(private_corpus_delete_time=None)  # they are there again
        .execution_options(synchronize_session=False)
    )


def reserve_corpus(session: Session, blobs: BlobStore, sha256: str) -> None:
    """Makes sure that a corpus is there when a student is made of it in the caller's transaction.

    Raises:
        EbbflowError: BLOB_NOT_FOUND if the same file was deleted as private texts since it was read.
    """
    _lock(session, sha256)
    if not blobs.has(sha256):
        message = "the corpus is no longer in the blob store: somebody has deleted it as private texts; upload it again"
        raise EbbflowError(Reason.BLOB_NOT_FOUND, message)


def delete(session: Session, blobs: BlobStore, sha256: str, now: dt.datetime) -> bool:
    """Deletes the texts and notes it on every distillation that was trained on them; returns whether they were there.

    Raises:
        EbbflowError: STATE_CONFLICT if a distillation needs them, or if the same file is something else too.
    """
    _lock(session, sha256)
    living = sa.select(Distillation.id).where(
        Distillation.private_corpus_sha256 == sha256, Distillation.state.in_(_LIVING)
    )
    if needed := session.scalar(living.limit(1)):
        name = names.make("distillations", needed)
        message = f"{name} still needs these texts: wait for its end, or cancel it first"
        raise EbbflowError(Reason.STATE_CONFLICT, message, distillation=name)
    if other := _other_use(session, sha256):
        message = f"the same file is {other}: as long as that is there it cannot be deleted"
        raise EbbflowError(Reason.STATE_CONFLICT, message)
    there = blobs.has(sha256)
    blobs.delete(sha256)  # before the rows: whatever happens in between, they still say what is to be deleted
    session.execute(
        sa.update(Distillation)
        .where(Distillation.private_corpus_sha256 == sha256, Distillation.private_corpus_delete_time.is_(None))
        .values(private_corpus_delete_time=now)
        .execution_options(synchronize_session=False)
    )
    return there


class Forgetter:
    """Deletes texts whose time is over. What could not be deleted waits an hour and holds up nothing."""

    def __init__(self, registry: Registry, blobs: BlobStore, kept: dt.timedelta) -> None:
        """Takes how long texts stay after the last distillation on them has ended."""
        self._registry, self._blobs, self._kept = registry, blobs, kept
        self._tried: dict[str, dt.datetime] = {}

    def forget(self, now: dt.datetime) -> int:
        """Deletes what no distillation has needed since `now - kept`; returns how many files."""
        with self._registry.reading() as session:
            due = session.scalars(_due(now - self._kept)).all()
        self._tried = {sha256: self._tried[sha256] for sha256 in due if sha256 in self._tried}
        # The absolute value: a clock that was set back shall not make them wait for longer.
        ready = [sha256 for sha256 in due if abs(now - self._tried.get(sha256, _NEVER)) >= TRY_EVERY]
        return sum(self._forget(sha256, now) for sha256 in ready)

    def _forget(self, sha256: str, now: dt.datetime) -> bool:
        self._tried[sha256] = now
        try:
            with self._registry.transaction() as session:
                return delete(session, self._blobs, sha256, now)
        except EbbflowError as error:
            if error.reason is not Reason.STATE_CONFLICT:  # else it is needed again, or something else too
                _warn(error.reason.name)
        except Exception as error:  # noqa: BLE001 - one file that cannot be deleted must not keep the others
            _warn(type(error).__name__)
        return False


def _warn(why: str) -> None:
    # Neither the hash nor the error's text, which may hold it.
    _log.error("private texts could not be deleted (%s): may this process delete from the blob store?", why)


def _due(ended_by: dt.datetime) -> sa.Select[str]:
    file = Distillation.private_corpus_sha256
    return (
        sa.select(file)
        .where(file != "")
        .group_by(file)
        .having(
            sa.func.max(Distillation.update_time) <= ended_by,
            sa.func.sum(sa.case((Distillation.state.in_(_LIVING), 1), else_=0)) == 0,
            sa.func.sum(sa.case((Distillation.private_corpus_delete_time.is_(None), 1), else_=0)) > 0,
        )
        .order_by(file)
    )


def _other_use(session: Session, sha256: str) -> str:
    """Says what else the file is to the registry; empty if it is private texts and nothing else."""
    in_json = sa.cast(Release.targets, sa.Text).contains(sha256)
    average = sa.cast(Round.aggregate, sa.Text).contains(b64encode(bytes.fromhex(sha256)).decode())
    uses: list[tuple[str, sa.ColumnElement[bool]]] = [
        ("the corpus of a student, which learns it without protection", Student.corpus_sha256 == sha256),
        ("a file of a release", in_json),
        ("a delta between releases", Delta.blob_sha256 == sha256),
        ("an adapter update", FeedbackBatch.payload_sha256 == sha256),
        ("the average of a round", average),
    ]
    return next((words for words, is_so in uses if session.scalar(sa.select(sa.exists().where(is_so)))), "")


def _lock(session: Session, sha256: str) -> None:
    locks.exclusive(session, f"private texts {sha256}")


def _gone(reason: Reason) -> str:
    if reason is Reason.FILE_CORRUPT:
        return "the private texts are damaged in the blob store: order the distillation again with the file"
    return "the private texts are not, or no longer, in the blob store: order the distillation again with the file"
