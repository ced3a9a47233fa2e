"""AgentService: the control line between an agent and the cloud."""

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
from sqlalchemy.orm import Session

from ebbflow.api.v1 import agent_pb2 as pb
from ebbflow.api.v1 import agent_pb2_grpc
from ebbflow.cloud.identity import certificates
from ebbflow.cloud.registry import clock
from ebbflow.cloud.services import desired, installations
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import fleet
from ebbflow.cloud.services.convert.common import timestamp
from ebbflow.cloud.services.hub import Hub
from ebbflow.cloud.services.limits import check_heartbeat, check_profile
from ebbflow.cloud.services.line import Line
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """See agent.proto. The agent is the peer certificate's, never a field's."""

    def __init__(self, cloud: Cloud, hub: Hub) -> None:
        self._cloud = cloud
        self._hub = hub

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Signs the next certificate."""
        cloud, call = self._cloud, current()
        call.resource = call.caller.identity.name

        def work(session: Session, now: dt.datetime) -> pb.RenewResponse:
            issued = cloud.authority.issue_agent(request.csr_der, call.agent_id, cloud.agent_lifetime, now)
            certificates.record(session, issued, now)
            return pb.RenewResponse(
                credentials=fleet.credentials(issued, cloud.authority.certificate_pem, cloud.endpoint)
            )

        return await cloud.change(work)

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        """Holds the agent's line: one welcome, then hints, until either side goes."""
        hello = await _hello(request_iterator)
        check_profile(hello.profile)
        line = await self._hub.open(current().agent_id, hello)
        reader = asyncio.create_task(self._read(request_iterator, line))
        try:
            yield pb.ConnectResponse(
                welcome=pb.Welcome(
                    heartbeat_interval_s=self._cloud.settings.heartbeat_interval_s,
                    server_time=timestamp(clock.now()),
                )
            )
            async for hint in line.hints():
                yield pb.ConnectResponse(hint=hint)
        finally:
            reader.cancel()
            self._hub.close(line)

    async def GetDesiredState(self, request: pb.GetDesiredStateRequest, context: Context) -> pb.GetDesiredStateResponse:
        """Tells what the agent should serve, and remembers that it was told."""
        agent_id, cloud = current().agent_id, self._cloud
        check_profile(request.profile)
        profile = request.profile if request.HasField("profile") else None
        stale, releases = await cloud.read(
            lambda session: (desired.stale(session, agent_id, profile, clock.now()), desired.state(session, agent_id))
        )
        if stale:
            await cloud.write(lambda session: desired.refresh(session, agent_id, profile, clock.now()))
            releases = await cloud.read(lambda session: desired.state(session, agent_id))
        return pb.GetDesiredStateResponse(releases=releases, poll_interval_s=cloud.settings.poll_interval_s)

    async def ReportInstallation(
        self, request: pb.ReportInstallationRequest, context: Context
    ) -> pb.ReportInstallationResponse:
        """Keeps what became of a release on the device."""
        call = current()
        call.resource = request.installation.release

        def work(session: Session, now: dt.datetime) -> None:
            installations.report(session, call.agent_id, request.installation, now)

        await self._cloud.change(work)
        return pb.ReportInstallationResponse()

    async def _read(self, requests: AsyncIterator[pb.ConnectRequest], line: Line) -> None:
        try:
            async for request in requests:
                if request.WhichOneof("body") != "heartbeat":
                    raise EbbflowError(Reason.INVALID_REQUEST, "after the first message come heartbeats only")
                check_heartbeat(request.heartbeat)
                if not self._hub.beat(line, request.heartbeat.telemetry):
                    await self._hub.quarantine(line.agent_id)
        except EbbflowError as error:
            line.end(error)
        finally:
            line.end()


async def _hello(requests: AsyncIterator[pb.ConnectRequest]) -> pb.Hello:
    async for request in requests:
        try:
            uuid.UUID(request.hello.instance_id)
        except ValueError:
            break
        return request.hello
    message = "the first message must be a hello with the process' UUID"
    raise EbbflowError(Reason.INVALID_REQUEST, message, field="hello.instance_id")
