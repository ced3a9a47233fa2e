"""Agents and releases in a registry, as if devices and workers had been there."""

import datetime as dt

from ebbflow.cloud.identity import certificates
from ebbflow.cloud.registry.clock import now
from ebbflow.cloud.registry.tables import Agent, AgentState, Distillation, DistillationState, Release, ReleaseState
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.identity.keys import generate_key, make_csr


def enrol(cloud: Cloud, agent_id: str, **labels: str) -> None:
    """Adds an agent."""
    with cloud.registry.transaction() as session:
        row = Agent(id=agent_id, state=AgentState.ACTIVE, labels=labels, profile={}, create_time=now(), new_device=True)
        session.add(row)
        issued = cloud.authority.issue_agent(make_csr(generate_key()), agent_id, dt.timedelta(days=1), now())
        certificates.record(session, issued, now())


def add_release(cloud: Cloud, number: int, state: ReleaseState = ReleaseState.PUBLISHED) -> None:
    """Adds a release of the student "faq", with its distillation."""
    with cloud.registry.transaction() as session:
        session.add(
            Distillation(
                id=f"d{number}",
                student_id="faq",
                state=DistillationState.SUCCEEDED,
                recipe={"steps": 10},
                mixture={},
                base_release=None,
                round_id=None,
                create_time=now(),
                update_time=now(),
            )
        )
        session.flush()
        target = {"sha256": "ab" * 32, "size_bytes": 7}
        targets = {
            f"student/faq/{number}.manifest.json": {**target, "kind": "manifest"},
            f"student/faq/{number}.int8.safetensors": {**target, "kind": "int8"},
        }
        session.add(
            Release(
                student_id="faq",
                number=number,
                distillation_id=f"d{number}",
                state=state,
                targets=targets,
                create_time=now(),
            )
        )
