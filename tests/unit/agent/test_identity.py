"""Enrolment that survives cuts, and certificates that stay valid by themselves."""

import asyncio
import contextlib
import datetime as dt
import stat
from pathlib import Path
from typing import Any

import pytest
from agent_support import alive, enrolled, until
from agent_world import CloudWorld
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.api.v1 import enrolment_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import BACKDATED, generate_key, key_to_pem, public_key_of_certificate
from ebbflow.edge.agent.credentials import CredentialFiles
from ebbflow.edge.agent.enrol import Wish, enrol, labels_of
from ebbflow.edge.agent.profile import device_profile
from ebbflow.edge.agent.renewal import next_step
from ebbflow.edge.agent.settings import AgentSettings


async def try_enrol(settings: AgentSettings, wish: Wish, **options: Any) -> str:
    return await asyncio.to_thread(enrol, settings.folder, wish, device_profile(settings), **options)


async def test_enrolment_writes_an_identity_only_the_owner_can_read(cloud: CloudWorld) -> None:
    settings = cloud.device()
    wish = Wish(cloud.enrolment, cloud.token(), "kiosk-7", labels_of(["site=berlin"]))
    assert await try_enrol(settings, wish) == "agents/kiosk-7"
    files = {path.name for path in settings.folder.identity.iterdir()}
    assert files == {"key.pem", "certificate.pem", "authority.pem", "root.json", "agent.toml"}
    paths = [settings.state, *settings.state.rglob("*")]
    assert not [path for path in paths if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    known = CredentialFiles(settings.folder).load()
    assert (known.agent, known.endpoint, known.enrol_endpoint) == ("agents/kiosk-7", cloud.main, cloud.enrolment)
    assert wish.token not in repr(wish)
    assert "PRIVATE" not in repr(known)


async def test_a_second_enrolment_needs_force_and_replaces_everything(cloud: CloudWorld) -> None:
    settings = cloud.device()
    await enrolled(cloud, settings)
    before = CredentialFiles(settings.folder).load()
    with pytest.raises(EbbflowError) as caught:
        await enrolled(cloud, settings)
    assert caught.value.reason is Reason.ALREADY_ENROLLED
    name = await try_enrol(settings, Wish(cloud.enrolment, cloud.token()), force=True)
    after = CredentialFiles(settings.folder).load()
    assert after.agent == name != before.agent
    assert after.key_pem != before.key_pem


async def test_an_answer_that_was_lost_is_asked_for_again_with_the_same_key(
    cloud: CloudWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, wish = cloud.device(), Wish(cloud.enrolment, cloud.token(uses=1))

    def lose(*_: object, **__: object) -> None:
        raise EbbflowError(Reason.SERVER_UNAVAILABLE, "cut")

    with monkeypatch.context() as cut:
        cut.setattr(CredentialFiles, "enrolled", lose)
        with pytest.raises(EbbflowError):
            await try_enrol(settings, wish)
    name = await try_enrol(settings, wish)
    assert CredentialFiles(settings.folder).load().agent == name


async def test_a_crash_before_the_last_rename_is_finished_later(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    settings.folder.identity.rename(settings.folder.pending_identity)
    assert CredentialFiles(settings.folder).load().agent == name


@pytest.mark.parametrize(("end", "reason"), [(-6, Reason.AUTHORITY_MISMATCH), (-1000, Reason.TOKEN_INVALID)])
async def test_a_wrong_token_leaves_no_identity(cloud: CloudWorld, end: int, reason: Reason) -> None:
    settings = cloud.device()
    with pytest.raises(EbbflowError) as caught:
        await try_enrol(settings, Wish(cloud.enrolment, cloud.token()[:end] + "aaaaaa"))
    assert caught.value.reason is reason
    assert not CredentialFiles(settings.folder).exist


async def test_a_cloud_that_is_not_there_is_named(cloud: CloudWorld) -> None:
    with pytest.raises(EbbflowError) as caught:
        await try_enrol(cloud.device(), Wish("127.0.0.1:1", cloud.token()))
    assert caught.value.reason is Reason.SERVER_UNAVAILABLE
    assert "127.0.0.1:1" in str(caught.value)


async def test_two_processes_never_share_a_state_folder(cloud: CloudWorld) -> None:
    settings = cloud.device()
    with settings.folder.locked(), pytest.raises(EbbflowError) as caught:
        await enrolled(cloud, settings)
    assert caught.value.reason is Reason.AGENT_RUNNING


def test_a_damaged_identity_is_named(tmp_path: Path) -> None:
    folder = AgentSettings(state=tmp_path).folder
    with pytest.raises(EbbflowError) as caught:
        CredentialFiles(folder).load()
    assert caught.value.reason is Reason.NOT_ENROLLED
    folder.identity.mkdir()
    (folder.identity / "agent.toml").write_text("agent = 5")
    with pytest.raises(EbbflowError) as caught:
        CredentialFiles(folder).load()
    assert caught.value.reason is Reason.FILE_CORRUPT


TIMES = st.datetimes(timezones=st.just(dt.UTC))


@given(TIMES, TIMES, TIMES)
def test_a_certificate_is_renewed_from_its_time_on_and_recovered_once_it_has_expired(
    now: dt.datetime, one: dt.datetime, other: dt.datetime
) -> None:
    renew, expire = sorted((one, other))
    with contextlib.suppress(OverflowError):
        step = next_step(now, renew, expire)
        assert (step == "recover") == (now >= expire - dt.timedelta(seconds=5))
        assert step != "wait" or now < renew


async def test_a_certificate_is_renewed_beside_running_work_and_keeps_its_key(tmp_path: Path) -> None:
    world = CloudWorld(tmp_path, agent_certificate_days=20 / 86_400)
    settings = world.device()
    async with world.running():
        await enrolled(world, settings)
        before = CredentialFiles(settings.folder).load()
        async with alive(settings) as agent:
            await until(lambda: agent.connected)
            await until(lambda: agent.cloud.credentials.expire_time > before.expire_time)
            await until(lambda: agent.connected)
        after = CredentialFiles(settings.folder).load()
    assert after.certificate_pem != before.certificate_pem
    assert after.key_pem == before.key_pem
    keys = [public_key_of_certificate(known.certificate_pem).public_numbers() for known in (before, after)]
    assert keys[0] == keys[1]


async def test_an_expired_certificate_is_recovered(cloud: CloudWorld) -> None:
    settings = cloud.device()
    name = await enrolled(cloud, settings)
    files = CredentialFiles(settings.folder)
    known = files.load()
    with cloud.cloud.registry.transaction() as session:
        from ebbflow.cloud.identity import certificates
        from ebbflow.cloud.registry.clock import now
        from ebbflow.common.identity.keys import make_csr

        csr = make_csr(known.key())
        issued = cloud.cloud.authority.issue_agent(csr, name.removeprefix("agents/"), dt.timedelta(seconds=-1), now())
        certificates.record(session, issued, now())
    expired = enrolment_pb2.Credentials(
        certificate_pem=issued.certificate_pem, authority_pem=known.authority_pem, endpoint=known.endpoint
    )
    expired.expire_time.FromDatetime(issued.expire_time)
    expired.renew_time.FromDatetime(issued.expire_time)
    files.renewed(expired)
    async with alive(settings) as agent:
        await until(lambda: agent.connected)
    assert files.load().expire_time > now()


async def test_what_a_device_was_enrolled_with_survives_renewals(cloud: CloudWorld) -> None:
    """Its age and the operator's word decide from when on its users report."""
    before = dt.datetime.now(dt.UTC)
    settings, used = cloud.device("new"), cloud.device("used")
    await enrolled(cloud, settings)
    await try_enrol(used, Wish(cloud.enrolment, cloud.token()))
    assert not CredentialFiles(used.folder).load().new_device
    files = CredentialFiles(settings.folder)
    known = files.load()
    assert known.new_device
    assert before <= known.enrol_time < before + dt.timedelta(hours=1)
    answer = enrolment_pb2.Credentials(
        certificate_pem=known.certificate_pem, authority_pem=known.authority_pem, endpoint=known.endpoint
    )
    answer.expire_time.FromDatetime(known.expire_time + dt.timedelta(days=1))
    renewed = files.renewed(answer)
    assert (renewed.enrol_time, renewed.new_device) == (known.enrol_time, True)


def certified(issued: dt.datetime) -> enrolment_pb2.EnrolResponse:
    """An answer of a cloud that says that it is then."""
    key = generate_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud")])
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), 1, issued - BACKDATED, issued + dt.timedelta(days=1)
    )
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    credentials = enrolment_pb2.Credentials(certificate_pem=pem, authority_pem=pem, endpoint="localhost:1")
    return enrolment_pb2.EnrolResponse(agent="agents/a", credentials=credentials, trust_root=b"{}")


@pytest.mark.parametrize("days", [-400, 400])
def test_an_identity_is_as_young_as_the_later_of_two_clocks_says(tmp_path: Path, days: int) -> None:
    """A cloud must not make it older than it is, nor a device without a clock."""
    folder = AgentSettings(state=tmp_path).folder
    folder.pending_identity.mkdir()
    (folder.pending_identity / "key.pem").write_bytes(key_to_pem(generate_key()))
    before = dt.datetime.now(dt.UTC)
    issued = (before + dt.timedelta(days=days)).replace(microsecond=0)
    CredentialFiles(folder).enrolled(certified(issued), "localhost:2")
    known = CredentialFiles(folder).load().enrol_time
    assert known == issued if days > 0 else before <= known <= dt.datetime.now(dt.UTC)


async def test_an_identity_of_an_earlier_version_does_not_wait(cloud: CloudWorld) -> None:
    settings = cloud.device()
    await enrolled(cloud, settings)
    facts = settings.folder.identity / "agent.toml"
    lines = [line for line in facts.read_text().splitlines() if not line.startswith(("enrol_time", "new_device"))]
    facts.write_text("\n".join(lines))
    known = CredentialFiles(settings.folder).load()
    assert (known.enrol_time.year, known.new_device) == (1970, True)
