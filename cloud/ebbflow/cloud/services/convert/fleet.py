"""Agents, enrolment tokens and credentials."""

import datetime as dt
from collections.abc import Sequence

from ebbflow.api.v1 import enrolment_pb2, fleet_pb2, resources_pb2
from ebbflow.cloud.identity.authority import Issued
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment, EnrolmentToken, Pin
from ebbflow.cloud.services.convert.common import from_json, timestamp
from ebbflow.common import names

STATES = {
    AgentState.ACTIVE: fleet_pb2.Agent.STATE_ACTIVE,
    AgentState.QUARANTINED: fleet_pb2.Agent.STATE_QUARANTINED,
    AgentState.REVOKED: fleet_pb2.Agent.STATE_REVOKED,
}


def agent(
    row: Agent, assignments: Sequence[Assignment], pins: Sequence[Pin], certificate_expire: dt.datetime | None
) -> fleet_pb2.Agent:
    """An agent with what it last reported, and what it is held on."""
    return fleet_pb2.Agent(
        name=names.make("agents", row.id),
        state=STATES[row.state],
        labels=row.labels,
        profile=from_json(row.profile, resources_pb2.DeviceProfile),
        installations=[
            from_json(assignment.installation, resources_pb2.Installation)
            for assignment in assignments
            if assignment.installation
        ],
        connected=row.connected,
        last_seen_time=timestamp(row.last_seen_time),
        certificate_expire_time=timestamp(certificate_expire),
        create_time=timestamp(row.create_time),
        reason=row.reason,
        pins=map(pin, pins),
    )


def pin(row: Pin) -> fleet_pb2.Pin:
    """What holds an agent on a release."""
    return fleet_pb2.Pin(
        student=names.make("students", row.student_id),
        release=names.release(row.student_id, row.release_number),
        reason=row.reason,
        create_time=timestamp(row.create_time),
    )


def token(row: EnrolmentToken) -> fleet_pb2.EnrolmentToken:
    """An enrolment token, without its secret."""
    return fleet_pb2.EnrolmentToken(
        name=names.make("enrolmentTokens", row.id),
        labels=row.labels,
        uses_left=row.uses_left,
        expire_time=timestamp(row.expire_time),
        revoked=row.revoke_time is not None,
        create_time=timestamp(row.create_time),
    )


def credentials(issued: Issued, authority_pem: bytes, endpoint: str) -> enrolment_pb2.Credentials:
    """A certificate and what goes with it."""
    return enrolment_pb2.Credentials(
        certificate_pem=issued.certificate_pem,
        authority_pem=authority_pem,
        endpoint=endpoint,
        expire_time=timestamp(issued.expire_time),
        renew_time=timestamp(issued.renew_time),
    )
