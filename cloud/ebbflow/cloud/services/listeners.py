"""The two listeners: one that asks for certificates, and one for devices that have none."""

import asyncio
import datetime as dt
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from ebbflow.api.v1 import (
    agent_pb2_grpc,
    distillation_pb2_grpc,
    enrolment_pb2_grpc,
    feedback_pb2_grpc,
    fleet_pb2_grpc,
    ledger_pb2_grpc,
    population_pb2_grpc,
    release_pb2_grpc,
    rollout_pb2_grpc,
    round_pb2_grpc,
    student_pb2_grpc,
    trust_pb2_grpc,
)
from ebbflow.cloud.identity.server_certificate import ServerCertificate
from ebbflow.cloud.services.agent import AgentService
from ebbflow.cloud.services.artefact import ArtefactService
from ebbflow.cloud.services.authorise import CallInterceptor
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.distillation import DistillationService
from ebbflow.cloud.services.enrolment import EnrolmentService
from ebbflow.cloud.services.feedback import FeedbackService
from ebbflow.cloud.services.fleet import FleetService
from ebbflow.cloud.services.hub import Hub
from ebbflow.cloud.services.ledger import LedgerService
from ebbflow.cloud.services.policy import PACKAGE
from ebbflow.cloud.services.population import PopulationService
from ebbflow.cloud.services.release import ReleaseService
from ebbflow.cloud.services.rollout import RolloutService
from ebbflow.cloud.services.round import RoundService
from ebbflow.cloud.services.student import StudentService
from ebbflow.cloud.services.trust import TrustService
from ebbflow.common.rpc.server import add_health_and_reflection, bind, make_server

_log = logging.getLogger(__name__)

MAIN_SERVICES = (
    "AgentService",
    "ArtefactService",
    "DistillationService",
    "FeedbackService",
    "FleetService",
    "LedgerService",
    "PopulationService",
    "ReleaseService",
    "RolloutService",
    "RoundService",
    "StudentService",
    "TrustService",
)
EVERYWHERE = frozenset({"", "0.0.0.0", "[::]"})  # noqa: S104 - compared with, not bound to
ENROLMENT_SERVICES = ("EnrolmentService",)


@dataclass(frozen=True)
class Listeners:
    """Two servers that are bound but do not run yet."""

    main: grpc.aio.Server
    main_address: str
    """host:port under which it is found, with the port that was really bound."""
    enrolment: grpc.aio.Server
    enrolment_address: str
    health: tuple[Any, Any]

    @property
    def servers(self) -> Sequence[grpc.aio.Server]:
        """Both."""
        return self.main, self.enrolment

    async def start(self) -> None:
        """Takes calls from now on."""
        await asyncio.gather(*(server.start() for server in self.servers))

    async def stop(self, hub: Hub, grace_s: float) -> None:
        """Drains: says so, ends the agents' lines, lets other calls end."""
        for servicer in self.health:
            await servicer.enter_graceful_shutdown()
        hub.drain()
        await asyncio.gather(*(server.stop(grace_s) for server in self.servers))


def certificate_of(cloud: Cloud) -> ServerCertificate:
    """The certificate that both listeners present."""
    settings = cloud.settings
    hosts = [*settings.hosts, settings.advertise.rpartition(":")[0]]
    return ServerCertificate(cloud.authority, hosts, dt.timedelta(days=settings.server_certificate_days))


def build(cloud: Cloud, hub: Hub) -> Listeners:
    """Makes both servers and opens their ports. Needs a running event loop.

    Raises:
        EbbflowError: PORT_IN_USE or CONFIG_INVALID.
    """
    certificate, settings = certificate_of(cloud), cloud.settings
    main = make_server([CallInterceptor(cloud, identified=True)])
    _register(main, cloud, hub)
    enrolment = make_server([CallInterceptor(cloud, identified=False)])
    enrolment_pb2_grpc.add_EnrolmentServiceServicer_to_server(EnrolmentService(cloud), enrolment)
    health = (
        add_health_and_reflection(main, [f"{PACKAGE}.{service}" for service in MAIN_SERVICES]),
        add_health_and_reflection(enrolment, [f"{PACKAGE}.{service}" for service in ENROLMENT_SERVICES]),
    )
    main_port = bind(main, settings.listen, certificate.credentials(client_certificates=True))
    enrolment_port = bind(enrolment, settings.enrol_listen, certificate.credentials(client_certificates=False))
    main_address = _reachable(settings.listen, main_port, settings.hosts)
    enrolment_address = _reachable(settings.enrol_listen, enrolment_port, settings.hosts)
    cloud.endpoint = settings.advertise or main_address
    return Listeners(main, main_address, enrolment, enrolment_address, health)


def _register(server: grpc.aio.Server, cloud: Cloud, hub: Hub) -> None:
    agent_pb2_grpc.add_AgentServiceServicer_to_server(AgentService(cloud, hub), server)
    ArtefactService(cloud).register(server)
    distillation_pb2_grpc.add_DistillationServiceServicer_to_server(DistillationService(cloud), server)
    feedback_pb2_grpc.add_FeedbackServiceServicer_to_server(FeedbackService(cloud), server)
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(FleetService(cloud, hub), server)
    ledger_pb2_grpc.add_LedgerServiceServicer_to_server(LedgerService(cloud), server)
    population_pb2_grpc.add_PopulationServiceServicer_to_server(PopulationService(cloud), server)
    release_pb2_grpc.add_ReleaseServiceServicer_to_server(ReleaseService(cloud), server)
    rollout_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutService(cloud, hub), server)
    round_pb2_grpc.add_RoundServiceServicer_to_server(RoundService(cloud, hub), server)
    student_pb2_grpc.add_StudentServiceServicer_to_server(StudentService(cloud), server)
    trust_pb2_grpc.add_TrustServiceServicer_to_server(TrustService(cloud), server)


def _reachable(listen: str, port: int, hosts: Sequence[str]) -> str:
    """Where a listener is found: one on every interface goes by the first name in its certificate."""
    host = listen.rpartition(":")[0]
    return f"{hosts[0] if host in EVERYWHERE and hosts else host}:{port}"
