"""TrustService: shows the signed metadata's roles, and takes what was signed offline."""

import datetime as dt
from typing import Any

import grpc
from sqlalchemy.orm import Session
from tuf.api.metadata import Targets

from ebbflow.api.v1 import trust_pb2 as pb
from ebbflow.api.v1 import trust_pb2_grpc
from ebbflow.cloud.registry import clock
from ebbflow.cloud.release import intake, repository, rules, standing
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.convert.common import timestamp
from ebbflow.common import names
from ebbflow.common.trust import roles

Context = grpc.aio.ServicerContext[Any, Any]


class TrustService(trust_pb2_grpc.TrustServiceServicer):
    """See trust.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def GetTrust(self, request: pb.GetTrustRequest, context: Context) -> pb.GetTrustResponse:
        """Returns every role, and the lowest release of every student."""

        def work(session: Session) -> pb.GetTrustResponse:
            found = standing.standing(session, own_keys(self._cloud), clock.now())
            # Not verified: whoever has to mend signatures must see this while they do not hold.
            student = repository.decode(repository.required(session, roles.STUDENT), Targets)
            least = rules.min_releases(student.signed)
            return pb.GetTrustResponse(
                roles=map(_role, found),
                min_releases={names.make("students", student_id): number for student_id, number in least.items()},
            )

        return await self._cloud.read(work)

    async def PublishMetadata(self, request: pb.PublishMetadataRequest, context: Context) -> pb.PublishMetadataResponse:
        """Takes the next version of root or targets."""
        cloud, call = self._cloud, current()

        def work(session: Session, now: dt.datetime) -> pb.PublishMetadataResponse:
            role = intake.accept(session, request.metadata, cloud.online_signer, now)
            found = next(of for of in standing.standing(session, own_keys(cloud), now) if of.role == role)
            call.resource = f"trust/{role}/{found.version}"
            return pb.PublishMetadataResponse(role=_role(found))

        return await cloud.change(work)


def own_keys(cloud: Cloud) -> standing.OwnKeys:
    """Ids of the keys that this control plane signs with."""
    return standing.OwnKeys(cloud.online_signer.public_key.keyid, cloud.plan_signer.key_id)


def _role(role: standing.RoleStanding) -> pb.TrustRole:
    return pb.TrustRole(
        role=role.role,
        version=role.version,
        expire_time=timestamp(role.expires) if role.expires else None,
        threshold=role.threshold,
        keys=[pb.TrustKey(key_id=key.key_id, scheme=key.scheme, signed=key.signed) for key in role.keys],
        action=role.action,
    )
