"""How private texts leave the cloud, and what training on them several times adds up to, on both databases."""

import asyncio
import datetime as dt
import json
import uuid
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1 import distillation_pb2 as pb
from ebbflow.api.v1 import ledger_pb2, student_pb2
from ebbflow.api.v1.distillation_pb2_grpc import DistillationServiceStub
from ebbflow.api.v1.ledger_pb2_grpc import LedgerServiceStub
from ebbflow.api.v1.student_pb2_grpc import StudentServiceStub
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.distillation import private_texts
from ebbflow.cloud.distillation.private_accounting import pld_epsilon
from ebbflow.cloud.distillation.private_recipe import PrivateRecipe
from ebbflow.cloud.processes.tick import Ticker, jobs_of
from ebbflow.cloud.registry import clock, locks
from ebbflow.cloud.registry.tables import (
    Delta,
    Distillation,
    DistillationState,
    FeedbackBatch,
    Release,
    Round,
    RoundState,
    Student,
)
from ebbflow.common.errors import EbbflowError, Reason

Plane = Any

RECIPE = pb.Recipe(steps=10, batch_size=4, sequence_length=16, learning_rate=1e-3, kl_weight=0.5)
TRAINING = pb.PrivateTraining(epsilon=4.0, steps=20, batch_size=8, corpus_size=100, learning_rate=1e-3)
CORPUS = json.dumps({"topic": "t", "text": "open", "split": "train"}).encode()
LINES = [json.dumps({"topic": "t", "text": f"text {number}"}).encode() + b"\n" for number in range(3)]
DAY = dt.timedelta(days=1)


def stored(plane: Plane, lines: list[bytes] = LINES) -> str:
    sha256: str = plane.cloud.blobs.put(lines).sha256
    return sha256


def stub_of(plane: Plane, role: str = "operator") -> Any:
    return DistillationServiceStub(plane.admin(role).channel)


async def create(plane: Plane, sha256: str, stub: Any = None) -> pb.Distillation:
    wanted = pb.Distillation(student="students/faq", recipe=RECIPE, private_training=TRAINING)
    wanted.private_corpus_sha256 = bytes.fromhex(sha256)
    answer = await (stub or stub_of(plane)).CreateDistillation(pb.CreateDistillationRequest(distillation=wanted))
    made: pb.Distillation = answer.distillation
    return made


async def delete(plane: Plane, name: str = "", sha256: str = "", stub: Any = None) -> bool:
    request = pb.DeletePrivateCorpusRequest(name=name, private_corpus_sha256=bytes.fromhex(sha256))
    answer = await (stub or stub_of(plane)).DeletePrivateCorpus(request)
    return bool(answer.deleted)


async def refusal(plane: Plane, name: str = "", sha256: str = "", role: str = "operator") -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        await delete(plane, name, sha256, stub_of(plane, role))
    return caught.value


async def shown(plane: Plane, name: str) -> pb.Distillation:
    answer = await stub_of(plane, "viewer").GetDistillation(pb.GetDistillationRequest(name=name))
    found: pb.Distillation = answer.distillation
    return found


def change(plane: Plane, name: str, **values: Any) -> None:
    with plane.registry.transaction() as session:
        session.execute(
            sa.update(Distillation).where(Distillation.id == name.removeprefix("distillations/")).values(**values)
        )


def end(plane: Plane, name: str, state: DistillationState = DistillationState.SUCCEEDED) -> None:
    change(plane, name, state=state)


async def test_private_texts_of_ended_distillations_are_deleted_once_and_noted_on_all_of_them(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    first, second = await create(plane, sha256), await create(plane, sha256)
    end(plane, first.name)
    end(plane, second.name, DistillationState.FAILED)
    assert not (await shown(plane, first.name)).HasField("private_corpus_delete_time")
    assert await delete(plane, first.name)
    assert not plane.cloud.blobs.has(sha256)
    noted = [(await shown(plane, each.name)).private_corpus_delete_time for each in (first, second)]
    assert noted[0] == noted[1]
    assert noted[0].seconds > 0
    assert not await delete(plane, second.name), "there was nothing left"
    assert (await shown(plane, second.name)).private_corpus_delete_time == noted[1], "the first time counts"


async def test_a_deletion_is_audited_under_the_distillation_and_never_under_the_hash(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    made = await create(plane, sha256)
    await refusal(plane, made.name)
    end(plane, made.name)
    await delete(plane, made.name)
    await delete(plane, sha256=sha256)
    listed = await LedgerServiceStub(plane.admin("viewer").channel).ListAuditEntries(
        ledger_pb2.ListAuditEntriesRequest()
    )
    kept = [entry for entry in listed.audit_entries if entry.method == "DistillationService/DeletePrivateCorpus"]
    assert sorted((entry.resource, entry.code) for entry in kept) == sorted(
        [(made.name, "FAILED_PRECONDITION"), (made.name, "OK"), ("", "OK")]
    )
    assert sha256 not in str(listed)


@pytest.mark.parametrize("state", [DistillationState.QUEUED, DistillationState.RUNNING])
async def test_texts_that_another_distillation_needs_stay_until_it_is_cancelled(
    plane: Plane, state: DistillationState
) -> None:
    plane.student()
    sha256 = stored(plane)
    ended, living = await create(plane, sha256), await create(plane, sha256)
    end(plane, ended.name)
    change(plane, living.name, state=state)
    for request in ({"name": ended.name}, {"sha256": sha256}):
        error = await refusal(plane, **request)
        assert (error.reason, living.name in str(error)) == (Reason.STATE_CONFLICT, True)
        assert sha256 not in str(error)
    assert plane.cloud.blobs.has(sha256)
    await stub_of(plane).CancelDistillation(pb.CancelDistillationRequest(name=living.name))
    assert await delete(plane, ended.name)


def as_corpus(plane: Plane, sha256: str) -> Any:
    return sa.update(Student).values(corpus_sha256=sha256)


def as_release(plane: Plane, sha256: str) -> Any:
    return sa.update(Release).values(targets={"file": {"sha256": sha256, "size_bytes": 1, "kind": "bf16"}})


def as_delta(plane: Plane, sha256: str) -> Any:
    names = {"base_sha256": "a" * 64, "target_sha256": "b" * 64, "blob_sha256": sha256}
    return sa.insert(Delta).values(**names, format="f", size_bytes=1, statistics={}, create_time=clock.now())


def as_average(plane: Plane, sha256: str) -> Any:
    blob = b64encode(bytes.fromhex(sha256)).decode()
    return sa.update(Round).values(aggregate={"adapter": {"blobSha256": blob}})


def as_update(plane: Plane, sha256: str) -> Any:
    row = {"id": "b", "round_id": "r", "agent_id": "kiosk", "batch_sha256": "c" * 64, "noisy": [], "signature": b"s"}
    return sa.insert(FeedbackBatch).values(**row, create_time=clock.now(), payload_sha256=sha256, base_release=1)


@pytest.mark.parametrize("use", [as_corpus, as_release, as_delta, as_average, as_update])
async def test_a_file_that_is_something_else_too_is_not_deleted(plane: Plane, use: Any) -> None:
    plane.student()
    plane.release()
    plane.agent("kiosk")
    sha256 = stored(plane)
    made = await create(plane, sha256)
    end(plane, made.name)
    row = Round(
        id="r",
        student_id="faq",
        state=RoundState.CLOSED,
        plan=b"",
        signature=b"",
        key_id="",
        window="2026-01-01",
        end_time=clock.now(),
        create_time=clock.now(),
    )
    with plane.registry.transaction() as session:
        session.add(row)
        session.flush()
        session.execute(use(plane, sha256))
    error = await refusal(plane, made.name)
    assert (error.reason, "the same file is" in str(error)) == (Reason.STATE_CONFLICT, True)
    later = clock.now() + 9 * DAY
    assert private_texts.Forgetter(plane.registry, plane.cloud.blobs, DAY).forget(later) == 0
    assert plane.cloud.blobs.has(sha256)
    assert not (await shown(plane, made.name)).HasField("private_corpus_delete_time")


async def test_what_a_student_learns_openly_is_refused_as_private_texts(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    with plane.registry.transaction() as session:
        session.execute(sa.update(Student).values(corpus_sha256=sha256))
    with pytest.raises(EbbflowError) as caught:
        await create(plane, sha256)
    assert (caught.value.reason, "students/faq" in str(caught.value)) == (Reason.INVALID_REQUEST, True)


async def test_an_upload_that_no_distillation_came_of_is_deleted_by_its_hash(plane: Plane) -> None:
    sha256 = stored(plane)
    assert await delete(plane, sha256=sha256)
    assert not plane.cloud.blobs.has(sha256)
    assert not await delete(plane, sha256=sha256)


async def test_a_deletion_that_names_nothing_or_comes_from_a_viewer_is_refused(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    made = await create(plane, sha256)
    end(plane, made.name)
    public = await stub_of(plane).CreateDistillation(
        pb.CreateDistillationRequest(distillation=pb.Distillation(student="students/faq", recipe=RECIPE))
    )
    assert (await refusal(plane)).reason is Reason.INVALID_REQUEST
    assert (await refusal(plane, made.name, sha256)).reason is Reason.INVALID_REQUEST
    assert (await refusal(plane, sha256="ab")).metadata["field"] == "private_corpus_sha256"
    assert (await refusal(plane, "distillations/none")).reason is Reason.DISTILLATION_NOT_FOUND
    assert "no private texts" in str(await refusal(plane, public.distillation.name))
    assert (await refusal(plane, made.name, role="viewer")).reason is Reason.ROLE_INSUFFICIENT
    assert plane.cloud.blobs.has(sha256)


async def test_an_order_on_deleted_texts_says_what_to_do_and_works_once_they_are_there_again(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    first = await create(plane, sha256)
    end(plane, first.name)
    await delete(plane, first.name)
    with pytest.raises(EbbflowError) as caught:
        await create(plane, sha256)
    assert (caught.value.reason, sha256 in str(caught.value)) == (Reason.BLOB_NOT_FOUND, False)
    assert "order the distillation again with the file" in str(caught.value)
    again = await create(plane, stored(plane))
    assert list(again.private_account.distillations) == [first.name, again.name], "what was learnt is not forgotten"
    assert not (await shown(plane, first.name)).HasField("private_corpus_delete_time"), "they are there again"
    end(plane, again.name)
    assert await delete(plane, again.name)
    assert (await shown(plane, first.name)).HasField("private_corpus_delete_time")


async def test_an_order_that_races_with_a_deletion_has_its_texts_or_is_refused(plane: Plane) -> None:
    plane.student()
    stub = stub_of(plane)
    outcomes = set()
    for number in range(12):
        sha256 = stored(plane, [*LINES * 400, json.dumps({"topic": "t", "text": str(number)}).encode()])
        made, _ = await asyncio.gather(
            create(plane, sha256, stub), delete(plane, sha256=sha256, stub=stub), return_exceptions=True
        )
        assert plane.cloud.blobs.has(sha256) == isinstance(made, pb.Distillation)
        outcomes.add(type(made))
    assert outcomes <= {pb.Distillation, EbbflowError}


@pytest.mark.parametrize("state", [DistillationState.SUCCEEDED, DistillationState.FAILED, DistillationState.CANCELLED])
async def test_texts_go_by_themselves_some_time_after_the_last_distillation_on_them_has_ended(
    plane: Plane, state: DistillationState
) -> None:
    plane.student()
    now, sha256, kept = clock.now(), stored(plane), stored(plane, LINES[:1])
    rows = [await create(plane, sha256) for _ in range(2)]
    living = await create(plane, kept)
    for made, ago in zip(rows, (3, 1), strict=True):
        change(plane, made.name, state=state, update_time=now - ago * DAY)
    change(plane, living.name, state=DistillationState.RUNNING, update_time=now - 9 * DAY)

    def forget(at: dt.datetime) -> int:
        return private_texts.Forgetter(plane.registry, plane.cloud.blobs, 2 * DAY).forget(at)

    assert (forget(now), plane.cloud.blobs.has(sha256)) == (0, True)
    assert (forget(now + DAY), plane.cloud.blobs.has(sha256)) == (1, False)
    assert (await shown(plane, rows[0].name)).private_corpus_delete_time.ToDatetime(dt.UTC) == now + DAY
    assert forget(now + 2 * DAY) == 0
    assert plane.cloud.blobs.has(kept), "a worker may be silent for long"


class Locking(LocalBlobStore):
    """A blob store that has a lock on one file, as buckets can."""

    def __init__(self, folder: Path, locked: str) -> None:
        super().__init__(folder)
        self.locked = locked

    def delete(self, sha256: str) -> None:
        if sha256 == self.locked:
            raise PermissionError(sha256)
        super().delete(sha256)


async def test_a_file_that_cannot_be_deleted_keeps_no_other_one_and_is_not_named(
    plane: Plane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.student()
    files = sorted(stored(plane, [line]) for line in LINES)
    for sha256 in files:
        end(plane, (await create(plane, sha256)).name)
    store = Locking(plane.cloud.blobs.folder, files[0])
    forgetter = private_texts.Forgetter(plane.registry, store, DAY)
    now = clock.now() + 2 * DAY
    assert forgetter.forget(now) == len(files) - 1
    assert [store.has(sha256) for sha256 in files] == [True, False, False]
    assert "private texts could not be deleted (PermissionError)" in caplog.text
    assert not any(sha256 in caplog.text for sha256 in files)
    store.locked = ""
    assert forgetter.forget(now + dt.timedelta(minutes=59)) == 0, "it is tried again, but not all the time"
    assert forgetter.forget(now + dt.timedelta(minutes=60)) == 1


async def test_what_is_something_else_too_is_looked_at_once_an_hour(plane: Plane) -> None:
    plane.student()
    sha256 = stored(plane)
    end(plane, (await create(plane, sha256)).name)
    with plane.registry.transaction() as session:
        session.execute(as_corpus(plane, sha256))
    forgetter = private_texts.Forgetter(plane.registry, plane.cloud.blobs, DAY)
    now, asked = clock.now() + 2 * DAY, []
    sa.event.listen(plane.registry.engine, "before_cursor_execute", lambda *all_: asked.append(all_[2]))
    assert forgetter.forget(now) == 0
    assert any("EXISTS" in statement for statement in asked)
    asked.clear()
    assert forgetter.forget(now + dt.timedelta(minutes=59)) == 0
    assert not any("EXISTS" in statement for statement in asked)
    with plane.registry.transaction() as session:
        session.execute(sa.update(Student).values(corpus_sha256="0" * 64))
    assert forgetter.forget(now + dt.timedelta(minutes=60)) == 1


async def test_a_student_that_is_made_while_its_corpus_is_deleted_is_refused(plane: Plane) -> None:
    sha256 = plane.cloud.blobs.put([CORPUS]).sha256
    wanted = student_pb2.Student(teacher="/t", corpus_sha256=bytes.fromhex(sha256))
    wanted.architecture.MergeFrom(student_pb2.Architecture(hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    stub = StudentServiceStub(plane.admin().channel)
    with plane.registry.transaction() as session:
        locks.exclusive(session, f"private texts {sha256}")
        session.scalar(sa.select(1))  # now SQLite has begun to write, too
        making = stub.CreateStudent(student_pb2.CreateStudentRequest(student_id="late", student=wanted))
        await asyncio.sleep(0.3)
        assert private_texts.delete(session, plane.cloud.blobs, sha256, clock.now())
    with pytest.raises(EbbflowError) as caught:
        await making
    assert (caught.value.reason, sha256 in str(caught.value)) == (Reason.BLOB_NOT_FOUND, False)
    with plane.registry.reading() as session:
        assert session.get(Student, "late") is None


async def test_the_control_plane_deletes_them_by_itself_a_day_later(plane: Plane) -> None:
    plane.student()
    now, old, young = clock.now(), stored(plane), stored(plane, LINES[:1])
    for sha256, hours in ((old, 25), (young, 23)):
        made = await create(plane, sha256)
        change(plane, made.name, state=DistillationState.SUCCEEDED, update_time=now - dt.timedelta(hours=hours))
    (job,) = [job for job in jobs_of(plane.cloud) if job.name == "forgetting private texts"]
    await Ticker(plane.cloud, plane.hub, [job]).tick(now)
    assert (plane.cloud.blobs.has(old), plane.cloud.blobs.has(young)) == (False, True)


async def test_an_account_adds_up_what_began_and_what_waits_and_nothing_else(plane: Plane) -> None:
    plane.student()
    sha256, other = stored(plane), stored(plane, LINES[:2])
    rows = [await create(plane, sha256) for _ in range(5)]
    alone = await create(plane, other)
    assert (list(alone.private_account.distillations), alone.private_account.epsilon) == ([alone.name], 4.0)
    assert rows[1].private_account.epsilon == 8.0, "of two that have not begun the sum"
    done = pb.PrivateTraining()
    done.CopyFrom(TRAINING)
    done.noise_multiplier = 1.0
    done.pld_epsilon = pld_epsilon(PrivateRecipe.from_json(MessageToDict(TRAINING), 16), 1.0)
    begun = MessageToDict(done)
    change(plane, rows[0].name, state=DistillationState.SUCCEEDED, private_training=begun)
    change(plane, rows[1].name, state=DistillationState.FAILED, private_training=begun)
    change(plane, rows[2].name, state=DistillationState.FAILED)
    change(plane, rows[3].name, state=DistillationState.CANCELLED)
    account = (await shown(plane, rows[0].name)).private_account
    assert list(account.distillations) == [rows[0].name, rows[1].name, rows[4].name]
    assert account.delta == pytest.approx(2e-6), "of those that began, and of the one that waits"
    assert 4.0 + 1.2 * done.pld_epsilon < account.epsilon < 4.0 + 1.6 * done.pld_epsilon
    assert sha256 not in str(account)
    listed = await stub_of(plane).ListDistillations(pb.ListDistillationsRequest())
    assert not any(each.HasField("private_account") for each in listed.distillations)


async def test_a_repeated_order_gets_its_account_again(plane: Plane) -> None:
    plane.student()
    wanted = pb.Distillation(student="students/faq", recipe=RECIPE, private_training=TRAINING)
    wanted.private_corpus_sha256 = bytes.fromhex(stored(plane))
    request = pb.CreateDistillationRequest(distillation=wanted, request_id=str(uuid.uuid4()))
    stub = stub_of(plane)
    answers = [(await stub.CreateDistillation(request)).distillation for _ in range(2)]
    assert answers[0] == answers[1]
    assert list(answers[0].private_account.distillations) == [answers[0].name]
