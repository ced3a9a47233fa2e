"""`ebbflow cloud teach`: hosts the teacher behind mutual TLS."""

import asyncio
import datetime as dt
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc

from ebbflow.api.v1 import teacher_pb2_grpc
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.identity.server_certificate import ServerCertificate
from ebbflow.cloud.processes import logs
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.processes.work import use_threads
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.services.authorise import OURS_ALONE, check_standing
from ebbflow.cloud.teacher import answers
from ebbflow.cloud.teacher.admission import AdmissionInterceptor, Standing
from ebbflow.cloud.teacher.batcher import Batcher
from ebbflow.cloud.teacher.escalation import Escalations, Permission, Quotas, may_escalate
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.cloud.teacher.quota import Quota
from ebbflow.cloud.teacher.service import TeacherService
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.peers import Peer
from ebbflow.common.rpc.server import add_health_and_reflection, bind, make_server, serve_until, stop_on_signals

_log = logging.getLogger(__name__)

SERVICE = "ebbflow.api.v1.TeacherService"


@dataclass(frozen=True)
class Rules:
    """What the registry says of callers; nothing is remembered between calls."""

    standing: Standing
    permission: Permission

    @classmethod
    def of(cls, registry: Registry) -> "Rules":
        """Asks a registry, in threads."""

        def check(peer: Peer) -> None:
            with _ours_alone(), registry.reading() as session:
                check_standing(session, peer, clock.now())

        def look(agent_id: str, student_id: str) -> bool:
            with _ours_alone(), registry.reading() as session:
                return may_escalate(session, agent_id, student_id)

        async def standing(peer: Peer) -> None:
            await asyncio.to_thread(check, peer)

        async def permission(agent_id: str, student_id: str) -> bool:
            return await asyncio.to_thread(look, agent_id, student_id)

        return cls(standing, permission)


@contextmanager
def _ours_alone() -> Iterator[None]:
    """Faults of the cloud's own machine name paths and addresses: the log gets them, no caller does."""
    try:
        yield
    except EbbflowError as error:
        if words := OURS_ALONE.get(error.reason):
            _log.error("a caller of the teacher cannot be checked: %s", error)
            raise EbbflowError(error.reason, words) from error
        raise


def run(settings: CloudSettings) -> None:
    """Runs until SIGTERM or SIGINT.

    Raises:
        EbbflowError: CONFIG_INVALID if no teacher is named, CHECKPOINT_UNREADABLE if it cannot be loaded, PORT_IN_USE,
            NOT_INITIALISED, DATABASE_UNAVAILABLE and what else keeps it from starting.
    """
    logs.configure(settings.log_level)
    if not settings.teacher:
        message = "no teacher is named: set `teacher` in config.toml, EBBFLOW_TEACHER or --teacher"
        raise EbbflowError(Reason.CONFIG_INVALID, message)
    use_threads(settings.threads)
    authority = Authority.load(settings.paths.authority)
    registry = Registry.open(settings.database_url)
    teacher = Teacher.load(settings.teacher)
    _log.info("loaded %s from %s", teacher.architecture, teacher.source)

    async def until_stopped() -> None:
        await teach(settings, teacher, authority, Rules.of(registry), stop_on_signals())

    try:
        asyncio.run(until_stopped())
    finally:
        registry.close()


async def teach(
    settings: CloudSettings,
    teacher: Teacher,
    authority: Authority,
    rules: Rules,
    stop: asyncio.Event,
    ready: "asyncio.Future[str] | None" = None,
) -> None:
    """Serves a teacher until `stop` is set, then drains; sets `ready` to the address when calls are taken.

    Raises:
        EbbflowError: PORT_IN_USE or CONFIG_INVALID.
    """
    batcher: Batcher[answers.Generation | answers.Scoring, list[int] | answers.Score] = Batcher(
        lambda jobs: answers.answer(teacher, jobs), max_batch=settings.teacher_max_batch
    )
    try:
        server = make_server([AdmissionInterceptor(rules.standing)])
        quotas = Quotas(
            Quota(settings.escalation_tokens_per_minute), Quota(settings.escalation_tokens_per_minute_of_all)
        )
        escalations = Escalations(teacher, batcher, rules.permission, quotas)
        service = TeacherService(teacher, batcher, Quota(settings.teacher_tokens_per_minute), escalations)
        teacher_pb2_grpc.add_TeacherServiceServicer_to_server(service, server)
        health = add_health_and_reflection(server, [SERVICE])
        port = bind(server, settings.teacher_listen, _credentials(settings, authority))
        address = f"{settings.teacher_listen.rpartition(':')[0]}:{port}"
        _log.info("the teacher answers on %s", address)
        if ready is not None:
            ready.set_result(address)
        await serve_until(stop, [server], [health])
    finally:
        await asyncio.to_thread(batcher.close)


def _credentials(settings: CloudSettings, authority: Authority) -> grpc.ServerCredentials:
    lifetime = dt.timedelta(days=settings.server_certificate_days)
    return ServerCertificate(authority, settings.hosts, lifetime).credentials(client_certificates=True)
