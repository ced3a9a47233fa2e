"""How long the registry waits for others on PostgreSQL, and what it says when it gives up."""

import dataclasses
import datetime as dt
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.processes.tick import Ticker
from ebbflow.cloud.registry import changes, locks, schema
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.engine import Registry, create_engine
from ebbflow.cloud.registry.tables import Agent, Release, ReleaseState
from ebbflow.common.errors import EbbflowError, Reason

Plane = Any
pytestmark = pytest.mark.parametrize("registry_url", ["postgresql"], indirect=True)


@contextmanager
def opened(url: str, **query: str) -> Iterator[Registry]:
    """The registry as an operator opens it whose URL says more."""
    registry = Registry.open(sa.make_url(url).update_query_dict(query).render_as_string(hide_password=False))
    try:
        yield registry
    finally:
        registry.close()


def reason_of(act: Callable[[], object]) -> Reason:
    with pytest.raises(EbbflowError) as caught:
        act()
    return caught.value.reason


def write(registry: Registry) -> None:
    with registry.transaction() as session:
        changes.bump(session, "plan")


def take(registry: Registry) -> None:
    with registry.transaction() as session:
        locks.exclusive(session, "plan")


def show(session: Session, name: str) -> object:
    return session.execute(sa.text(f"SHOW {name}")).scalar()


@pytest.mark.parametrize("act", [write, take])
def test_a_lock_that_another_process_holds_is_not_waited_for_for_ever(
    registry_url: str, registry: Registry, act: Callable[[Registry], None]
) -> None:
    with opened(registry_url, options="-c lock_timeout=300ms") as hasty:
        write(hasty)
        with registry.transaction() as session:
            changes.bump(session, "plan")
            locks.exclusive(session, "plan")
            begin_s = time.monotonic()
            assert reason_of(lambda: act(hasty)) is Reason.DATABASE_UNAVAILABLE
            assert time.monotonic() - begin_s < 5
        act(hasty)


def test_a_process_that_froze_within_a_transaction_loses_it(registry_url: str, registry: Registry) -> None:
    with opened(registry_url, options="-c idle_in_transaction_session_timeout=300ms") as frozen:

        def freeze() -> None:
            with frozen.transaction() as session:
                changes.bump(session, "plan")
                write(registry)  # waits for the row until the server takes it from the frozen one
                session.execute(sa.text("SELECT 1"))

        assert reason_of(freeze) is Reason.DATABASE_UNAVAILABLE
        write(frozen)
    with registry.reading() as session:
        assert changes.revisions(session) == {"plan": 2}


def test_a_database_that_is_read_only_does_not_answer_until_it_can_be_written_again(
    registry_url: str, registry: Registry
) -> None:
    def make_read_only(word: str) -> None:  # for connections from now on, as the standby of a failover
        with registry.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            name = sa.make_url(registry_url).database
            connection.exec_driver_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = {word}")

    make_read_only("on")
    with opened(registry_url) as other:
        assert reason_of(lambda: write(other)) is Reason.DATABASE_UNAVAILABLE
        make_read_only("off")
        write(other)


def test_every_wait_has_a_limit(registry: Registry) -> None:
    with registry.reading() as session:
        assert (show(session, "lock_timeout"), show(session, "idle_in_transaction_session_timeout")) == ("10s", "10min")
        driver: Any = session.connection().connection.dbapi_connection
        told = driver.info.get_parameters()
    assert {name: told.get(name) for name in told if name.startswith(("keepalives", "tcp", "connect_timeout"))} == {
        "connect_timeout": "10",
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
        "tcp_user_timeout": "30000",
    }


def test_what_the_url_says_of_waits_goes_before(registry_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"options": "-c lock_timeout=3s", "keepalives_idle": "7"}
    with opened(registry_url, **said) as registry, registry.reading() as session:
        assert (show(session, "lock_timeout"), show(session, "idle_in_transaction_session_timeout")) == ("3s", "10min")
        driver: Any = session.connection().connection.dbapi_connection
        assert driver.info.get_parameters()["keepalives_idle"] == "7"
    monkeypatch.setenv("PGOPTIONS", "-c lock_timeout=4s")
    with opened(registry_url) as registry, registry.reading() as session:
        assert show(session, "lock_timeout") == "4s"


async def test_a_frozen_replica_keeps_the_ticker_from_nothing_but_what_it_holds(
    plane: Plane, registry_url: str
) -> None:
    plane.student()
    plane.release(state=ReleaseState.PACKED)
    plane.sign()
    plane.agent("kiosk-7", connected=True, last_seen_time=now() - dt.timedelta(hours=1))

    def seen() -> tuple[ReleaseState, bool]:
        with plane.registry.reading() as session:
            return session.scalars(sa.select(Release.state)).one(), session.get_one(Agent, "kiosk-7").connected

    with opened(registry_url, options="-c lock_timeout=200ms") as hasty:
        ticker = Ticker(dataclasses.replace(plane.cloud, registry=hasty), plane.hub)
        with plane.registry.transaction() as session:
            locks.exclusive(session, "trust_metadata")
            await ticker.tick(now())
            assert seen() == (ReleaseState.PROPOSED, False)
        await ticker.tick(now())
        assert seen() == (ReleaseState.PUBLISHED, False)


def test_an_upgrade_waits_for_another_one_however_long_it_takes(registry_url: str, registry: Registry) -> None:
    url = sa.make_url(registry_url).update_query_dict({"options": "-c lock_timeout=100ms"})
    engine = create_engine(url.render_as_string(hide_password=False))
    versions: list[str] = []
    second = threading.Thread(target=lambda: versions.append(schema.upgrade(engine)))
    with registry.transaction() as session:
        session.execute(sa.select(sa.func.pg_advisory_xact_lock(schema.UPGRADING)))
        second.start()
        second.join(0.5)
        assert second.is_alive()
    second.join(60)
    engine.dispose()
    assert versions == [schema.newest()]
