"""Keeps the certificate valid: renews it in time, recovers it when that was missed."""

import datetime as dt
from typing import Literal

import structlog

from ebbflow.api.v1 import agent_pb2, enrolment_pb2_grpc
from ebbflow.api.v1 import enrolment_pb2 as pb
from ebbflow.client.channels import channel
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import make_csr, sign
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.delivery.clock import TrustClock

log = structlog.get_logger(__name__)

# A clock may be set at any time, so waits are short.
_SHORTEST_NAP_S, _LONGEST_NAP_S = 1.0, 600.0
_MARGIN = dt.timedelta(seconds=5)

Step = Literal["wait", "renew", "recover"]


def next_step(now: dt.datetime, renew_time: dt.datetime, expire_time: dt.datetime) -> Step:
    """Decides what the certificate needs."""
    if now >= expire_time - _MARGIN:
        return "recover"
    return "renew" if now >= renew_time else "wait"


class Renewal:
    """Looks after one agent's certificate."""

    def __init__(self, cloud: Cloud, clock: TrustClock) -> None:
        """Takes the channels, which get the new certificates, and the clock by which certificates expire."""
        self._cloud, self._clock = cloud, clock

    async def look(self) -> float:
        """Does what the certificate needs now; returns the seconds until the next look.

        Raises:
            EbbflowError: why it could not be renewed; the agent serves on.
        """
        known, now = self._cloud.credentials, self._clock.now()
        step = next_step(now, known.renew_time, known.expire_time)
        if step != "wait":
            await self._cloud.adopt(await (self._recover() if step == "recover" else self._renew()))
            known = self._cloud.credentials
            log.info("certificate_renewed", step=step, expire_time=known.expire_time.isoformat())
        return min(max((known.renew_time - now).total_seconds(), _SHORTEST_NAP_S), _LONGEST_NAP_S)

    async def _renew(self) -> pb.Credentials:
        request = agent_pb2.RenewRequest(csr_der=make_csr(self._cloud.credentials.key()))
        try:
            return (await self._cloud.agent.Renew(request)).credentials
        except EbbflowError as error:
            if error.reason is not Reason.CERTIFICATE_EXPIRED:
                raise
            return await self._recover()  # by the cloud's clock, which counts

    async def _recover(self) -> pb.Credentials:
        known = self._cloud.credentials
        key = known.key()
        csr_der = make_csr(key)
        request = pb.RecoverRequest(certificate_pem=known.certificate_pem, csr_der=csr_der, proof=sign(key, csr_der))
        async with channel(known.enrolment) as enrolment:
            return (await enrolment_pb2_grpc.EnrolmentServiceStub(enrolment).Recover(request)).credentials
