"""Rounds of adapter updates and what is kept of them, on every database."""

import datetime as dt
import hashlib
from pathlib import Path
from typing import Any

import adapter_world
import pytest
import sqlalchemy as sa
from feedback_world import AGENTS, DAY, NOW, SIGNER, Device, add_fleet, close_all, open_round, refusals

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1.round_pb2 import AdapterSettings, OpenRoundRequest
from ebbflow.api.v1.round_pb2_grpc import RoundServiceStub
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.feedback import policies, retention, round_rows, rounds
from ebbflow.cloud.feedback.plans import PlanSigner
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import FeedbackBatch, PrivacyAccount, PrivacyEntry, Release, Round, Student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy import release
from ebbflow.common.privacy.gaussian import DiscreteGaussian
from ebbflow.common.privacy.vector import AdapterContribution, Contribution
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import variant_path

ADAPTER = adapter_world.adapter_plan(adapter_world.config(), rank=1)


@pytest.fixture
def fleet(registry: Registry) -> Registry:
    add_fleet(registry)
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        policy = pb.PrivacyPolicy(epsilon=8.0, allow_adapters=True, retention_days=10)
        policies.append(session, student, policy, "adapters", PlanSigner(SIGNER), NOW)
    return registry


def open_adapter_round(registry: Registry, **more: Any) -> Round:
    with registry.transaction() as session:
        student = session.get_one(Student, "faq")
        signer = PlanSigner(SIGNER)
        return rounds.open_round(session, student, [], signer, NOW, adapter=lambda _policy, _members: ADAPTER, **more)


def answer(registry: Registry, device: Device) -> pb.SignedBatch:
    change = [0] * ADAPTER.dimension
    change[0] = ADAPTER.scale
    return device.answer(registry, [AdapterContribution(change)])


def kept(registry: Registry) -> list[FeedbackBatch]:
    with registry.reading() as session:
        return list(session.scalars(sa.select(FeedbackBatch).order_by(FeedbackBatch.agent_id)))


def files(blobs: LocalBlobStore) -> set[str]:
    return {path.name for path in blobs.folder.rglob("*") if path.is_file()}


def test_an_update_is_a_file_and_its_row_holds_the_null_bins(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    plan = round_rows.plan_of(open_adapter_round(fleet))
    assert (len(plan.bins), plan.null_bins, plan.mechanism.sensitivity_squared) == (0, 256, ADAPTER.scale**2)
    signed = answer(fleet, devices[0])
    for _ in range(2):
        devices[0].submit(fleet, signed, blobs=blobs)
    [row] = kept(fleet)
    batch = pb.FeedbackBatch.FromString(signed.batch)
    assert row.noisy == list(batch.noisy[ADAPTER.dimension :])
    assert row.payload_sha256 == row.batch_sha256 == hashlib.sha256(signed.batch).hexdigest()
    assert files(blobs) == {row.payload_sha256}
    assert blobs.read(row.payload_sha256) == signed.batch


def test_nothing_of_a_refused_update_is_stored(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_adapter_round(fleet)
    good = answer(fleet, devices[0])
    changes = (
        lambda batch: batch.noisy.append(1),
        lambda batch: batch.noisy.__setitem__(0, 10**12),
        lambda batch: setattr(batch, "base_release", ADAPTER.release + 1),
        lambda batch: batch.noisy.__setitem__(slice(ADAPTER.dimension, None), [0] * 256),
    )
    for change in changes:
        with pytest.raises(EbbflowError):
            devices[0].submit(fleet, devices[0].resign(good, change), blobs=blobs)
    monkeypatch.setattr(release, "DiscreteGaussian", lambda variance: DiscreteGaussian(variance / 4))
    with pytest.raises(EbbflowError):
        devices[1].submit(fleet, answer(fleet, devices[1]), blobs=blobs)
    words = [why for _, why in refusals(fleet)]
    assert words == ["length", "value_range", "base_release", "under_noised", "under_noised"]
    assert (files(blobs), kept(fleet)) == (set(), [])


def test_an_update_that_finds_no_budget_leaves_no_file(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    round_ = open_adapter_round(fleet)
    plan, signed = round_rows.plan_of(round_), answer(fleet, devices[0])
    with fleet.transaction() as session:
        spent: dict[str, Any] = {
            "rho_cap_nano": plan.policy.rho_cap_nano,
            "rho_spent_nano": plan.policy.rho_cap_nano,
            "delta": 1e-6,
        }
        session.add(PrivacyAccount(agent_id=AGENTS[0], student_id="faq", window=plan.window, **spent))
    with pytest.raises(EbbflowError) as caught:
        devices[0].submit(fleet, signed, blobs=blobs)
    assert caught.value.reason is Reason.BUDGET_EXHAUSTED
    assert (files(blobs), kept(fleet)) == (set(), [])


def test_a_disk_that_is_full_charges_nothing(fleet: Registry, devices: list[Device], tmp_path: Path) -> None:
    class Full(LocalBlobStore):
        def put(self, chunks: object) -> Any:
            raise EbbflowError(Reason.DISK_FULL, "no space")

    open_adapter_round(fleet)
    signed = answer(fleet, devices[0])
    with pytest.raises(EbbflowError) as caught:
        devices[0].submit(fleet, signed, blobs=Full(tmp_path / "full"))
    assert caught.value.reason is Reason.DISK_FULL
    with fleet.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(PrivacyEntry)) == 0
    assert (kept(fleet), refusals(fleet)) == ([], [])
    devices[0].submit(fleet, signed, blobs=LocalBlobStore(tmp_path / "more"))
    assert len(kept(fleet)) == 1


def test_a_round_of_updates_closes_with_an_average(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    round_ = open_adapter_round(fleet)
    for device in devices:
        change = AdapterContribution([ADAPTER.scale] + [0] * (ADAPTER.dimension - 1))
        signed = device.answer(fleet, [change] * 20)
        device.submit(fleet, device.resign(signed, lambda batch: setattr(batch, "base_release", 1)), blobs=blobs)
    closed = rounds.close_overdue(fleet, NOW + 2 * DAY, blobs)
    assert closed == [round_.id]
    with fleet.reading() as session:
        result = round_rows.aggregate_of(session.get_one(Round, round_.id))
    assert (result.batches, result.adapter.agents, result.adapter.release) == (3, 3, 1)
    assert blobs.has(result.adapter.blob_sha256.hex())
    assert list(result.under_noised_agents) == []


def test_batches_are_forgotten_when_their_time_is_over(
    fleet: Registry, devices: list[Device], blobs: LocalBlobStore
) -> None:
    votes = open_round(fleet)
    for device in devices:
        device.submit(fleet, device.answer(fleet, [Contribution(0)]))
    close_all(fleet)
    updates = open_adapter_round(fleet)
    for device in devices:
        device.submit(fleet, answer(fleet, device), blobs=blobs)
    rounds.close_overdue(fleet, NOW + 2 * DAY, blobs)
    with fleet.reading() as session:
        sums = {id_: session.get_one(Round, id_).aggregate for id_ in (votes.id, updates.id)}
    average = round_rows.aggregate_of(Round(aggregate=sums[updates.id], **_EMPTY)).adapter.blob_sha256.hex()
    before = kept(fleet)

    assert retention.forget(fleet, blobs, NOW + DAY + 9 * DAY) == []
    assert [row.noisy for row in kept(fleet)] == [row.noisy for row in before]
    assert sorted(retention.forget(fleet, blobs, NOW + DAY + 10 * DAY)) == sorted([votes.id, updates.id])
    assert retention.forget(fleet, blobs, NOW + 300 * DAY) == []

    rows = kept(fleet)
    assert [(row.noisy, row.payload_sha256, row.signature) for row in rows] == [([], "", b"")] * 6
    assert [row.batch_sha256 for row in rows] == [row.batch_sha256 for row in before]
    assert files(blobs) == {average}
    with fleet.reading() as session:
        assert {id_: session.get_one(Round, id_).aggregate for id_ in sums} == sums
        assert session.scalar(sa.select(sa.func.count()).select_from(PrivacyEntry)) == 6


def test_an_open_round_is_not_forgotten(fleet: Registry, devices: list[Device], blobs: LocalBlobStore) -> None:
    open_round(fleet)
    devices[0].submit(fleet, devices[0].answer(fleet, []))
    assert retention.forget(fleet, blobs, NOW + 300 * DAY) == []
    assert all(row.noisy for row in kept(fleet))


_EMPTY: dict[str, Any] = {
    "id": "",
    "student_id": "",
    "state": "closed",
    "plan": b"",
    "signature": b"",
    "key_id": "",
    "window": "",
    "end_time": dt.datetime.now(dt.UTC),
    "create_time": dt.datetime.now(dt.UTC),
}


# Over gRPC


@pytest.fixture
def ready(plane: Any) -> Any:
    """A plane with a policy that allows adapters, and a release that one agent serves."""
    plane.student()
    plane.release()
    plane.agent("kiosk-7")
    plane.roll_out("faq", 1)
    plane.serve("kiosk-7", "faq", 1)
    variant = ManifestVariant(variant_path("faq", 1, "int8"), 7, 1.0)
    config = adapter_world.config().to_hf()
    manifest = Manifest("faq", 1, config, {"int8": variant}, Probe(((1, 2, 3),), 0.1)).to_json()
    with plane.registry.transaction() as session:
        row = session.get_one(Release, ("faq", 1))
        sha256 = plane.cloud.blobs.put([manifest]).sha256
        row.targets = {
            path: {**file, "sha256": sha256} if file["kind"] == "manifest" else file
            for path, file in row.targets.items()
        }
        student = session.get_one(Student, "faq")
        policy = pb.PrivacyPolicy(epsilon=8.0, allow_adapters=True)
        policies.append(session, student, policy, "adapters", plane.cloud.plan_signer, NOW)
    return plane


def ask(**settings: Any) -> OpenRoundRequest:
    return OpenRoundRequest(student="students/faq", adapter=AdapterSettings(**settings))


async def test_an_operator_opens_a_round_of_updates(ready: Any) -> None:
    stub = RoundServiceStub(ready.admin().channel)
    plan = (await stub.OpenRound(ask(rank=1, modules=["q_proj"], users_per_agent=500))).round.plan
    assert (plan.adapter.release, plan.adapter.rank, list(plan.adapter.modules)) == (1, 1, ["q_proj"])
    assert plan.mechanism.sensitivity_squared == plan.adapter.scale**2
    assert (len(plan.bins), plan.null_bins) == (0, 256)


async def test_a_round_that_cannot_be_heard_is_refused_with_the_agents_that_it_needs(ready: Any) -> None:
    stub = RoundServiceStub(ready.admin().channel)
    with pytest.raises(EbbflowError, match=r"\d+ such agents are needed") as caught:
        await stub.OpenRound(ask())
    assert caught.value.reason is Reason.SIGNAL_TOO_WEAK
    assert int(caught.value.metadata["agents_needed"]) > 1
    with ready.registry.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Round)) == 0


async def test_a_policy_that_allows_no_adapters_refuses_them(ready: Any) -> None:
    with ready.registry.transaction() as session:
        student = session.get_one(Student, "faq")
        policies.append(session, student, pb.PrivacyPolicy(), "no more", ready.cloud.plan_signer, NOW)
    with pytest.raises(EbbflowError) as caught:
        await RoundServiceStub(ready.admin().channel).OpenRound(ask(users_per_agent=500))
    assert caught.value.reason is Reason.STATE_CONFLICT
