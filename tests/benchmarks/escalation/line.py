"""The whole way of an escalated question on this machine: the student's server, mutual TLS, `cloud teach`, and back."""

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from ebbflow.cloud.identity import certificates
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes import teach
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import clock, schema
from ebbflow.cloud.registry.engine import Registry, create_engine
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, Student
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr
from ebbflow.edge.agent import teacher as edge
from ebbflow.edge.agent.credentials import Credentials

PLENTY = 100_000_000


@contextlib.asynccontextmanager
async def to(teacher: Teacher, folder: Path) -> AsyncIterator[edge.Teacher]:
    """Serves a teacher and gives the line of an enrolled agent to it."""
    url = f"sqlite:///{folder}/registry.db"
    engine = create_engine(url)
    schema.upgrade(engine)
    engine.dispose()
    registry = Registry.open(url)
    authority = Authority.create(folder / "authority")
    settings = CloudSettings.load(
        folder,
        teacher_listen="localhost:0",
        escalation_tokens_per_minute=PLENTY,
        escalation_tokens_per_minute_of_all=PLENTY,
    )
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    rules = teach.Rules.of(registry)
    serving = asyncio.create_task(teach.teach(settings, teacher, authority, rules, stop, ready))
    line = edge.Teacher(await ready, lambda: credentials)
    credentials = _enrol(registry, authority)
    try:
        yield line
    finally:
        await line.close()
        stop.set()
        await serving
        registry.close()


def _enrol(registry: Registry, authority: Authority) -> Credentials:
    key, now = generate_key(), clock.now()
    with registry.transaction() as session:
        session.add(_student(now))
        session.add(Agent(id="kiosk", state=AgentState.ACTIVE, labels={}, profile={}, create_time=now))
        session.flush()
        session.add(Assignment(agent_id="kiosk", student_id="faq", update_time=now))
        issued = authority.issue_agent(make_csr(key), "kiosk")
        certificates.record(session, issued, now)
    return Credentials(
        agent="agents/kiosk",
        endpoint="",
        enrol_endpoint="",
        expire_time=now,
        renew_time=now,
        certificate_pem=issued.certificate_pem,
        authority_pem=authority.certificate_pem,
        key_pem=key_to_pem(key),
        trust_root=b"",
        enrol_time=now,
        new_device=True,
    )


def _student(now: dt.datetime, topics: Sequence[str] = ("facts",)) -> Student:
    return Student(
        id="faq",
        teacher="",
        architecture={},
        corpus_sha256="0" * 64,
        topics=list(topics),
        privacy_policy={},
        selector="",
        create_time=now,
        escalation_policy={"allowed": True},
    )
