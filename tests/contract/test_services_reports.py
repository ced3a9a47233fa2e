"""What agents report of releases, and what they are told after it, over real connections."""

import asyncio
import datetime as dt
import uuid
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from rollout_world import EVERYBODY, Fleet, Plane, refused

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1.agent_pb2_grpc import AgentServiceStub
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import DeviceState, Release, ReleaseState, RolloutDevice, Student
from ebbflow.cloud.rollout import store
from ebbflow.common.errors import Reason

DEFERRED, FETCHING = resources_pb2.INSTALLATION_STATE_DEFERRED, resources_pb2.INSTALLATION_STATE_FETCHING
SERVING, FAILED = resources_pb2.INSTALLATION_STATE_SERVING, resources_pb2.INSTALLATION_STATE_FAILED
HOUR_S = 3600


def at(later_s: float) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(now() + dt.timedelta(seconds=later_s))
    return message


def installation(state: "resources_pb2.InstallationState.ValueType", **fields: Any) -> resources_pb2.Installation:
    about: dict[str, Any] = {"student": "students/faq", "release": "students/faq/releases/1"}
    return resources_pb2.Installation(**about, state=state, precision=resources_pb2.PRECISION_INT8, **fields)


async def report(fleet: Fleet, message: resources_pb2.Installation) -> None:
    stub = AgentServiceStub(fleet.agents[0].channel)
    await stub.ReportInstallation(agent_pb2.ReportInstallationRequest(installation=message))


def device(plane: Plane, name: str) -> RolloutDevice:
    with plane.registry.reading() as session:
        found: RolloutDevice = session.get_one(RolloutDevice, (name.partition("/")[2], "kiosk-0"))
        return found


async def test_an_agent_that_waits_for_its_window_is_silent_only_after_it(plane: Plane) -> None:
    fleet = Fleet(plane)
    made = await fleet.create(phases=[EVERYBODY])
    await fleet.desired()
    await report(fleet, installation(DEFERRED, resume_time=at(10 * HOUR_S)))
    fleet.tick(later_s=9 * HOUR_S)
    assert (await fleet.get(made.name)).counts == pb.DeviceCounts(assigned=1)
    fleet.tick(later_s=12 * HOUR_S)
    halted = await fleet.get(made.name)
    assert (halted.counts.failed, halted.failures[0].reason) == (1, "SILENT")


async def test_nobody_waits_for_ever(plane: Plane) -> None:
    fleet = Fleet(plane)
    made = await fleet.create(phases=[EVERYBODY])
    await fleet.desired()
    await report(fleet, installation(DEFERRED, resume_time=at(400 * 24 * HOUR_S)))
    fleet.tick(later_s=9 * 24 * HOUR_S)
    assert (await fleet.get(made.name)).counts.failed == 1


@pytest.mark.parametrize(
    "message",
    [
        installation(DEFERRED),
        installation(FETCHING, resume_time=Timestamp(seconds=1)),
        installation(DEFERRED, resume_time=Timestamp(seconds=2**62)),
    ],
    ids=["none", "of another state", "no time"],
)
async def test_a_time_to_go_on_belongs_to_who_waits(plane: Plane, message: resources_pb2.Installation) -> None:
    fleet = Fleet(plane)
    await fleet.create(phases=[EVERYBODY])
    error = await refused(report(fleet, message))
    assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, "installation.resume_time")


async def test_a_heartbeat_brings_a_deferral_that_was_lost(plane: Plane) -> None:
    fleet = Fleet(plane)
    made = await fleet.create(phases=[EVERYBODY])
    await fleet.desired()
    waits = installation(DEFERRED, resume_time=at(10 * HOUR_S), update_time=at(0))

    async def line() -> Any:
        yield agent_pb2.ConnectRequest(hello=agent_pb2.Hello(instance_id=str(uuid.uuid4())))
        telemetry = agent_pb2.Telemetry(installations=[waits])
        yield agent_pb2.ConnectRequest(heartbeat=agent_pb2.Heartbeat(telemetry=telemetry))
        await asyncio.sleep(60)

    call = AgentServiceStub(fleet.agents[0].channel).Connect(line())
    expected = waits.resume_time.ToDatetime(dt.UTC)
    for _ in range(1200):
        if device(plane, made.name).assign_time == expected:
            break
        await asyncio.sleep(0.05)
    assert device(plane, made.name).assign_time == expected
    call.cancel()


@pytest.mark.parametrize(("loss", "kept"), [(2.5, 2.5), (0.0, None), (float("nan"), None), (float("inf"), None)])
async def test_only_a_loss_that_can_be_averaged_is_kept(plane: Plane, loss: float, kept: float | None) -> None:
    fleet = Fleet(plane)
    made = await fleet.create(phases=[EVERYBODY])
    await fleet.desired()
    await report(fleet, installation(FAILED, reason="PROBE_FAILED", probe_loss=loss, fetched_bytes=2**64 - 1))
    found = device(plane, made.name)
    assert (found.state, found.probe_loss, found.fetched_bytes) == (DeviceState.FAILED, kept, 2**48)


async def test_the_same_report_again_changes_nothing(plane: Plane) -> None:
    fleet = Fleet(plane)
    made = await fleet.create(phases=[EVERYBODY])
    for _ in range(2):
        await fleet.report(0, 1, fetched_bytes=7, probe_loss=1.5)
        await asyncio.sleep(0.01)
    fleet.tick()
    once = device(plane, made.name)
    await fleet.report(0, 1, fetched_bytes=7, probe_loss=1.5)
    again = device(plane, made.name)
    assert (once.answer_time, once.fetched_bytes, once.full_bytes) == (again.answer_time, 7, again.full_bytes)


async def test_a_release_that_was_taken_back_is_never_desired(plane: Plane) -> None:
    fleet = Fleet(plane)
    await fleet.bring(1)
    with plane.registry.transaction() as session:
        session.get_one(Release, ("faq", 1)).state = ReleaseState.REVOKED
    (entry,) = await fleet.desired()
    assert (entry.student, entry.release) == ("students/faq", "")
    with plane.registry.transaction() as session:
        store.revoke(session, "faq", 1, now())
    (entry,) = await fleet.desired()
    assert (entry.student, entry.release) == ("students/faq", ""), "there is no other; it keeps what it serves"
    made = await fleet.create(2, phases=[EVERYBODY])
    (entry,) = await fleet.desired()
    assert (entry.release, entry.rollout) == ("students/faq/releases/2", made.name)


async def test_a_release_below_the_lowest_one_leaves_the_agent_with_what_it_serves(plane: Plane) -> None:
    fleet = Fleet(plane)
    await fleet.bring(1)
    with plane.registry.transaction() as session:
        session.get_one(Student, "faq").min_release = 2
        session.flush()
        store.revoke(session, "faq", 1, now())
    (entry,) = await fleet.desired()
    assert (entry.student, entry.release) == ("students/faq", "")
