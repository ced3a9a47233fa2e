import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509 import verification
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.cloud.identity.authority import Authority
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity import keys
from ebbflow.common.identity.peers import Identity, Peer

NOW = dt.datetime(2026, 11, 1, 12, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


def test_an_authority_is_the_same_after_loading_and_its_key_is_private(tmp_path: Path) -> None:
    made = Authority.create(tmp_path / "authority")
    assert Authority.load(tmp_path / "authority").sha256 == made.sha256
    assert stat.S_IMODE((tmp_path / "authority/authority.key.pem").stat().st_mode) == 0o600


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    Authority.create(tmp_path)
    with pytest.raises(EbbflowError) as caught:
        Authority.create(tmp_path)
    assert caught.value.reason is Reason.ALREADY_EXISTS


def test_a_missing_or_damaged_authority_is_said(tmp_path: Path) -> None:
    with pytest.raises(EbbflowError) as caught:
        Authority.load(tmp_path)
    assert caught.value.reason is Reason.NOT_INITIALISED
    Authority.create(tmp_path)
    (tmp_path / "authority.key.pem").write_bytes(keys.key_to_pem(keys.generate_key()))
    with pytest.raises(EbbflowError, match="belong together") as caught:
        Authority.load(tmp_path)
    assert caught.value.reason is Reason.FILE_CORRUPT
    (tmp_path / "authority.pem").write_text("nonsense")
    with pytest.raises(EbbflowError, match="cannot be read"):
        Authority.load(tmp_path)


def test_an_agents_certificate_names_it_and_asks_for_renewal_after_two_thirds(authority: Authority) -> None:
    key = keys.generate_key()
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    issued = authority.issue_agent(keys.make_csr(key), "kiosk-7", dt.timedelta(days=6), now)
    peer = Peer.from_certificate(issued.certificate_pem)
    assert peer.identity == Identity.agent("kiosk-7") == Identity.from_certificate(issued.certificate_pem)
    assert (peer.serial, peer.expire_time) == (issued.serial, now + dt.timedelta(days=6))
    assert issued.renew_time == now + dt.timedelta(days=4)
    assert issued.public_key_sha256 == keys.public_key_sha256(key.public_key())


def test_an_independent_verifier_accepts_client_and_server_certificates(authority: Authority) -> None:
    root = x509.load_pem_x509_certificate(authority.certificate_pem)
    builder = verification.PolicyBuilder().store(verification.Store([root]))
    issued = authority.issue_admin(keys.make_csr(keys.generate_key()), "ada", "owner")
    leaf = x509.load_pem_x509_certificate(issued.certificate_pem)
    names = builder.build_client_verifier().verify(leaf, []).subjects
    assert names is not None
    assert names[0].value == "spiffe://ebbflow/admins/owner/ada"
    _, chain_pem = authority.issue_server(["cloud.example", "127.0.0.1"])
    server, top = x509.load_pem_x509_certificates(chain_pem)
    assert top == root
    assert builder.build_server_verifier(x509.DNSName("cloud.example")).verify(server, [])
    with pytest.raises(verification.VerificationError):
        builder.build_server_verifier(x509.DNSName("other.example")).verify(server, [])
    with pytest.raises(verification.VerificationError):
        builder.build_client_verifier().verify(server, [])


def test_only_its_own_certificates_verify(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path)
    csr = keys.make_csr(keys.generate_key())
    authority.verify(authority.issue_agent(csr, "kiosk-7").certificate_pem)
    with pytest.raises(EbbflowError) as caught:
        authority.verify(other.issue_agent(csr, "kiosk-7").certificate_pem)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID
    with pytest.raises(EbbflowError):
        authority.verify(b"nonsense")


def test_an_expired_certificate_verifies_only_where_that_is_allowed(authority: Authority) -> None:
    past = dt.datetime.now(dt.UTC) - dt.timedelta(days=2)
    issued = authority.issue_agent(keys.make_csr(keys.generate_key()), "kiosk-7", dt.timedelta(days=1), past)
    with pytest.raises(EbbflowError) as caught:
        authority.verify(issued.certificate_pem)
    assert caught.value.reason is Reason.CERTIFICATE_EXPIRED
    assert authority.verify(issued.certificate_pem, allow_expired=True).identity.id == "kiosk-7"


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path, now=NOW)
    issued = authority.issue_agent(keys.make_csr(keys.generate_key()), "a", dt.timedelta(days=9000), NOW)
    assert issued.expire_time <= x509.load_pem_x509_certificate(authority.certificate_pem).not_valid_after_utc


_IDS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)


@given(
    st.one_of(
        _IDS.map(Identity.agent),
        st.builds(Identity.admin, _IDS, st.sampled_from(["viewer", "operator", "owner"])),
        _IDS.map(Identity.server),
    )
)
def test_an_identity_is_read_as_it_was_written(identity: Identity) -> None:
    assert Identity.from_uri(identity.uri) == identity


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://other/agents/a",
        "spiffe://ebbflow/agents/",
        "spiffe://ebbflow/agents/a/b",
        "spiffe://ebbflow/admins/king/ada",
        "spiffe://ebbflow/agents/a\n",
        "https://ebbflow/agents/a",
    ],
)
def test_any_other_uri_is_no_identity(uri: str) -> None:
    with pytest.raises(EbbflowError) as caught:
        Identity.from_uri(uri)
    assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_roles_include_weaker_ones_and_agents_have_none() -> None:
    owner, viewer = Identity.admin("ada", "owner"), Identity.admin("bob", "viewer")
    assert owner.allows("viewer")
    assert owner.allows("owner")
    assert not viewer.allows("operator")
    assert not Identity.agent("kiosk-7").allows("viewer")
    assert (owner.name, Identity.agent("kiosk-7").name) == ("admins/ada", "agents/kiosk-7")


def test_a_peer_without_certificate_is_asked_for_one() -> None:
    with pytest.raises(EbbflowError) as caught:
        Peer.from_auth_context({})
    assert caught.value.reason is Reason.CERTIFICATE_REQUIRED
