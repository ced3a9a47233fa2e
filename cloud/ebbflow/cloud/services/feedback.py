"""FeedbackService: the only way by which anything that derives from users' requests leaves a device."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from sqlalchemy.orm import Session

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.api.v1 import feedback_pb2_grpc
from ebbflow.cloud.feedback import batches, charges, rounds
from ebbflow.cloud.registry import clock
from ebbflow.cloud.services.call import current
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError

Context = grpc.aio.ServicerContext[Any, Any]


class FeedbackService(feedback_pb2_grpc.FeedbackServiceServicer):
    """See feedback.proto."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def GetPlan(self, request: pb.GetPlanRequest, context: Context) -> pb.GetPlanResponse:
        """Returns the plans of the open rounds that wait for the agent, and every charge that the cloud knows of."""
        agent_id = current().agent_id

        def work(session: Session) -> pb.GetPlanResponse:
            waiting = {names.make("rounds", id_): id_ for id_ in rounds.waiting_for(session, agent_id, clock.now())}
            held = set(request.held_rounds)  # a plan may be large, and is asked for at every look
            return pb.GetPlanResponse(
                plans=rounds.signed_plans(session, [id_ for name, id_ in waiting.items() if name not in held]),
                charges=charges.known(session, agent_id),
                held_rounds=[name for name in waiting if name in held],
            )

        return await self._cloud.read(work)

    async def SubmitBatch(self, request: pb.SubmitBatchRequest, context: Context) -> pb.SubmitBatchResponse:
        """Keeps a batch, or refuses it and keeps no byte of it."""
        cloud, call = self._cloud, current()
        agent_id, key = call.agent_id, call.caller.public_key
        call.resource = round_of(request.batch)
        await cloud.in_thread(
            cloud.sql, lambda: batches.submit(cloud.registry, agent_id, request.batch, key, clock.now(), cloud.blobs)
        )
        await cloud.change(lambda _session, _now: None)
        return pb.SubmitBatchResponse()


def round_of(signed: pb.SignedBatch) -> str:
    """The round that a batch is for, as the audit log names it; empty if it names none."""
    try:
        name = pb.FeedbackBatch.FromString(signed.batch).round
        names.parse(name, "rounds")
    except (DecodeError, EbbflowError):
        return ""
    return name
