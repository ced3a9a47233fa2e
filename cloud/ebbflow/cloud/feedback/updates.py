"""The adapter updates of a round as they are stored: rows in the registry, and a file of noisy values for each."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback.adapters import Average, Update, average_of
from ebbflow.cloud.registry.tables import FeedbackBatch
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.vector import layout_of

_log = logging.getLogger(__name__)

_LOST = (Reason.BLOB_NOT_FOUND, Reason.FILE_CORRUPT)


@dataclass(frozen=True)
class Row:
    """What the registry holds of one agent's update."""

    agent_id: str
    base_release: int
    sha256: str
    """Blob with the batch."""


def rows_of(session: Session, round_id: str) -> tuple[Row, ...]:
    """Returns the updates of a round that were kept, by agent."""
    query = (
        sa.select(FeedbackBatch.agent_id, FeedbackBatch.base_release, FeedbackBatch.payload_sha256)
        .where(FeedbackBatch.round_id == round_id, FeedbackBatch.payload_sha256 != "")
        .order_by(FeedbackBatch.agent_id)
    )
    return tuple(Row(*found) for found in session.execute(query))


def average_rows(plan: pb.RoundPlan, rows: Sequence[Row], blobs: BlobStore) -> Average:
    """Averages updates, reading every file twice: at a thousand updates that takes longer than a transaction should.

    An update whose file is gone or damaged is left out as if its agent had not answered, and a warning names it: the
    others' average is as good without it, and a round that waited for the file would never end. Any other failure of
    the blob store passes by itself, so it is raised and the round waits.

    Args:
        plan: the round's plan.
        rows: those to average.
        blobs: where their files are.

    Raises:
        EbbflowError: BLOB_NOT_FOUND or FILE_CORRUPT if a file is lost between its two readings; the next call leaves it
            out.
    """
    return average_of(plan, _Stored(plan, rows, blobs))


@dataclass
class _Stored:
    """Updates, read anew each time that they are iterated: all together may be larger than memory."""

    plan: pb.RoundPlan
    rows: Sequence[Row]
    blobs: BlobStore
    lost: set[Row] = field(default_factory=set)
    settled: bool = False
    """Whether they were iterated once: from then on they must stay the same."""

    def __iter__(self) -> Iterator[Update]:
        layout = layout_of(self.plan)
        for row in self.rows:
            data = self._read(row)
            if data is not None:
                noisy = pb.FeedbackBatch.FromString(data).noisy
                yield Update(row.agent_id, row.base_release, np.array(layout.adapter_cells(noisy), np.int64))
        self.settled = True

    def _read(self, row: Row) -> bytes | None:
        if row in self.lost:
            return None
        try:
            return self.blobs.read(row.sha256)
        except EbbflowError as error:
            if self.settled or error.reason not in _LOST:
                raise
            agent = names.make("agents", row.agent_id)
            _log.warning("%s ends without the update of %s: %s", self.plan.round, agent, error)
            self.lost.add(row)
            return None
