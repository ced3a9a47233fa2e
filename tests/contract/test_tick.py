"""What the control plane does by itself."""

import datetime as dt
import json
from typing import Any

import pytest
import sqlalchemy as sa

from ebbflow.api.v1.round_pb2 import OpenRoundRequest
from ebbflow.api.v1.round_pb2_grpc import RoundServiceStub
from ebbflow.cloud.processes.tick import Job, Ticker
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Agent, Release, ReleaseState, Round, RoundState
from ebbflow.cloud.release import repository
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles

Plane = Any


async def test_a_release_that_both_have_signed_is_published(plane: Plane) -> None:
    plane.student()
    plane.release(state=ReleaseState.PACKED)
    ticker = Ticker(plane.cloud, plane.hub)
    await ticker.tick(now())
    plane.sign()
    await ticker.tick(now())
    with plane.registry.reading() as session:
        assert session.scalars(sa.select(Release.state)).one() is ReleaseState.PUBLISHED
        assert b"int8" in repository.read_metadata(session, "2.student.json")


async def test_a_round_ends_when_its_time_is_over(plane: Plane) -> None:
    plane.student()
    plane.release()
    plane.agent("kiosk-7")
    plane.roll_out("faq", 1)
    plane.serve("kiosk-7", "faq", 1)
    await RoundServiceStub(plane.admin().channel).OpenRound(OpenRoundRequest(student="students/faq"))
    ticker = Ticker(plane.cloud, plane.hub)
    states = []
    for later in (dt.timedelta(hours=23), dt.timedelta(hours=25)):
        await ticker.tick(now() + later)
        with plane.registry.reading() as session:
            states.append(session.scalars(sa.select(Round.state)).one())
    assert states == [RoundState.OPEN, RoundState.CLOSED]


async def test_the_timestamp_is_signed_again_before_it_expires(plane: Plane) -> None:
    await Ticker(plane.cloud, plane.hub).tick(now() + repository.LIFETIMES[roles.TIMESTAMP])
    with plane.registry.reading() as session:
        assert json.loads(repository.read_metadata(session, "timestamp.json"))["signed"]["version"] == 2


async def test_an_agent_that_went_with_its_replica_is_no_longer_connected(plane: Plane) -> None:
    plane.agent("kiosk-7", connected=True, last_seen_time=now())
    ticker = Ticker(plane.cloud, plane.hub)
    states = []
    for later_s in (60, 120):
        await ticker.tick(now() + dt.timedelta(seconds=later_s))
        with plane.registry.reading() as session:
            states.append(session.get_one(Agent, "kiosk-7").connected)
    assert states == [True, False]


@pytest.mark.parametrize("fault", [EbbflowError(Reason.DATABASE_UNAVAILABLE, "gone"), RuntimeError("a bug")])
async def test_one_job_that_fails_leaves_the_others_running(plane: Plane, fault: Exception) -> None:
    done: list[dt.datetime] = []

    def fail(_: dt.datetime) -> bool:
        raise fault

    def work(time: dt.datetime) -> bool:
        done.append(time)
        return True

    ticker = Ticker(plane.cloud, plane.hub, [Job("failing", fail), Job("working", work)])
    await ticker.tick(now())
    await ticker.tick(now())
    assert len(done) == 2


async def test_a_clock_that_is_set_back_stops_no_job(plane: Plane) -> None:
    ahead, done = now() + dt.timedelta(hours=13), []

    def work(time: dt.datetime) -> bool:
        done.append(time)
        return False

    ticker = Ticker(plane.cloud, plane.hub, [Job("working", work), Job("seldom", work, dt.timedelta(seconds=10))])
    await ticker.tick(ahead)
    await ticker.tick(now())
    await ticker.tick(now())
    assert len(done) == 2 + 2 + 1
