"""What cannot be forgotten in one round keeps the batches of no other, on every database."""

import re
from pathlib import Path

import adapter_world
import pytest
import sqlalchemy as sa
from feedback_world import DAY, NOW, SIGNER, Device, add_fleet, close_all, open_round

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback import policies, retention, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import FeedbackBatch, Round, Student
from ebbflow.common.privacy.vector import AdapterContribution

ADAPTER = adapter_world.adapter_plan(adapter_world.config(), rank=1)
LATER = NOW + 300 * DAY


class Locked(LocalBlobStore):
    """A store that lets nobody delete from it, as a bucket's policy may."""

    def delete(self, sha256: str) -> None:
        raise PermissionError(f"may not delete {sha256}")


@pytest.fixture
def closed(registry: Registry, devices: list[Device], blobs: LocalBlobStore) -> list[Round]:
    """A closed round of adapter updates, and one of votes that ended after it; one agent has answered both."""
    add_fleet(registry)
    signer = PlanSigner(SIGNER)
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        policies.append(session, student, pb.PrivacyPolicy(epsilon=8.0, allow_adapters=True), "more", signer, NOW)
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        updates = rounds.open_round(session, student, [], signer, NOW, adapter=lambda *_: ADAPTER)
    change = AdapterContribution([ADAPTER.scale] + [0] * (ADAPTER.dimension - 1))
    devices[0].submit(registry, devices[0].answer(registry, [change]), blobs=blobs)
    rounds.close_overdue(registry, NOW + 2 * DAY, blobs)
    votes = open_round(registry)
    devices[0].submit(registry, devices[0].answer(registry, []))
    close_all(registry)
    return [updates, votes]


def kept(registry: Registry) -> set[str]:
    with registry.reading() as session:
        return set(session.scalars(sa.select(FeedbackBatch.round_id).where(FeedbackBatch.signature != b"")))


def test_a_file_that_cannot_be_deleted_keeps_only_its_round(
    registry: Registry, closed: list[Round], blobs: LocalBlobStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updates, votes = closed
    assert retention.forget(registry, Locked(tmp_path / "blobs"), LATER) == [votes.id]
    assert kept(registry) == {updates.id}
    [logged] = [record.getMessage() for record in caplog.records]
    assert f"rounds/{updates.id}" in logged
    assert re.search("[0-9a-f]{64}", logged) is None, "the text of an error that nobody expected may hold anything"
    assert retention.forget(registry, blobs, LATER) == [updates.id]
    assert kept(registry) == set()


def test_a_round_whose_plan_is_damaged_keeps_only_its_own_batches(
    registry: Registry, closed: list[Round], blobs: LocalBlobStore, caplog: pytest.LogCaptureFixture
) -> None:
    updates, votes = closed
    with registry.transaction() as session:
        session.get_one(Round, updates.id).plan = b"damaged"
    assert retention.forget(registry, blobs, LATER) == [votes.id]
    assert kept(registry) == {updates.id}
    assert [f"rounds/{updates.id}" in record.getMessage() for record in caplog.records] == [True]
