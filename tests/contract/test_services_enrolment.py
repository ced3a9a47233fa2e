"""How devices get in, stay in, come back and are shut out."""

import asyncio
import contextlib
import datetime as dt
import uuid
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sqlalchemy as sa

from ebbflow.api.v1 import agent_pb2, enrolment_pb2, fleet_pb2, resources_pb2
from ebbflow.api.v1.agent_pb2_grpc import AgentServiceStub
from ebbflow.api.v1.fleet_pb2_grpc import FleetServiceStub
from ebbflow.client.channels import channel
from ebbflow.cloud.registry.tables import Agent, AgentState, AuditEntry, DeviceState, EnrolmentToken, RolloutDevice
from ebbflow.cloud.services import audit, listeners
from ebbflow.cloud.services.hub import Hub
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import generate_key, make_csr, sign
from ebbflow.common.identity.peers import Identity

Plane = Any


def enrol_request(token: str, **fields: Any) -> enrolment_pb2.EnrolRequest:
    fields.setdefault("csr_der", make_csr(generate_key()))
    return enrolment_pb2.EnrolRequest(token=token, **fields)


async def test_a_token_and_a_key_become_an_identity_that_may_call(plane: Plane) -> None:
    key = generate_key()
    token = plane.token(labels={"site": "berlin"})
    answer = await plane.enrolment().Enrol(
        enrol_request(token, csr_der=make_csr(key), agent_id="kiosk-7", labels={"site": "rome", "ring": "beta"})
    )
    assert answer.agent == "agents/kiosk-7"
    assert answer.credentials.endpoint == plane.bound.main_address
    assert b"root" in answer.trust_root
    assert Identity.from_certificate(answer.credentials.certificate_pem).name == "agents/kiosk-7"
    client = plane.connect(answer.credentials.certificate_pem, key)
    desired = await AgentServiceStub(client.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())
    assert list(desired.releases) == []
    with plane.registry.reading() as session:
        assert session.get_one(Agent, "kiosk-7").labels == {"site": "berlin", "ring": "beta"}


async def test_a_retry_gets_the_same_identity_and_uses_the_token_once(plane: Plane) -> None:
    request = enrol_request(plane.token(uses=2), request_id=str(uuid.uuid4()))
    enrolment = plane.enrolment()
    first, second = await enrolment.Enrol(request), await enrolment.Enrol(request)
    assert first == second
    with plane.registry.reading() as session:
        assert session.scalars(sa.select(EnrolmentToken.uses_left)).one() == 1
        assert len(session.scalars(sa.select(Agent)).all()) == 1


@pytest.mark.parametrize("new_device", [True, False])
async def test_the_operators_word_on_a_device_is_kept(plane: Plane, new_device: bool) -> None:
    answer = await plane.enrolment().Enrol(enrol_request(plane.token(), new_device=new_device))
    with plane.registry.reading() as session:
        assert session.get_one(Agent, answer.agent.removeprefix("agents/")).new_device is new_device


async def test_a_name_that_is_taken_costs_no_use_of_the_token(plane: Plane) -> None:
    plane.agent("kiosk-7")
    with pytest.raises(EbbflowError) as caught:
        await plane.enrolment().Enrol(enrol_request(plane.token(), agent_id="kiosk-7"))
    assert caught.value.reason is Reason.ALREADY_EXISTS
    with plane.registry.reading() as session:
        assert session.scalars(sa.select(EnrolmentToken.uses_left)).one() == 1
        entry = session.scalars(sa.select(AuditEntry)).one()
    assert (entry.actor, entry.method, entry.code) == ("anonymous", "EnrolmentService/Enrol", "ALREADY_EXISTS")


async def test_a_wrong_token_is_refused(plane: Plane) -> None:
    with pytest.raises(EbbflowError) as caught:
        await plane.enrolment().Enrol(enrol_request(plane.token()[:-10]))
    assert caught.value.reason is Reason.TOKEN_INVALID


async def test_renewal_hands_out_a_certificate_that_works(plane: Plane) -> None:
    client, key = plane.agent("kiosk-7"), generate_key()
    renewed = await AgentServiceStub(client.channel).Renew(agent_pb2.RenewRequest(csr_der=make_csr(key)))
    fresh = plane.connect(renewed.credentials.certificate_pem, key)
    await AgentServiceStub(fresh.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())


async def recover(plane: Plane, client: Any, signer: Any = None) -> enrolment_pb2.RecoverResponse:
    csr = make_csr(client.key)
    answer: enrolment_pb2.RecoverResponse = await plane.enrolment().Recover(
        enrolment_pb2.RecoverRequest(
            certificate_pem=client.certificate_pem, csr_der=csr, proof=sign(signer or client.key, csr)
        )
    )
    return answer


async def test_an_expired_certificate_is_refused_and_recovered_with_its_key(plane: Plane) -> None:
    client = plane.agent("kiosk-7", lifetime=dt.timedelta(seconds=1))
    await asyncio.sleep(1.2)
    with pytest.raises(EbbflowError):
        await AgentServiceStub(client.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())
    answer = await recover(plane, client)
    fresh = plane.connect(answer.credentials.certificate_pem, client.key)
    await AgentServiceStub(fresh.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())


async def test_recovery_needs_the_key_and_a_certificate_that_was_not_revoked(plane: Plane) -> None:
    client = plane.agent("kiosk-7", lifetime=dt.timedelta(seconds=-1))
    with pytest.raises(EbbflowError) as caught:
        await recover(plane, client, signer=generate_key())
    assert caught.value.reason is Reason.CERTIFICATE_INVALID
    fleet = FleetServiceStub(plane.admin().channel)
    await fleet.RevokeAgent(fleet_pb2.RevokeAgentRequest(name="agents/kiosk-7", reason="stolen"))
    with pytest.raises(EbbflowError) as caught:
        await recover(plane, client)
    assert caught.value.reason is Reason.CERTIFICATE_REVOKED


async def test_a_revoked_agent_is_refused_on_its_next_call_over_the_same_connection(plane: Plane) -> None:
    agent = AgentServiceStub(plane.agent("kiosk-7").channel)
    await agent.GetDesiredState(agent_pb2.GetDesiredStateRequest())
    fleet = FleetServiceStub(plane.admin().channel)
    await fleet.RevokeAgent(fleet_pb2.RevokeAgentRequest(name="agents/kiosk-7", reason="stolen"))
    with pytest.raises(EbbflowError) as caught:
        await agent.GetDesiredState(agent_pb2.GetDesiredStateRequest())
    assert caught.value.reason is Reason.CERTIFICATE_REVOKED


@dataclass
class Channelled:
    """Somebody with a channel of their own."""

    channel: Any


class Wire:
    """One open control line."""

    def __init__(self, plane: Plane, client: Any, instance_id: str) -> None:
        self._up: asyncio.Queue[agent_pb2.ConnectRequest] = asyncio.Queue()
        self._up.put_nowait(agent_pb2.ConnectRequest(hello=agent_pb2.Hello(instance_id=instance_id)))
        self.answers = AgentServiceStub(client.channel).Connect(self._requests())

    async def _requests(self) -> Any:
        while True:
            yield await self._up.get()

    def beat(self, uptime_s: int = 1, *reports: resources_pb2.Installation) -> None:
        telemetry = agent_pb2.Telemetry(uptime_s=uptime_s, installations=reports)
        self._up.put_nowait(agent_pb2.ConnectRequest(heartbeat=agent_pb2.Heartbeat(telemetry=telemetry)))

    async def welcome(self) -> agent_pb2.ConnectResponse:
        return await asyncio.wait_for(anext(aiter(self.answers)), 60)

    async def end(self) -> Reason | None:
        try:
            async with asyncio.timeout(60):
                async for _ in self.answers:
                    pass
        except EbbflowError as error:
            return error.reason
        return None


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - the registry has no event to wait for
            await asyncio.sleep(0.02)


def agent_row(plane: Plane, agent_id: str = "kiosk-7") -> Agent:
    with plane.registry.reading() as session:
        return session.get_one(Agent, agent_id)  # type: ignore[no-any-return]


async def test_heartbeats_reach_the_registry_and_an_ended_line_is_noticed(plane: Plane) -> None:
    wire = Wire(plane, plane.agent("kiosk-7"), str(uuid.uuid4()))
    assert (await wire.welcome()).welcome.heartbeat_interval_s == 30
    wire.beat(uptime_s=77)
    await until(lambda: agent_row(plane).telemetry.get("uptimeS") == "77")
    assert agent_row(plane).connected
    wire.answers.cancel()
    await until(lambda: not agent_row(plane).connected)


async def test_a_report_that_was_lost_is_taken_from_the_heartbeat(plane: Plane) -> None:
    plane.student()
    plane.release()
    client = plane.agent("kiosk-7")
    plane.roll_out("faq", 1)
    wire = Wire(plane, client, str(uuid.uuid4()))
    await wire.welcome()
    await AgentServiceStub(client.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())
    serving = resources_pb2.Installation(
        student="students/faq",
        release="students/faq/releases/1",
        state=resources_pb2.INSTALLATION_STATE_SERVING,
    )
    odd = resources_pb2.Installation(student="no student", release="none", state=serving.state, reason="\0")
    wire.beat(1, odd, serving)

    def device_state() -> DeviceState:
        with plane.registry.reading() as session:
            return session.scalars(sa.select(RolloutDevice.state)).one()  # type: ignore[no-any-return]

    await until(lambda: device_state() is DeviceState.SUCCEEDED)
    wire.answers.cancel()


async def test_two_live_processes_under_one_identity_are_quarantined(plane: Plane) -> None:
    client, copy = plane.agent("kiosk-7"), plane.agent("kiosk-7")
    first = Wire(plane, client, str(uuid.uuid4()))
    await first.welcome()
    second = Wire(plane, copy, str(uuid.uuid4()))
    await second.welcome()
    first.beat()
    assert await first.end() is Reason.AGENT_QUARANTINED
    assert await second.end() is Reason.AGENT_QUARANTINED
    assert agent_row(plane).state is AgentState.QUARANTINED
    with pytest.raises(EbbflowError) as caught:
        await AgentServiceStub(copy.channel).GetDesiredState(agent_pb2.GetDesiredStateRequest())
    assert caught.value.reason is Reason.AGENT_QUARANTINED
    await FleetServiceStub(plane.admin().channel).ReinstateAgent(fleet_pb2.ReinstateAgentRequest(name="agents/kiosk-7"))
    again = Wire(plane, client, str(uuid.uuid4()))
    await again.welcome()
    again.answers.cancel()


async def test_a_restarted_process_is_no_copy(plane: Plane) -> None:
    client = plane.agent("kiosk-7")
    for _ in range(3):
        wire = Wire(plane, client, str(uuid.uuid4()))
        await wire.welcome()
        wire.beat()
        await asyncio.sleep(0.1)
        wire.answers.cancel()
    assert agent_row(plane).state is AgentState.ACTIVE


async def test_revocation_ends_a_live_line(plane: Plane) -> None:
    wire = Wire(plane, plane.agent("kiosk-7"), str(uuid.uuid4()))
    await wire.welcome()
    fleet = FleetServiceStub(plane.admin().channel)
    await fleet.RevokeAgent(fleet_pb2.RevokeAgentRequest(name="agents/kiosk-7", reason="stolen"))
    assert await wire.end() is Reason.CERTIFICATE_REVOKED


async def test_two_processes_on_two_replicas_are_quarantined_too(plane: Plane) -> None:
    other = Hub(plane.cloud)
    bound = listeners.build(plane.cloud, other)
    await bound.start()
    running = asyncio.create_task(other.run(0.05))
    client = plane.agent("kiosk-7")
    first = Wire(plane, client, str(uuid.uuid4()))
    await first.welcome()
    copy = channel(replace(plane.endpoint(client.certificate_pem, client.key), address=bound.main_address))
    second = Wire(plane, Channelled(copy), str(uuid.uuid4()))
    await second.welcome()
    first.beat()
    assert await first.end() is Reason.AGENT_QUARANTINED
    assert await second.end() is Reason.AGENT_QUARANTINED
    await copy.close()
    await bound.stop(other, grace_s=1.0)
    running.cancel()


async def test_a_drain_ends_lines_without_an_error_and_takes_no_grace(plane: Plane) -> None:
    wire = Wire(plane, plane.agent("kiosk-7"), str(uuid.uuid4()))
    await wire.welcome()
    async with asyncio.timeout(60):
        await plane.bound.stop(plane.hub, grace_s=300.0)
    assert await wire.end() is None


async def test_strangers_cannot_fill_the_audit_log(plane: Plane) -> None:
    enrolment = plane.enrolment()
    for _ in range(audit.ANONYMOUS_PER_MINUTE + 20):
        with pytest.raises(EbbflowError):
            await enrolment.Enrol(enrol_request("no token"))
    with plane.registry.reading() as session:
        kept = session.scalars(sa.select(AuditEntry)).all()
    assert len(kept) <= 2 * audit.ANONYMOUS_PER_MINUTE


async def test_an_agent_that_says_too_much_of_itself_is_refused(plane: Plane) -> None:
    profile = resources_pb2.DeviceProfile(agent_version="x" * 2000)
    with pytest.raises(EbbflowError) as caught:
        await AgentServiceStub(plane.agent("kiosk-7").channel).GetDesiredState(
            agent_pb2.GetDesiredStateRequest(profile=profile)
        )
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_a_line_must_begin_with_a_hello(plane: Plane) -> None:
    wire = Wire(plane, plane.agent("kiosk-7"), "not a uuid")
    assert await wire.end() is Reason.INVALID_REQUEST
    with contextlib.suppress(EbbflowError):
        wire.answers.cancel()
