"""Rollouts as admins start, steer and watch them, over real connections."""

import asyncio
import datetime as dt
import uuid
from typing import Any

import pytest
import sqlalchemy as sa
from google.protobuf.duration_pb2 import Duration
from rollout_world import EVERYBODY, Fleet, Plane, refused

from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1 import student_pb2
from ebbflow.api.v1.rollout_pb2_grpc import RolloutServiceStub
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Assignment, Release, Rollout
from ebbflow.common.errors import Reason

NIGHT = pb.MaintenanceWindow(weekdays=[6, 7], start="01:30", duration=Duration(seconds=7200), time_zone="Europe/Berlin")
POLICY = student_pb2.RolloutPolicy(
    phases=[pb.Phase(count=1, max_probe_rise=0.5), EVERYBODY],
    windows=[NIGHT],
    spread=Duration(seconds=90),
    on_halt=pb.ON_HALT_ROLL_BACK,
)


async def test_a_rollout_says_everything_that_it_was_asked(plane: Plane) -> None:
    fleet = Fleet(plane)
    made = await fleet.create(
        phases=[pb.Phase(selector="", count=1), EVERYBODY],
        windows=[NIGHT],
        spread=Duration(seconds=30),
        on_halt=pb.ON_HALT_ROLL_BACK,
    )
    assert (made.creator, made.approver, made.state) == ("admins/ada", "", pb.Rollout.STATE_RUNNING)
    assert list(made.windows) == [NIGHT]
    assert (made.spread.seconds, made.on_halt) == (30, pb.ON_HALT_ROLL_BACK)
    assert [phase.count for phase in made.phases] == [1, 0]
    assert [result.counts.waiting for result in made.results] == [1, 0]
    assert made.next_decision.action
    assert await fleet.get(made.name) == made
    listed = await fleet.rollouts.ListRollouts(pb.ListRolloutsRequest(student="students/faq"))
    assert list(listed.rollouts) == [made]


async def test_the_students_policy_says_what_a_rollout_leaves_open(plane: Plane) -> None:
    fleet = Fleet(plane)
    fleet.policy(POLICY)
    silent = await fleet.create()
    assert [(phase.count, phase.max_probe_rise) for phase in silent.phases] == [(1, 0.5), (0, 0.0)]
    assert (list(silent.windows), silent.spread.seconds, silent.on_halt) == ([NIGHT], 90, pb.ON_HALT_ROLL_BACK)
    outspoken = await fleet.create(phases=[EVERYBODY], spread=Duration(), on_halt=pb.ON_HALT_HOLD)
    assert len(outspoken.phases) == 1
    assert (outspoken.spread.seconds, outspoken.on_halt) == (0, pb.ON_HALT_HOLD)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("phases[0].share", {"phases": [pb.Phase(share=1.5), EVERYBODY]}),
        ("phases[0].count", {"phases": [pb.Phase(share=0.5, count=2), EVERYBODY]}),
        ("phases[0].soak", {"phases": [pb.Phase(soak=Duration(seconds=2**62))]}),
        ("phases[0].max_acceptance_drop", {"phases": [pb.Phase(max_acceptance_drop=-0.1)]}),
        ("phases[0].selector", {"phases": [pb.Phase(selector="ring=nobody"), EVERYBODY]}),
        ("windows[0].start", {"windows": [pb.MaintenanceWindow(start="25:00", duration=Duration(seconds=60))]}),
        ("windows[0].duration", {"windows": [pb.MaintenanceWindow(start="01:00")]}),
        (
            "windows[0].time_zone",
            {"windows": [pb.MaintenanceWindow(start="01:00", duration=Duration(seconds=1), time_zone="Mars")]},
        ),
        ("spread", {"spread": Duration(seconds=-1)}),
        ("spread", {"spread": Duration(seconds=2**62)}),
        ("on_halt", {"on_halt": 7}),
    ],
)
async def test_what_cannot_work_is_refused_by_its_field(plane: Plane, field: str, fields: dict[str, Any]) -> None:
    fleet = Fleet(plane)
    error = await refused(fleet.create(**fields))
    assert (error.reason, error.metadata.get("field")) == (Reason.INVALID_REQUEST, field)
    preview = pb.PreviewRolloutRequest(rollout=pb.Rollout(release="students/faq/releases/1", **fields))
    assert (await refused(fleet.rollouts.PreviewRollout(preview))).metadata.get("field") == field
    assert not (await fleet.rollouts.ListRollouts(pb.ListRolloutsRequest())).rollouts


async def test_a_second_person_lets_a_rollout_begin(plane: Plane) -> None:
    fleet = Fleet(plane)
    fleet.policy(student_pb2.RolloutPolicy(approval_required=True))
    made = await fleet.create()
    assert made.state == pb.Rollout.STATE_WAITING_FOR_APPROVAL
    assert "approve" in made.next_decision.reason
    fleet.tick()
    assert await fleet.desired() == []
    request = pb.ApproveRolloutRequest(name=made.name)
    assert (await refused(fleet.rollouts.ApproveRollout(request))).reason is Reason.APPROVAL_REQUIRED
    theirs = RolloutServiceStub(fleet.bob.channel)
    approved = (await theirs.ApproveRollout(request)).rollout
    assert (approved.state, approved.creator, approved.approver) == (
        pb.Rollout.STATE_RUNNING,
        "admins/ada",
        "admins/bob",
    )
    assert [release.release for release in await fleet.desired()] == ["students/faq/releases/1"]
    assert (await refused(theirs.ApproveRollout(request))).reason is Reason.STATE_CONFLICT


async def test_failures_are_told_by_reason_and_can_be_tried_again(plane: Plane) -> None:
    fleet = Fleet(plane, agents=3)
    made = await fleet.create(phases=[pb.Phase(success_share=0.3, failure_share=0.9)])
    await fleet.report(0, 1, reason="PROBE_FAILED")
    await fleet.report(1, 1, reason="PROBE_FAILED")
    await fleet.report(2, 1)
    fleet.tick()
    ended = await fleet.get(made.name)
    assert ended.state == pb.Rollout.STATE_SUCCEEDED
    (failure,) = ended.failures
    assert (failure.reason, failure.count, list(failure.agents)) == (
        "PROBE_FAILED",
        2,
        ["agents/kiosk-0", "agents/kiosk-1"],
    )
    assert (ended.counts.succeeded, ended.counts.failed) == (1, 2)
    unknown = pb.RetryRolloutRequest(name=made.name, agents=["agents/nobody"])
    assert (await refused(fleet.rollouts.RetryRollout(unknown))).reason is Reason.AGENT_NOT_FOUND
    retry = pb.RetryRolloutRequest(name=made.name, agents=["agents/kiosk-0"])
    again = (await fleet.rollouts.RetryRollout(retry)).rollout
    assert (again.counts.waiting, again.counts.failed) == (1, 1)
    assert [release.release for release in await fleet.desired(0)] == ["students/faq/releases/1"]
    await fleet.report(0, 1)
    assert (await fleet.get(made.name)).counts.succeeded == 2


async def test_a_roll_back_brings_everybody_to_the_release_before_once(plane: Plane) -> None:
    fleet = Fleet(plane, agents=2)
    await fleet.bring(1)
    await fleet.bring(2)
    request = pb.RollBackRequest(student="students/faq", request_id=str(uuid.uuid4()))
    made = (await fleet.rollouts.RollBack(request)).rollout
    assert (made.release, made.creator) == ("students/faq/releases/1", "admins/ada")
    assert (await fleet.rollouts.RollBack(request)).rollout == made
    with plane.registry.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(Rollout)) == 3
    for at in range(2):
        assert [release.release for release in await fleet.desired(at)] == ["students/faq/releases/1"]
        await fleet.report(at, 1)
    fleet.tick()
    assert (await fleet.get(made.name)).state == pb.Rollout.STATE_SUCCEEDED
    back = pb.RollBackRequest(student="students/faq", release="students/faq/releases/2")
    assert (await fleet.rollouts.RollBack(back)).rollout.release == "students/faq/releases/2"


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.RollBackRequest(student="students/faq"), Reason.STATE_CONFLICT, None),
        (pb.RollBackRequest(student="students/nobody"), Reason.STUDENT_NOT_FOUND, None),
        (
            pb.RollBackRequest(student="students/faq", release="students/other/releases/1"),
            Reason.INVALID_REQUEST,
            "release",
        ),
        (pb.RollBackRequest(student="students/faq", release="students/faq/releases/9"), Reason.RELEASE_NOT_FOUND, None),
    ],
)
async def test_a_roll_back_to_nowhere_is_refused(
    plane: Plane, request_: pb.RollBackRequest, reason: Reason, field: str | None
) -> None:
    error = await refused(Fleet(plane).rollouts.RollBack(request_))
    assert (error.reason, error.metadata.get("field")) == (reason, field)


async def test_a_preview_spells_everything_out_and_changes_nothing(plane: Plane) -> None:
    fleet = Fleet(plane, agents=3)
    fleet.policy(POLICY)
    plane.agent("kiosk-off")
    viewer = RolloutServiceStub(plane.admin("viewer").channel)
    wanted = pb.Rollout(release="students/faq/releases/1")
    found = await viewer.PreviewRollout(pb.PreviewRolloutRequest(rollout=wanted))
    assert (found.rollout.name, found.advised_canaries) == ("", 59)
    assert list(found.rollout.windows) == [NIGHT]
    assert [(outlook.agents, outlook.connected) for outlook in found.outlooks] == [(1, 1), (3, 2)]
    assert [round(outlook.detectable_failure_rate, 3) for outlook in found.outlooks] == [0.95, 0.632]
    rare = pb.PreviewRolloutRequest(rollout=wanted, failure_rate=0.01)
    assert (await viewer.PreviewRollout(rare)).advised_canaries == 299
    for rate in (-0.1, 1.0, float("nan")):
        error = await refused(viewer.PreviewRollout(pb.PreviewRolloutRequest(rollout=wanted, failure_rate=rate)))
        assert (error.reason, error.metadata["field"]) == (Reason.INVALID_REQUEST, "failure_rate")
    fleet.policy(student_pb2.RolloutPolicy())
    shares = (await viewer.PreviewRollout(pb.PreviewRolloutRequest(rollout=wanted))).rollout.phases
    assert [phase.share for phase in shares] == [0.1, 1.0]
    with plane.registry.reading() as session:
        assert session.scalars(sa.select(Rollout)).all() == []
        assert session.scalars(sa.select(Assignment)).all() == []


async def test_bytes_and_probe_losses_are_added_up(plane: Plane) -> None:
    fleet = Fleet(plane, agents=2)
    with plane.registry.transaction() as session:
        session.get_one(Release, ("faq", 1)).card = {"probeLoss": [2.0]}
    made = await fleet.create(phases=[EVERYBODY])
    await fleet.report(0, 1, fetched_bytes=3, probe_loss=2.25)
    await fleet.report(1, 1, fetched_bytes=4, probe_loss=2.5)
    fleet.tick()
    found = await fleet.get(made.name)
    full = len(b"{}") + len(b"tokens") + len(b"weights")
    assert (found.fetched_bytes, found.full_bytes) == (7, 2 * full)
    assert found.results[0].probe_rise == pytest.approx(0.375)
    assert found.results[0].counts == pb.DeviceCounts(succeeded=2)
    assert not found.results[0].acceptance_informative


async def test_a_rise_of_the_probe_loss_halts_and_goes_back(plane: Plane) -> None:
    fleet = Fleet(plane)
    await fleet.bring(1)
    with plane.registry.transaction() as session:
        session.get_one(Release, ("faq", 2)).card = {"probeLoss": [2.0]}
    made = await fleet.create(2, phases=[pb.Phase(max_probe_rise=0.1)], on_halt=pb.ON_HALT_ROLL_BACK)
    await fleet.report(0, 2, probe_loss=2.5)
    fleet.tick()
    halted = await fleet.get(made.name)
    assert halted.state == pb.Rollout.STATE_HALTED
    assert "probe" in halted.reason
    assert halted.next_decision.reason == halted.reason
    assert [release.release for release in await fleet.desired()] == ["students/faq/releases/1"]


async def test_a_watch_tells_of_every_change_and_of_nothing_else(plane: Plane) -> None:
    fleet = Fleet(plane, agents=2)
    made = await fleet.create(phases=[pb.Phase(count=1, soak=Duration(seconds=3600)), EVERYBODY])
    answers = aiter(fleet.rollouts.WatchRollout(pb.WatchRolloutRequest(name=made.name)))

    async def news() -> pb.Rollout:
        async with asyncio.timeout(60):
            found: pb.Rollout = (await anext(answers)).rollout
        return found

    async def quiet() -> "asyncio.Task[pb.Rollout]":
        """Nothing comes for some looks; returns what comes next."""
        following = asyncio.create_task(news())
        done, _ = await asyncio.wait({following}, timeout=1.3)
        assert not done
        return following

    assert await news() == made
    (canary,) = [at for at in range(2) if await fleet.desired(at)]
    assert (await news()).results[0].counts.assigned == 1
    await fleet.report(canary, 1, fetched_bytes=5)
    answered = await news()
    assert (answered.results[0].counts.succeeded, answered.fetched_bytes) == (1, 5)
    assert answered.next_decision.reason == "nothing is in the way"
    following = await quiet()
    fleet.tick()
    soaking = await following
    assert soaking.next_decision.reason == "it soaks"
    assert soaking.results[0].soak_end_time == soaking.next_decision.earliest_time
    following = await quiet()
    await fleet.rollouts.AbortRollout(pb.AbortRolloutRequest(name=made.name))
    assert (await following).state == pb.Rollout.STATE_ABORTED
    with pytest.raises(StopAsyncIteration):
        await anext(answers)


async def test_a_device_starts_at_its_own_time_within_the_spread(plane: Plane) -> None:
    fleet = Fleet(plane)
    before = now()
    made = await fleet.create(phases=[EVERYBODY], spread=Duration(seconds=3600))
    (release,) = await fleet.desired()
    turn = release.not_before_time.ToDatetime(dt.UTC)
    assert before < turn < before + dt.timedelta(seconds=3610)
    assert release.rollout == made.name
    assert (await fleet.get(made.name)).counts.waiting == 1
