"""EnrolmentService: certificates for devices that have none, or no longer a valid one."""

import datetime as dt
import secrets
from typing import Any

import grpc
from sqlalchemy.orm import Session

from ebbflow.api.v1 import enrolment_pb2 as pb
from ebbflow.api.v1 import enrolment_pb2_grpc
from ebbflow.cloud.identity import certificates, tokens
from ebbflow.cloud.registry.locks import exclusive
from ebbflow.cloud.registry.tables import Agent, AgentState, EnrolmentToken
from ebbflow.cloud.release import repository
from ebbflow.cloud.rollout import selector
from ebbflow.cloud.services.authorise import check_agent
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert import fleet
from ebbflow.cloud.services.convert.common import to_json
from ebbflow.cloud.services.limits import check_profile
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import public_key_of_csr, public_key_sha256, verify
from ebbflow.common.identity.tokens import EnrolmentSecret

Context = grpc.aio.ServicerContext[Any, Any]


class EnrolmentService(enrolment_pb2_grpc.EnrolmentServiceServicer):
    """See enrolment.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:
        """Turns a token and a key into an identity; a retry gets the same one."""
        secret = EnrolmentSecret.decode(request.token)
        key = public_key_sha256(public_key_of_csr(request.csr_der))
        call = current()
        call.resource = names.make("enrolmentTokens", secret.token_id)

        def work(session: Session, now: dt.datetime) -> pb.EnrolResponse:
            def admit(token: EnrolmentToken) -> bytes:
                return self._admit(session, request, token, now).SerializeToString()

            answer = tokens.redeem(session, secret, request.request_id, key, now, admit)
            response = pb.EnrolResponse.FromString(answer)
            call.resource = response.agent
            return response

        return await self._cloud.change(work)

    async def Recover(self, request: pb.RecoverRequest, context: Context) -> pb.RecoverResponse:
        """Gives an agent whose certificate has expired a new one, if it still holds the key."""
        cloud, call = self._cloud, current()
        peer = cloud.authority.verify(request.certificate_pem, allow_expired=True)
        call.resource = peer.identity.name
        if peer.identity.kind != "agent":
            raise EbbflowError(Reason.CERTIFICATE_INVALID, "only agents recover; an owner makes admins anew")
        verify(peer.public_key, request.proof, request.csr_der)

        def work(session: Session, now: dt.datetime) -> pb.RecoverResponse:
            certificates.check(session, peer.serial)
            check_agent(session.get(Agent, peer.identity.id), peer.identity.name)
            issued = cloud.authority.issue_agent(request.csr_der, peer.identity.id, cloud.agent_lifetime, now)
            certificates.record(session, issued, now)
            return pb.RecoverResponse(
                credentials=fleet.credentials(issued, cloud.authority.certificate_pem, cloud.endpoint)
            )

        return await cloud.change(work)

    def _admit(
        self, session: Session, request: pb.EnrolRequest, token: EnrolmentToken, now: dt.datetime
    ) -> pb.EnrolResponse:
        cloud = self._cloud
        check_profile(request.profile)
        agent_id = request.agent_id or f"agent-{secrets.token_hex(4)}"
        names.check_id(agent_id, "agent_id")
        exclusive(session, f"agents/{agent_id}")
        if session.get(Agent, agent_id) is not None:
            name = names.make("agents", agent_id)
            raise EbbflowError(Reason.ALREADY_EXISTS, f"{name} exists already", name=name)
        session.add(
            Agent(
                id=agent_id,
                state=AgentState.ACTIVE,
                labels=selector.check_labels({**request.labels, **token.labels}),
                profile=to_json(request.profile),
                create_time=now,
                new_device=request.new_device,
            )
        )
        issued = cloud.authority.issue_agent(request.csr_der, agent_id, cloud.agent_lifetime, now)
        certificates.record(session, issued, now)
        return pb.EnrolResponse(
            agent=names.make("agents", agent_id),
            credentials=fleet.credentials(issued, cloud.authority.certificate_pem, cloud.endpoint),
            trust_root=repository.trust_root(session),
        )
