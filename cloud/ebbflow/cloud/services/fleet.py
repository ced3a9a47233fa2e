"""FleetService: agents, enrolment tokens and admins."""

import datetime as dt
from collections.abc import Callable
from typing import Any

import grpc
import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.api.v1 import fleet_pb2 as pb
from ebbflow.api.v1 import fleet_pb2_grpc
from ebbflow.cloud.identity import admins, certificates, tokens
from ebbflow.cloud.identity.authority import ADMIN_LIFETIME
from ebbflow.cloud.registry.answers import remember
from ebbflow.cloud.registry.changes import bump
from ebbflow.cloud.registry.paging import page
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, EnrolmentToken
from ebbflow.cloud.rollout import pins, selector
from ebbflow.cloud.services import agents
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import fleet
from ebbflow.cloud.services.convert.common import duration
from ebbflow.cloud.services.hub import Hub
from ebbflow.cloud.services.student import find as find_student
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

Context = grpc.aio.ServicerContext[Any, Any]

_ROLES = {
    pb.ADMIN_ROLE_VIEWER: "viewer",
    pb.ADMIN_ROLE_OPERATOR: "operator",
    pb.ADMIN_ROLE_OWNER: "owner",
}


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """See fleet.proto."""

    def __init__(self, cloud: Cloud, hub: Hub) -> None:
        self._cloud = cloud
        self._hub = hub

    async def GetAgent(self, request: pb.GetAgentRequest, context: Context) -> pb.GetAgentResponse:
        """Returns one agent."""
        agent_id = names.parse(request.name, "agents")
        return pb.GetAgentResponse(agent=await self._cloud.read(lambda session: agents.message(session, agent_id)))

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Context) -> pb.ListAgentsResponse:
        """Returns a page of agents, by name."""
        query = sa.select(Agent).where(*selector.clauses(selector.parse(request.selector)))

        def work(session: Session) -> pb.ListAgentsResponse:
            rows, token = page(session, query, [Agent.id], request.page_size, request.page_token)
            return pb.ListAgentsResponse(agents=agents.messages(session, rows), next_page_token=token)

        return await self._cloud.read(work)

    async def LabelAgent(self, request: pb.LabelAgentRequest, context: Context) -> pb.LabelAgentResponse:
        """Sets and removes labels; students that select by them follow."""

        def label(session: Session, agent: Agent, now: dt.datetime) -> None:
            kept = {key: value for key, value in agent.labels.items() if key not in request.remove}
            agent.labels = selector.check_labels({**kept, **request.set})
            mine = sa.update(Assignment).where(Assignment.agent_id == agent.id)
            session.execute(mine.values(update_time=now))
            bump(session, "desired_state")

        return pb.LabelAgentResponse(agent=await self._alter(request.name, label))

    async def RevokeAgent(self, request: pb.RevokeAgentRequest, context: Context) -> pb.RevokeAgentResponse:
        """Shuts an agent out for ever."""

        def revoke(session: Session, agent: Agent, now: dt.datetime) -> None:
            agent.state, agent.reason, agent.connected = AgentState.REVOKED, request.reason[:1024], False
            certificates.revoke_subject(session, names.make("agents", agent.id), now)
            bump(session, "desired_state")

        answer = await self._alter(request.name, revoke)
        gone = EbbflowError(Reason.CERTIFICATE_REVOKED, f"{request.name} was revoked")
        self._hub.shut_out(names.parse(request.name, "agents"), gone)
        return pb.RevokeAgentResponse(agent=answer)

    async def ReinstateAgent(self, request: pb.ReinstateAgentRequest, context: Context) -> pb.ReinstateAgentResponse:
        """Lets a quarantined agent back in; whichever process connects first holds its line."""

        def reinstate(_: Session, agent: Agent, __: dt.datetime) -> None:
            if agent.state is not AgentState.QUARANTINED:
                message = f"{request.name} is {agent.state.value}, not quarantined"
                raise EbbflowError(Reason.STATE_CONFLICT, message, state=agent.state.value)
            agent.state, agent.reason, agent.instance_id = AgentState.ACTIVE, "", None

        return pb.ReinstateAgentResponse(agent=await self._alter(request.name, reinstate))

    async def PinAgent(self, request: pb.PinAgentRequest, context: Context) -> pb.PinAgentResponse:
        """Holds an agent on one release, whatever rollouts do."""
        student_id, number = names.parse_release(request.release)

        def pin(session: Session, agent_id: str, now: dt.datetime) -> None:
            pins.pin(session, agent_id, student_id, number, request.reason, now)

        return pb.PinAgentResponse(agent=await self._hold(request.name, pin))

    async def UnpinAgent(self, request: pb.UnpinAgentRequest, context: Context) -> pb.UnpinAgentResponse:
        """Lets rollouts reach an agent again."""
        student_id = names.parse(request.student, "students")

        def unpin(session: Session, agent_id: str, now: dt.datetime) -> None:
            find_student(session, student_id)
            pins.unpin(session, agent_id, student_id, now)

        return pb.UnpinAgentResponse(agent=await self._hold(request.name, unpin))

    async def CreateEnrolmentToken(
        self, request: pb.CreateEnrolmentTokenRequest, context: Context
    ) -> pb.CreateEnrolmentTokenResponse:
        """Makes a token. A retry by request_id makes no second one, and cannot show the secret again."""
        call, labels = current(), selector.check_labels(request.labels)
        lifetime = duration(request.lifetime, tokens.DEFAULT_LIFETIME)
        made: list[str] = []

        def work(session: Session, now: dt.datetime) -> pb.CreateEnrolmentTokenResponse:
            def act() -> pb.CreateEnrolmentTokenResponse:
                row, secret = tokens.create(
                    session, self._cloud.authority.sha256, now, request.uses or 1, lifetime, labels
                )
                made.append(secret.encode())
                return pb.CreateEnrolmentTokenResponse(enrolment_token=fleet.token(row))

            answer = remember(
                session, call.actor, request.request_id, request, now, act, pb.CreateEnrolmentTokenResponse
            )
            call.resource = answer.enrolment_token.name
            return answer

        answer = await self._cloud.change(work)
        if not made:
            message = f"this request made {answer.enrolment_token.name} before; its secret is not kept"
            raise EbbflowError(Reason.ALREADY_EXISTS, message, name=answer.enrolment_token.name)
        answer.secret = made[0]
        return answer

    async def ListEnrolmentTokens(
        self, request: pb.ListEnrolmentTokensRequest, context: Context
    ) -> pb.ListEnrolmentTokensResponse:
        """Returns a page of tokens, newest first."""
        keys = [EnrolmentToken.create_time, EnrolmentToken.id]
        rows, token = await self._cloud.read(
            lambda session: page(
                session, sa.select(EnrolmentToken), keys, request.page_size, request.page_token, descending=True
            )
        )
        return pb.ListEnrolmentTokensResponse(enrolment_tokens=map(fleet.token, rows), next_page_token=token)

    async def RevokeEnrolmentToken(
        self, request: pb.RevokeEnrolmentTokenRequest, context: Context
    ) -> pb.RevokeEnrolmentTokenResponse:
        """Makes a token useless."""
        token_id = names.parse(request.name, "enrolmentTokens")
        row = await self._cloud.change(lambda session, now: tokens.revoke(session, token_id, now))
        return pb.RevokeEnrolmentTokenResponse(enrolment_token=fleet.token(row))

    async def CreateAdmin(self, request: pb.CreateAdminRequest, context: Context) -> pb.CreateAdminResponse:
        """Signs an admin's certificate."""
        cloud, call = self._cloud, current()
        call.resource = names.make("admins", names.check_id(request.admin_id, "admin_id"))
        role, lifetime = _ROLES.get(request.role, ""), duration(request.lifetime, ADMIN_LIFETIME)

        def work(session: Session, now: dt.datetime) -> bytes:
            issued = admins.create(
                session,
                cloud.authority,
                request.admin_id,
                role,
                request.csr_der,
                now,
                lifetime,
                keep_serial=call.caller.serial,
            )
            return issued.certificate_pem

        certificate = await cloud.change(work)
        return pb.CreateAdminResponse(certificate_pem=certificate, authority_pem=cloud.authority.certificate_pem)

    async def _hold(self, name: str, hold: Callable[[Session, str, dt.datetime], None]) -> pb.Agent:
        """Pins or unpins. The agent's row is not locked: rollouts lock their student first, always."""
        agent_id = names.parse(name, "agents")

        def work(session: Session, now: dt.datetime) -> pb.Agent:
            agents.find(session, agent_id)
            hold(session, agent_id, now)
            return agents.message(session, agent_id)

        answer = await self._cloud.change(work)
        self._hub.nudge()
        return answer

    async def _alter(self, name: str, alter: Callable[[Session, Agent, dt.datetime], None]) -> pb.Agent:
        agent_id = names.parse(name, "agents")

        def work(session: Session, now: dt.datetime) -> pb.Agent:
            alter(session, agents.find(session, agent_id, lock=True), now)
            session.flush()
            return agents.message(session, agent_id)

        answer = await self._cloud.change(work)
        self._hub.nudge()
        return answer
