"""A control plane with a student, two releases and agents that do as they are told."""

import datetime as dt
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from ebbflow.api.v1 import agent_pb2, resources_pb2, student_pb2
from ebbflow.api.v1 import rollout_pb2 as pb
from ebbflow.api.v1.agent_pb2_grpc import AgentServiceStub
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.api.v1.rollout_pb2_grpc import RolloutServiceStub
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Student
from ebbflow.cloud.rollout import store
from ebbflow.common.errors import EbbflowError

Plane = Any
EVERYBODY = pb.Phase()


class Fleet:
    """A student with two releases and agents that do as they are told."""

    def __init__(self, plane: Plane, agents: int = 1) -> None:
        self.plane = plane
        plane.student()
        plane.release(1)
        plane.release(2, content=b"newer weights")
        self.agents = [plane.agent(f"kiosk-{number}", connected=True) for number in range(agents)]
        self.ada, self.bob = plane.admin("operator", "ada"), plane.admin("operator", "bob")
        self.rollouts, self.fleet = RolloutServiceStub(self.ada.channel), FleetServiceStub(self.ada.channel)

    def policy(self, policy: student_pb2.RolloutPolicy) -> None:
        with self.plane.registry.transaction() as session:
            session.get_one(Student, "faq").rollout_policy = MessageToDict(policy)

    async def create(self, number: int = 1, **fields: Any) -> pb.Rollout:
        wanted = pb.Rollout(release=f"students/faq/releases/{number}", **fields)
        made: pb.Rollout = (await self.rollouts.CreateRollout(pb.CreateRolloutRequest(rollout=wanted))).rollout
        return made

    async def get(self, name: str) -> pb.Rollout:
        found: pb.Rollout = (await self.rollouts.GetRollout(pb.GetRolloutRequest(name=name))).rollout
        return found

    async def desired(self, at: int = 0) -> list[agent_pb2.DesiredRelease]:
        stub = AgentServiceStub(self.agents[at].channel)
        return list((await stub.GetDesiredState(agent_pb2.GetDesiredStateRequest())).releases)

    async def report(self, at: int, number: int, *, reason: str = "", **fields: Any) -> None:
        """What an agent does: reads its desired state, then says what became of it."""
        await self.desired(at)
        state = resources_pb2.INSTALLATION_STATE_FAILED if reason else resources_pb2.INSTALLATION_STATE_SERVING
        installation = resources_pb2.Installation(
            student="students/faq",
            release=f"students/faq/releases/{number}",
            precision=resources_pb2.PRECISION_INT8,
            state=state,
            reason=reason,
            **fields,
        )
        stub = AgentServiceStub(self.agents[at].channel)
        await stub.ReportInstallation(agent_pb2.ReportInstallationRequest(installation=installation))

    def tick(self, later_s: float = 0) -> None:
        store.tick(self.plane.registry, now() + dt.timedelta(seconds=later_s))

    async def bring(self, number: int) -> pb.Rollout:
        """Brings every agent to a release."""
        made = await self.create(number, phases=[EVERYBODY])
        for at in range(len(self.agents)):
            await self.report(at, number)
        self.tick()
        return await self.get(made.name)


async def refused(call: Any) -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        await call
    return caught.value
