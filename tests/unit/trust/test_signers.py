"""Keys wherever they are: files, an encrypted file, a key service, and what is said when one cannot be used."""

import hashlib
import stat
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer
from securesystemslib.exceptions import UnverifiedSignatureError

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import signers


def refused(uri: str, secret: str = "") -> EbbflowError:
    with pytest.raises(EbbflowError) as caught:
        signers.open_signer(uri, lambda _what: secret)
    assert caught.value.reason is Reason.KEY_UNUSABLE
    assert caught.value.cure
    return caught.value


@pytest.mark.parametrize("form", ["{}", "file2:{}"])
@pytest.mark.parametrize("passphrase", ["", "correct horse"])
def test_a_key_file_signs_by_path_and_by_uri(tmp_path: Path, form: str, passphrase: str) -> None:
    path = tmp_path / "a.pem"
    made = signers.create_file(path, passphrase)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (b"ENCRYPTED" in path.read_bytes()) is bool(passphrase)
    signer = signers.open_signer(form.format(path), lambda _what: passphrase)
    assert signer.public_key == made.public_key
    made.public_key.verify_signature(signer.sign(b"data"), b"data")


def test_nothing_is_asked_for_where_nothing_is_secret(tmp_path: Path) -> None:
    signers.create_file(tmp_path / "a.pem")

    def never(_what: str) -> str:
        raise AssertionError("asked")

    signers.open_signer(str(tmp_path / "a.pem"), never)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    signers.create_file(tmp_path / "a.pem")
    before = (tmp_path / "a.pem").read_bytes()
    with pytest.raises(EbbflowError) as caught:
        signers.create_file(tmp_path / "a.pem")
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert (tmp_path / "a.pem").read_bytes() == before
    with pytest.raises(EbbflowError, match="folder"):
        signers.create_file(tmp_path / "nowhere" / "a.pem")


def test_an_encrypted_file_without_or_with_the_wrong_passphrase_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.pem"
    signers.create_file(path, "right")
    assert "EBBFLOW_KEY_SECRET" in str(refused(str(path)))
    error = refused(str(path), "not so")
    assert "passphrase is wrong" in str(error)
    assert "not so" not in str(error)


def test_what_is_no_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("nonsense")
    assert "a.pem" in str(refused(str(tmp_path / "a.pem")))
    assert "b.pem" in str(refused(f"file2:{tmp_path / 'b.pem'}"))
    assert "awskms" in str(refused("vault:something"))


@pytest.mark.parametrize(
    ("uri", "extra"),
    [("gcpkms:projects/p/k", "gcpkms"), ("azurekms://v.vault.azure.net/keys/gate", "azurekms")],
)
def test_a_scheme_whose_library_is_not_installed_names_the_extra(
    uri: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from securesystemslib.signer import _azure_signer, _gcp_signer

    monkeypatch.setattr(_gcp_signer, "GCP_IMPORT_ERROR", "not installed")
    monkeypatch.setattr(_azure_signer, "AZURE_IMPORT_ERROR", "not installed")
    error = refused(uri)
    assert f"ebbflow[{extra}]" in str(error)
    assert error.metadata["extra"] == extra


def test_public_parts_travel_as_files(tmp_path: Path) -> None:
    made = signers.create_file(tmp_path / "a.pem")
    (tmp_path / "a.pub.json").write_text(signers.public_text(made.public_key))
    assert signers.read_public(tmp_path / "a.pub.json") == made.public_key
    assert signers.read_public(tmp_path / "a.pem") is None
    for name in ("a.pub.json", "a.pem"):
        assert signers.public_key(str(tmp_path / name)) == made.public_key
    with pytest.raises(EbbflowError) as caught:
        signers.read_public(tmp_path / "missing.json")
    assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadedMotoServer]:
    """A key service that speaks Amazon's protocol."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    yield server
    server.stop()


@pytest.mark.usefixtures("kms")
def test_a_key_in_amazons_service_signs_without_leaving_it() -> None:
    client = boto3.client("kms")
    key_id = client.create_key(KeyUsage="SIGN_VERIFY", KeySpec="ECC_NIST_P256")["KeyMetadata"]["KeyId"]
    client.create_alias(AliasName="alias/gate", TargetKeyId=key_id)
    by_id, by_alias = (signers.open_signer(f"awskms:{name}") for name in (key_id, "alias/gate"))
    assert by_id.public_key == by_alias.public_key == signers.public_key("awskms:alias/gate")
    assert by_id.public_key.scheme == "ecdsa-sha2-nistp256"
    signature = by_alias.sign(b"data")
    # The signer sends the digest and says so. moto does not know MessageType DIGEST and hashes what it gets once more.
    by_id.public_key.verify_signature(signature, hashlib.sha256(b"data").digest())
    with pytest.raises(UnverifiedSignatureError):
        by_id.public_key.verify_signature(signature, hashlib.sha256(b"other").digest())


def test_a_key_service_that_lacks_the_key_or_is_gone_is_named(kms: ThreadedMotoServer) -> None:
    assert "alias/nothing" in str(refused("awskms:alias/nothing"))
    key_id = boto3.client("kms").create_key(KeyUsage="SIGN_VERIFY", KeySpec="ECC_NIST_P256")["KeyMetadata"]["KeyId"]
    opened = signers.open_signer(f"awskms:{key_id}")
    kms.stop()
    with pytest.raises(EbbflowError) as caught:
        opened.sign(b"data")
    assert caught.value.reason is Reason.KEY_UNUSABLE
    assert "EndpointConnectionError" in str(refused(f"awskms:{key_id}"))
