"""Agents that are held on a release, over real connections."""

import asyncio

import pytest
from rollout_world import EVERYBODY, Fleet, Plane, refused

from ebbflow.api.v1 import fleet_pb2
from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.cloud.processes.tick import Ticker
from ebbflow.cloud.registry.changes import revisions
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Release, ReleaseState, Student
from ebbflow.cloud.rollout import store
from ebbflow.common.errors import Reason


class Pinned(Fleet):
    """The same, with pins."""

    async def pin(self, number: int, at: int = 0, reason: str = "an exhibition") -> fleet_pb2.Agent:
        release = f"students/faq/releases/{number}"
        request = fleet_pb2.PinAgentRequest(name=f"agents/kiosk-{at}", release=release, reason=reason)
        pinned: fleet_pb2.Agent = (await self.fleet.PinAgent(request)).agent
        return pinned

    async def unpin(self, at: int = 0) -> fleet_pb2.Agent:
        request = fleet_pb2.UnpinAgentRequest(name=f"agents/kiosk-{at}", student="students/faq")
        free: fleet_pb2.Agent = (await self.fleet.UnpinAgent(request)).agent
        return free

    async def wanted(self, at: int = 0) -> list[str]:
        return [release.release for release in await self.desired(at)]

    def revision(self) -> int:
        with self.plane.registry.reading() as session:
            return revisions(session).get("desired_state", 0)


async def test_a_pin_holds_an_agent_whatever_rollouts_do(plane: Plane) -> None:
    fleet = Pinned(plane, agents=2)
    await fleet.bring(1)
    agent = await fleet.pin(1)
    (pin,) = agent.pins
    assert (pin.student, pin.release, pin.reason) == ("students/faq", "students/faq/releases/1", "an exhibition")
    made = await fleet.create(2, phases=[EVERYBODY])
    assert made.counts == pb.DeviceCounts(waiting=1), "it takes no part"
    (held,) = await fleet.desired(0)
    assert (held.release, held.rollout, held.HasField("not_before_time")) == ("students/faq/releases/1", "", False)
    assert await fleet.wanted(1) == ["students/faq/releases/2"]
    await fleet.report(1, 2)
    fleet.tick()
    assert (await fleet.get(made.name)).state == pb.Rollout.STATE_SUCCEEDED
    listed = await FleetServiceStub(plane.admin("viewer").channel).ListAgents(fleet_pb2.ListAgentsRequest())
    assert [len(each.pins) for each in listed.agents] == [1, 0]


async def test_a_pin_takes_an_agent_out_of_a_rollout_and_letting_go_brings_it_back(plane: Plane) -> None:
    fleet = Pinned(plane, agents=2)
    await fleet.bring(1)
    made = await fleet.create(2, phases=[EVERYBODY])
    assert await fleet.wanted(0) == ["students/faq/releases/2"]
    await fleet.pin(1)
    assert await fleet.wanted(0) == ["students/faq/releases/1"]
    await fleet.report(1, 2)
    fleet.tick(later_s=2 * 3600)
    ended = await fleet.get(made.name)
    assert (ended.state, ended.counts.failed) == (pb.Rollout.STATE_SUCCEEDED, 0), "a held agent is not silent"
    assert not (await fleet.unpin()).pins
    assert await fleet.wanted(0) == ["students/faq/releases/2"]
    await fleet.report(0, 2)
    assert (await fleet.get(made.name)).counts == pb.DeviceCounts(succeeded=2)


async def test_an_agent_that_served_the_release_before_its_pin_is_brought_back_to_it(plane: Plane) -> None:
    fleet = Pinned(plane)
    await fleet.bring(1)
    made = await fleet.bring(2)
    await fleet.pin(1)
    await fleet.report(0, 1)
    await fleet.unpin()
    (release,) = await fleet.desired()
    assert (release.release, release.rollout) == ("students/faq/releases/2", made.name)
    assert (await fleet.get(made.name)).counts == pb.DeviceCounts(assigned=1)


async def test_an_agent_that_came_while_it_was_held_joins_once_it_is_let_go(plane: Plane) -> None:
    fleet = Pinned(plane)
    await fleet.pin(2)
    await fleet.bring(1)
    assert await fleet.wanted() == ["students/faq/releases/2"]
    await fleet.unpin()
    assert await fleet.wanted() == ["students/faq/releases/1"]


async def test_letting_go_where_no_rollout_says_anything_changes_nothing_else(plane: Plane) -> None:
    fleet = Pinned(plane)
    await fleet.pin(2)
    await fleet.unpin()
    assert await fleet.wanted() == ["students/faq/releases/2"]
    await fleet.unpin()


async def test_the_same_pin_again_changes_nothing_and_another_replaces_it(plane: Plane) -> None:
    fleet = Pinned(plane)
    first, revision = await fleet.pin(1), fleet.revision()
    assert revision > 0
    assert await fleet.pin(1) == first
    assert fleet.revision() == revision
    (replaced,) = (await fleet.pin(2, reason="another")).pins
    assert (replaced.release, replaced.reason) == ("students/faq/releases/2", "another")
    assert fleet.revision() == revision + 1
    assert await fleet.wanted() == ["students/faq/releases/2"]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (ReleaseState.PACKED, Reason.RELEASE_NOT_PUBLISHED),
        (ReleaseState.RETIRED, Reason.RELEASE_NOT_PUBLISHED),
        (ReleaseState.REVOKED, Reason.RELEASE_REVOKED),
    ],
)
async def test_a_release_that_nobody_may_install_holds_nobody(
    plane: Plane, state: ReleaseState, reason: Reason
) -> None:
    fleet = Pinned(plane)
    with plane.registry.transaction() as session:
        session.get_one(Release, ("faq", 2)).state = state
    assert (await refused(fleet.pin(2))).reason is reason
    assert await fleet.wanted() == []


async def test_a_pin_needs_an_agent_a_release_and_a_student_that_selects_it(plane: Plane) -> None:
    fleet = Pinned(plane)
    assert (await refused(fleet.pin(1, at=9))).reason is Reason.AGENT_NOT_FOUND
    assert (await refused(fleet.pin(9))).reason is Reason.RELEASE_NOT_FOUND
    long = await refused(fleet.pin(1, reason="x" * 1025))
    assert (long.reason, long.metadata["field"]) == (Reason.INVALID_REQUEST, "reason")
    unknown = fleet_pb2.UnpinAgentRequest(name="agents/kiosk-0", student="students/nobody")
    assert (await refused(fleet.fleet.UnpinAgent(unknown))).reason is Reason.STUDENT_NOT_FOUND
    with plane.registry.transaction() as session:
        session.get_one(Student, "faq").selector = "ring=beta"
    assert (await refused(fleet.pin(1))).reason is Reason.STATE_CONFLICT


async def test_what_the_signed_list_forbids_can_be_neither_pinned_nor_rolled_back_to(plane: Plane) -> None:
    fleet = Pinned(plane)
    plane.release(3, content=b"signed weights", state=ReleaseState.PACKED)
    plane.sign()
    await Ticker(plane.cloud, plane.hub).tick(now())
    back = pb.RollBackRequest(student="students/faq", release="students/faq/releases/1")
    preview = pb.PreviewRolloutRequest(rollout=pb.Rollout(release="students/faq/releases/1"))
    for call in (fleet.pin(1), fleet.rollouts.RollBack(back), fleet.rollouts.PreviewRollout(preview)):
        error = await refused(call)
        assert (error.reason, error.metadata["min_release"]) == (Reason.RELEASE_TOO_OLD, "3")
    assert [pin.release for pin in (await fleet.pin(3)).pins] == ["students/faq/releases/3"]


async def test_a_revoked_release_lets_its_pins_go(plane: Plane) -> None:
    fleet = Pinned(plane, agents=2)
    await fleet.bring(1)
    await fleet.pin(2)
    with plane.registry.transaction() as session:
        session.get_one(Release, ("faq", 2)).state = ReleaseState.REVOKED
    assert await fleet.wanted(0) == [""], "it keeps what it serves, and never fetches what was taken back"
    with plane.registry.transaction() as session:
        store.revoke(session, "faq", 2, now())
    assert await fleet.wanted(0) == ["students/faq/releases/1"]


async def test_pins_that_come_at_once_leave_one_and_the_agent_on_it(plane: Plane) -> None:
    fleet = Pinned(plane, agents=3)
    await fleet.bring(1)
    await fleet.create(2, phases=[EVERYBODY])
    pins = [fleet.pin(1 + turn % 2, at=turn % 3) for turn in range(12)]
    looks = [fleet.desired(turn % 3) for turn in range(6)]
    ticks = [asyncio.to_thread(fleet.tick) for _ in range(4)]
    await asyncio.gather(*pins, *looks, *ticks, fleet.unpin(0), fleet.unpin(0))
    listed = await fleet.fleet.ListAgents(fleet_pb2.ListAgentsRequest())
    for at, agent in enumerate(listed.agents):
        held = [pin.release for pin in agent.pins]
        assert len(held) <= 1
        assert await fleet.wanted(at) == (held or ["students/faq/releases/2"])
