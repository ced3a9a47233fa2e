"""What the registry promises, on every database."""

import datetime as dt
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic import command
from google.protobuf.duration_pb2 import Duration
from sqlalchemy.orm import Session

from ebbflow.cloud.registry import answers, changes, jobs, paging, schema
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.engine import Registry, create_engine
from ebbflow.cloud.registry.tables import AuditEntry, Distillation, DistillationState, SavedAnswer, Student
from ebbflow.common.errors import EbbflowError, Reason

LEASE = dt.timedelta(seconds=60)


def add_student(registry: Registry, student_id: str = "faq") -> None:
    with registry.transaction() as session:
        session.add(
            Student(
                id=student_id,
                teacher="/models/teacher",
                architecture={},
                corpus_sha256="0" * 64,
                topics=["a", "b"],
                privacy_policy={},
                selector="",
                create_time=now(),
            )
        )


def queue(registry: Registry, count: int, start: dt.datetime) -> list[str]:
    ids = [f"job-{number:03d}" for number in range(count)]
    with registry.transaction() as session:
        for number, id_ in enumerate(ids):
            session.add(
                Distillation(
                    id=id_,
                    student_id="faq",
                    state=DistillationState.QUEUED,
                    recipe={},
                    mixture={},
                    base_release=None,
                    round_id=None,
                    create_time=start + dt.timedelta(seconds=number),
                    update_time=start,
                )
            )
    return ids


def test_migrations_lead_to_the_models_and_back(registry: Registry) -> None:
    with registry.engine.begin() as connection:
        command.check(schema.config(connection))
    with registry.engine.begin() as connection:
        command.downgrade(schema.config(connection), "base")
        command.upgrade(schema.config(connection), "head")
        command.check(schema.config(connection))


def test_upgrading_twice_changes_nothing(registry: Registry) -> None:
    assert schema.upgrade(registry.engine) == schema.newest()


def test_an_outdated_schema_is_refused_with_the_command_that_upgrades_it(registry_url: str) -> None:
    engine = create_engine(registry_url)
    with engine.begin() as connection:
        command.downgrade(schema.config(connection), "base")
    engine.dispose()
    with pytest.raises(EbbflowError) as caught:
        Registry.open(registry_url)
    assert caught.value.reason is Reason.SCHEMA_OUTDATED
    assert "ebbflow cloud db upgrade" in caught.value.cure


def test_a_schema_of_a_later_version_is_refused(registry_url: str) -> None:
    engine = create_engine(registry_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    with pytest.raises(EbbflowError) as caught:
        Registry.open(registry_url)
    assert caught.value.reason is Reason.SCHEMA_NEWER


def test_a_transaction_that_raises_leaves_nothing(registry: Registry) -> None:
    def interrupted() -> None:
        with registry.transaction() as session:
            changes.bump(session, "plan")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        interrupted()
    with registry.reading() as session:
        assert changes.revisions(session) == {}


def test_naive_times_are_refused(registry: Registry) -> None:
    with pytest.raises(sa.exc.StatementError), registry.transaction() as session:
        session.add(
            AuditEntry(create_time=dt.datetime(2026, 1, 1), actor="a", method="m", resource="r", code="OK")  # noqa: DTZ001
        )


def test_times_come_back_aware_and_exact(registry: Registry) -> None:
    time = dt.datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=dt.timezone(dt.timedelta(hours=5)))
    with registry.transaction() as session:
        session.add(AuditEntry(create_time=time, actor="a", method="m", resource="r", code="OK"))
    with registry.reading() as session:
        assert session.scalars(sa.select(AuditEntry)).one().create_time == time


def test_changes_count_up(registry: Registry) -> None:
    for _ in range(3):
        with registry.transaction() as session:
            changes.bump(session, "plan")
    with registry.reading() as session:
        assert changes.revisions(session) == {"plan": 3}


@pytest.mark.parametrize("descending", [False, True])
def test_pages_cover_every_row_once_though_rows_come_and_go(registry: Registry, descending: bool) -> None:
    add_student(registry)
    ids = queue(registry, 25, now())
    seen: list[str] = []
    token = ""
    while True:
        with registry.transaction() as session:
            rows, token = paging.page(
                session,
                sa.select(Distillation),
                [Distillation.create_time, Distillation.id],
                10,
                token,
                descending=descending,
            )
            seen += [row.id for row in rows]
            session.execute(sa.delete(Distillation).where(Distillation.id == rows[0].id))
        if not token:
            break
    assert seen == (ids[::-1] if descending else ids)


@pytest.mark.parametrize("token", ["x", "e30=", "WzFd", "WyJ4IiwgMV0="])
def test_a_foreign_page_token_is_refused(registry: Registry, token: str) -> None:
    with registry.reading() as session, pytest.raises(EbbflowError) as caught:
        paging.page(session, sa.select(Distillation), [Distillation.create_time, Distillation.id], 10, token)
    assert caught.value.reason is Reason.PAGE_TOKEN_INVALID


def test_a_negative_page_size_is_refused(registry: Registry) -> None:
    with registry.reading() as session, pytest.raises(EbbflowError) as caught:
        paging.page(session, sa.select(Student), [Student.id], -1, "")
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_a_retried_request_gets_the_first_answer(registry: Registry) -> None:
    acts: list[int] = []

    def act() -> Duration:
        acts.append(1)
        return Duration(seconds=len(acts))

    request_id = str(uuid.uuid4())

    def ask(_number: int) -> int:
        with registry.transaction() as session:
            answer = answers.remember(session, "admins/ada", request_id, Duration(seconds=9), now(), act, Duration)
        return answer.seconds

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(8))) == {1}
    with registry.transaction() as session, pytest.raises(EbbflowError) as caught:
        answers.remember(session, "admins/ada", request_id, Duration(seconds=8), now(), act, Duration)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    with registry.transaction() as session:
        other = answers.remember(session, "admins/bob", request_id, Duration(), now(), act, Duration)
        assert other.seconds == 2
    with registry.transaction() as session:
        assert answers.forget(session, now() + LEASE) == 2
        assert session.scalars(sa.select(SavedAnswer)).all() == []


def test_a_request_id_that_is_no_uuid_is_refused(registry: Registry) -> None:
    with registry.transaction() as session, pytest.raises(EbbflowError) as caught:
        answers.remember(session, "admins/ada", "again", Duration(), now(), Duration, Duration)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_many_workers_claim_every_job_once_and_in_order(registry: Registry) -> None:
    add_student(registry)
    start = now()
    ids = queue(registry, 40, start)

    def work(worker: int) -> list[str]:
        mine: list[str] = []
        while True:
            with registry.transaction() as session:
                job = jobs.claim(session, f"worker-{worker}", start, LEASE)
            if job is None:
                return mine
            mine.append(job.id)

    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(work, range(8)))
    assert sorted(id_ for mine in claimed for id_ in mine) == ids
    assert all(mine == sorted(mine) for mine in claimed)


def test_a_dead_workers_job_is_taken_over_and_the_dead_one_is_fenced(registry: Registry) -> None:
    add_student(registry)
    start = now()
    queue(registry, 1, start)
    with registry.transaction() as session:
        first = jobs.claim(session, "first", start, LEASE)
    assert first is not None
    with registry.transaction() as session:
        assert jobs.claim(session, "second", start + LEASE / 2, LEASE) is None
    with registry.transaction() as session:
        second = jobs.claim(session, "second", start + LEASE * 2, LEASE)
    assert second is not None
    assert second.attempt == 2

    def beat(session: Session, job: Distillation) -> None:
        jobs.heartbeat(session, job, start, LEASE, step=1, loss=1.0, tokens_per_second=1.0, eta_time=None)

    late: list[Callable[[Session], None]] = [
        lambda session: beat(session, first),
        lambda session: jobs.finish(session, first, start, 1),
        lambda session: jobs.fail(session, first, start, "x"),
    ]
    for act in late:
        with pytest.raises(EbbflowError) as caught, registry.transaction() as session:
            act(session)
        assert caught.value.reason is Reason.LEASE_LOST
    with registry.transaction() as session:
        beat(session, second)
        jobs.finish(session, second, start + LEASE * 3, 1)
    with registry.reading() as session:
        row = session.get_one(Distillation, "job-000")
        assert (row.state, row.release_number, row.leased_by) == (DistillationState.SUCCEEDED, 1, None)


def test_a_lease_from_a_clock_that_ran_ahead_is_taken_over(registry: Registry) -> None:
    add_student(registry)
    start = now()
    queue(registry, 1, start)
    with registry.transaction() as session:
        assert jobs.claim(session, "a year ahead", start + dt.timedelta(days=365), LEASE) is not None
    with registry.transaction() as session:
        second = jobs.claim(session, "right", start, LEASE)
    assert second is not None
    assert (second.leased_by, second.attempt) == ("right", 2)


@pytest.mark.parametrize(
    ("held", "asked"), [(dt.timedelta(hours=23), LEASE), (dt.timedelta(days=3), dt.timedelta(days=3))]
)
def test_a_long_lease_is_let_be(registry: Registry, held: dt.timedelta, asked: dt.timedelta) -> None:
    add_student(registry)
    start = now()
    queue(registry, 1, start)
    with registry.transaction() as session:
        assert jobs.claim(session, "first", start, held) is not None
    with registry.transaction() as session:
        assert jobs.claim(session, "second", start, asked) is None
