import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import assume, given
from hypothesis import strategies as st

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity import keys


def test_a_key_survives_its_file() -> None:
    key = keys.generate_key()
    assert keys.load_key(keys.key_to_pem(key)).private_numbers() == key.private_numbers()


def test_a_signature_holds_for_its_data_and_key_only() -> None:
    key, other = keys.generate_key(), keys.generate_key()
    signature = keys.sign(key, b"data")
    keys.verify(key.public_key(), signature, b"data")
    for public_key, bytes_, signed in [
        (key.public_key(), signature, b"other data"),
        (other.public_key(), signature, b"data"),
        (key.public_key(), signature[:-1], b"data"),
        (key.public_key(), b"", b"data"),
    ]:
        with pytest.raises(EbbflowError) as caught:
            keys.verify(public_key, bytes_, signed)
        assert caught.value.reason is Reason.CERTIFICATE_INVALID


def test_a_signing_request_gives_its_key_back() -> None:
    key = keys.generate_key()
    public_key = keys.public_key_of_csr(keys.make_csr(key))
    assert keys.public_key_sha256(public_key) == keys.public_key_sha256(key.public_key())


def test_a_signing_request_over_somebody_elses_key_is_refused() -> None:
    key, victim = keys.generate_key(), keys.generate_key()
    form, point = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    forged = keys.make_csr(key).replace(
        key.public_key().public_bytes(form, point), victim.public_key().public_bytes(form, point)
    )
    with pytest.raises(EbbflowError, match="signed by its own") as caught:
        keys.public_key_of_csr(forged)
    assert caught.value.reason is Reason.INVALID_REQUEST


@given(st.binary(max_size=300))
def test_hostile_bytes_are_no_signing_request(data: bytes) -> None:
    with pytest.raises(EbbflowError) as caught:
        keys.public_key_of_csr(data)
    assert caught.value.reason is Reason.INVALID_REQUEST


@given(st.integers(min_value=0), st.binary(min_size=1, max_size=4))
def test_a_damaged_signing_request_is_refused_with_one_error(position: int, damage: bytes) -> None:
    whole = _CSR
    at = position % len(whole)
    damaged = whole[:at] + damage + whole[at + len(damage) :]
    assume(damaged != whole)
    with pytest.raises(EbbflowError) as caught:
        keys.public_key_of_csr(damaged)
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_a_key_of_another_kind_is_refused() -> None:
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for wrong in (pem, b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        with pytest.raises(EbbflowError) as caught:
            keys.load_key(wrong)
        assert caught.value.reason is Reason.FILE_CORRUPT


_CSR = keys.make_csr(keys.generate_key())
