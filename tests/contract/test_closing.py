"""Rounds of adapter updates close without keeping anybody waiting, whatever is wrong with one of them."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_world
import numpy as np
import pytest
import sqlalchemy as sa
from feedback_world import AGENTS, DAY, NOW, SIGNER, Device, add_fleet

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1.round_pb2 import Aggregate, CloseRoundRequest
from ebbflow.api.v1.round_pb2_grpc import RoundServiceStub
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback import policies, round_rows, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import AuditEntry, FeedbackBatch, Round, RoundState, Student
from ebbflow.common.privacy.calibration import variance_of
from ebbflow.common.privacy.vector import AdapterContribution

ADAPTER = adapter_world.adapter_plan(adapter_world.config(), rank=1)
OVER = NOW + 2 * DAY


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    with registry.transaction() as session:
        allow_adapters(session, PlanSigner(SIGNER))
    return registry


def allow_adapters(session: Any, signer: PlanSigner) -> None:
    policy = pb.PrivacyPolicy(epsilon=8.0, allow_adapters=True)
    policies.append(session, session.get_one(Student, "faq"), policy, "adapters", signer, NOW)


def open_adapter_round(registry: Registry) -> str:
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        return rounds.open_round(session, student, [], PlanSigner(SIGNER), NOW, adapter=lambda *_: ADAPTER).id


def send(registry: Registry, device: Device, blobs: LocalBlobStore) -> None:
    change = AdapterContribution([ADAPTER.scale] + [0] * (ADAPTER.dimension - 1))
    signed = device.resign(device.answer(registry, [change]), lambda batch: setattr(batch, "base_release", 1))
    device.submit(registry, signed, blobs=blobs)


def file_of(registry: Registry, blobs: LocalBlobStore, agent_id: str) -> Path:
    with registry.reading() as session:
        query = sa.select(FeedbackBatch.payload_sha256).where(FeedbackBatch.agent_id == agent_id)
        sha256 = session.scalars(query).one()
    return blobs.folder / sha256[:2] / sha256


def result_of(registry: Registry, round_id: str) -> Aggregate:
    with registry.reading() as session:
        row = session.get_one(Round, round_id)
        assert row.state is RoundState.CLOSED
        return round_rows.aggregate_of(row)


class Watched(LocalBlobStore):
    """A store that does something else whenever a file is about to be read."""

    def __init__(self, folder: Path, meanwhile: Callable[[int], None]) -> None:
        super().__init__(folder)
        self.reads, self.meanwhile = 0, meanwhile

    def read(self, sha256: str) -> bytes:
        self.reads += 1
        self.meanwhile(self.reads)
        return super().read(sha256)


def write(registry: Registry, round_id: str) -> None:
    """What a late batch begins with; whoever holds the round's row, or all of SQLite, makes it fail soon."""
    with registry.transaction() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(sa.text("SET LOCAL lock_timeout = '2s'"))
        session.get(Round, round_id, with_for_update={"read": True})


def test_an_update_that_is_lost_or_damaged_is_left_out(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore, caplog: pytest.LogCaptureFixture
) -> None:
    round_id = open_adapter_round(fleet)
    for device in devices:
        send(fleet, device, blobs)
    file_of(fleet, blobs, AGENTS[0]).unlink()
    file_of(fleet, blobs, AGENTS[2]).write_bytes(b"no batch at all")
    assert rounds.close_overdue(fleet, OVER, blobs) == [round_id]
    result = result_of(fleet, round_id)
    assert (result.batches, result.adapter.agents) == (1, 1)
    assert blobs.has(result.adapter.blob_sha256.hex())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [
        (f"rounds/{round_id}" in text, f"agents/{agent}" in text)
        for agent, text in zip((AGENTS[0], AGENTS[2]), warnings, strict=True)
    ] == [(True, True)] * 2, warnings


def test_a_round_whose_updates_are_all_lost_ends_and_says_nothing(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    round_id = open_adapter_round(fleet)
    send(fleet, devices[0], blobs)
    file_of(fleet, blobs, AGENTS[0]).unlink()
    assert rounds.close_overdue(fleet, OVER, blobs) == [round_id]
    result = result_of(fleet, round_id)
    assert (result.batches, result.informative) == (0, False)


def test_an_update_that_goes_while_it_is_added_up_makes_the_round_wait(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    round_id = open_adapter_round(fleet)
    for device in devices:
        send(fleet, device, blobs)
    lost = file_of(fleet, blobs, AGENTS[1])
    going = Watched(blobs.folder, lambda reads: lost.unlink() if reads == len(AGENTS) + 1 else None)
    assert rounds.close_overdue(fleet, OVER, going) == []
    assert rounds.close_overdue(fleet, OVER, going) == [round_id]
    assert result_of(fleet, round_id).batches == 2


def test_nobody_waits_while_updates_are_read(fleet: Registry, devices: list[Device], blobs: LocalBlobStore) -> None:
    round_id = open_adapter_round(fleet)
    for device in devices:
        send(fleet, device, blobs)
    watched = Watched(blobs.folder, lambda _: write(fleet, round_id))
    assert rounds.close_overdue(fleet, OVER, watched) == [round_id]
    assert (watched.reads, result_of(fleet, round_id).batches) == (2 * len(AGENTS), 3)


@pytest.mark.parametrize("drafts", [3, 1])
def test_an_update_that_comes_while_others_are_read_counts(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch, drafts: int
) -> None:
    monkeypatch.setattr(rounds, "DRAFTS", drafts)
    round_id = open_adapter_round(fleet)
    send(fleet, devices[0], blobs)
    watched = Watched(blobs.folder, lambda reads: send(fleet, devices[1], blobs) if reads == 1 else None)
    assert rounds.close_overdue(fleet, OVER, watched) == [round_id]
    result = result_of(fleet, round_id)
    assert (watched.reads, result.batches) == (2 + 4, 2)
    stored = {path.name for path in blobs.folder.rglob("*") if path.is_file()}
    payloads = {file_of(fleet, blobs, agent).name for agent in AGENTS[:2]}
    assert stored == {*payloads, result.adapter.blob_sha256.hex()}, "an average that nobody names was stored"


def test_a_round_that_another_replica_closed_meanwhile_stays_as_it_is(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    round_id = open_adapter_round(fleet)
    send(fleet, devices[0], blobs)
    other: list[str] = []

    def close(reads: int) -> None:
        if reads == 1:
            other.extend(rounds.close_overdue(fleet, OVER, blobs))

    rounds.close_overdue(fleet, OVER, Watched(blobs.folder, close))
    assert other == [round_id]
    assert result_of(fleet, round_id).batches == 1


# Over gRPC


def keep_update(plane: Any, round_id: str, agent_id: str) -> None:
    """Writes what the registry and the blob store hold of an agent's noise."""
    with plane.registry.reading() as session:
        plan = round_rows.plan_of(session.get_one(Round, round_id))
    sigma = float(variance_of(plan.mechanism)) ** 0.5
    size = plan.adapter.dimension + plan.null_bins
    noise = np.random.default_rng(len(agent_id)).normal(0, sigma, size).round().astype(int).tolist()
    blob = plane.cloud.blobs.put([pb.FeedbackBatch(noisy=noise, batch_id=agent_id).SerializeToString()])
    with plane.registry.transaction() as session:
        session.add(
            FeedbackBatch(
                id=agent_id,
                round_id=round_id,
                agent_id=agent_id,
                batch_sha256=blob.sha256,
                noisy=noise[plan.adapter.dimension :],
                signature=b"signed",
                create_time=clock.now(),
                payload_sha256=blob.sha256,
                base_release=1,
            )
        )


@pytest.fixture
def asked(plane: Any) -> tuple[Any, str]:
    """A plane and an open round of two agents, one of which has answered."""
    plane.student()
    plane.release()
    for agent_id in ("kiosk-7", "kiosk-8"):
        plane.agent(agent_id)
    plane.roll_out("faq", 1)
    for agent_id in ("kiosk-7", "kiosk-8"):
        plane.serve(agent_id, "faq", 1)
    signer = plane.cloud.plan_signer
    with plane.registry.transaction() as session:
        allow_adapters(session, signer)
        student = session.get_one(Student, "faq")
        round_ = rounds.open_round(session, student, [], signer, clock.now(), adapter=lambda *_: ADAPTER)
    keep_update(plane, round_.id, "kiosk-7")
    return plane, round_.id


async def test_an_admin_closes_a_round_while_agents_answer_it(asked: tuple[Any, str]) -> None:
    plane, round_id = asked

    def meanwhile(reads: int) -> None:
        write(plane.registry, round_id)
        if reads == 1:
            keep_update(plane, round_id, "kiosk-8")

    plane.cloud.blobs = Watched(plane.cloud.blobs.folder, meanwhile)
    stub = RoundServiceStub(plane.admin().channel)
    closed = (await stub.CloseRound(CloseRoundRequest(name=f"rounds/{round_id}"))).round
    assert closed.aggregate.batches == 2
    again = (await stub.CloseRound(CloseRoundRequest(name=f"rounds/{round_id}"))).round
    assert again == closed
    with plane.registry.reading() as session:
        audited = session.scalars(sa.select(AuditEntry.code).where(AuditEntry.method.endswith("CloseRound"))).all()
    assert audited == ["OK", "OK"]


async def test_a_round_closes_though_its_admin_does_not_wait_for_it(asked: tuple[Any, str]) -> None:
    plane, round_id = asked
    reading, gone = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def meanwhile(_: int) -> None:
        loop.call_soon_threadsafe(reading.set)
        gone.wait(10)

    plane.cloud.blobs = Watched(plane.cloud.blobs.folder, meanwhile)
    stub = RoundServiceStub(plane.admin().channel)
    call = stub.CloseRound(CloseRoundRequest(name=f"rounds/{round_id}"))
    async with asyncio.timeout(10):
        waiting = asyncio.ensure_future(_outcome(call))
        await reading.wait()
        call.cancel()
        await waiting
        await asyncio.sleep(0.2)  # until the server has heard
        gone.set()
        await _until_closed(plane, round_id)


async def _until_closed(plane: Any, round_id: str) -> None:
    while True:
        if await plane.cloud.read(lambda session: session.get_one(Round, round_id).state) is RoundState.CLOSED:
            return
        await asyncio.sleep(0.02)


async def _outcome(call: Any) -> bool:
    try:
        await call
    except (asyncio.CancelledError, Exception):  # noqa: BLE001 - however the client says so
        return False
    return True
