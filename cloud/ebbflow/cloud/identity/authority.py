"""The embedded certificate authority: ECDSA on P-256, short-lived certificates, one level deep."""

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.identity.keys import (
    BACKDATED,
    generate_key,
    key_to_pem,
    load_key,
    public_key_of_csr,
    public_key_sha256,
)
from ebbflow.common.identity.peers import Identity, Peer

AUTHORITY_LIFETIME = dt.timedelta(days=3650)
AGENT_LIFETIME = dt.timedelta(days=7)
ADMIN_LIFETIME = dt.timedelta(days=90)
SERVER_LIFETIME = dt.timedelta(days=30)

_KEY_FILE, _CERTIFICATE_FILE = "authority.key.pem", "authority.pem"


@dataclass(frozen=True)
class Issued:
    """A certificate that was just signed."""

    certificate_pem: bytes
    """The certificate alone, PEM."""
    serial: str
    """Its serial number, hexadecimal."""
    expire_time: dt.datetime
    """When it stops being valid."""
    renew_time: dt.datetime
    """When its holder should ask for the next one: after two thirds of the lifetime."""
    public_key_sha256: str
    """Hexadecimal SHA-256 of the SubjectPublicKeyInfo."""
    identity: Identity
    """Whom it names."""


class Authority:
    """Signs certificates for agents, admins and listeners."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls, folder: Path, now: dt.datetime | None = None) -> "Authority":
        """Makes a key and its self-signed certificate in a folder, which may exist.

        Raises:
            EbbflowError: ALREADY_EXISTS if the folder holds an authority: losing its key would strand the fleet.
        """
        if (folder / _KEY_FILE).exists():
            raise EbbflowError(Reason.ALREADY_EXISTS, f"{folder} already holds a certificate authority", path=folder)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = generate_key()
        certificate = _self_sign(key, now or dt.datetime.now(dt.UTC))
        write_atomic(folder / _CERTIFICATE_FILE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        write_atomic(folder / _KEY_FILE, key_to_pem(key))
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Reads what `create` made.

        Raises:
            EbbflowError: NOT_INITIALISED if there is none, FILE_CORRUPT if it cannot be read or the two do not match.
        """
        try:
            key = load_key((folder / _KEY_FILE).read_bytes())
            certificate = x509.load_pem_x509_certificate((folder / _CERTIFICATE_FILE).read_bytes())
        except FileNotFoundError as error:
            raise EbbflowError(Reason.NOT_INITIALISED, f"no certificate authority in {folder}", path=folder) from error
        except ValueError as error:
            message = f"the certificate authority in {folder} cannot be read"
            raise EbbflowError(Reason.FILE_CORRUPT, message, path=folder) from error
        if certificate.public_key() != key.public_key():
            message = f"key and certificate in {folder} do not belong together"
            raise EbbflowError(Reason.FILE_CORRUPT, message, path=folder)
        return cls(key, certificate)

    @property
    def certificate_pem(self) -> bytes:
        """The authority's certificate, PEM."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the authority's certificate in DER; enrolment tokens pin it."""
        return hashlib.sha256(self._certificate.public_bytes(serialization.Encoding.DER)).hexdigest()

    def issue_agent(
        self, csr_der: bytes, agent_id: str, lifetime: dt.timedelta = AGENT_LIFETIME, now: dt.datetime | None = None
    ) -> Issued:
        """Signs an agent's certificate; of the request only the key counts.

        Raises:
            EbbflowError: INVALID_REQUEST if the request is malformed or does not prove its key.
        """
        return self._issue_client(public_key_of_csr(csr_der), Identity.agent(agent_id), lifetime, now)

    def issue_admin(
        self,
        csr_der: bytes,
        admin_id: str,
        role: str,
        lifetime: dt.timedelta = ADMIN_LIFETIME,
        now: dt.datetime | None = None,
    ) -> Issued:
        """Signs an admin's certificate, with the role ("viewer", "operator" or "owner") in it.

        Raises:
            EbbflowError: INVALID_REQUEST if the request is malformed or does not prove its key.
        """
        return self._issue_client(public_key_of_csr(csr_der), Identity.admin(admin_id, role), lifetime, now)

    def issue_server(
        self, hosts: Iterable[str], lifetime: dt.timedelta = SERVER_LIFETIME, now: dt.datetime | None = None
    ) -> tuple[bytes, bytes]:
        """Makes a listener's key and certificate.

        Args:
            hosts: DNS names and IP addresses under which clients reach it.
            lifetime: how long it is valid.
            now: the current time; the machine's by default.

        Returns:
            The key, and the chain of certificate and authority, both PEM. Devices that enrol check the pin of their
            token against the chain's end.
        """
        key = generate_key()
        names = [x509.UniformResourceIdentifier(Identity.server().uri), *map(_general_name, hosts)]
        usage = ExtendedKeyUsageOID.SERVER_AUTH
        certificate = self._sign(key.public_key(), Identity.server().name, names, usage, lifetime, now)
        return key_to_pem(key), certificate.public_bytes(serialization.Encoding.PEM) + self.certificate_pem

    def verify(self, certificate_pem: bytes, now: dt.datetime | None = None, allow_expired: bool = False) -> Peer:
        """Checks a certificate that TLS has not checked, such as that of an agent that recovers.

        Raises:
            EbbflowError: CERTIFICATE_INVALID if this authority did not sign it, CERTIFICATE_EXPIRED if its time is over
                and `allow_expired` is not set.
        """
        peer = Peer.from_certificate(certificate_pem)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        try:
            certificate.verify_directly_issued_by(self._certificate)
        except (InvalidSignature, ValueError, TypeError) as error:
            raise EbbflowError(Reason.CERTIFICATE_INVALID, "another authority signed the certificate") from error
        if not allow_expired and peer.expire_time <= (now or dt.datetime.now(dt.UTC)):
            raise EbbflowError(Reason.CERTIFICATE_EXPIRED, f"the certificate of {peer.identity.name} has expired")
        return peer

    def _issue_client(
        self, key: ec.EllipticCurvePublicKey, identity: Identity, lifetime: dt.timedelta, now: dt.datetime | None
    ) -> Issued:
        now = (now or dt.datetime.now(dt.UTC)).replace(microsecond=0)
        names = [x509.UniformResourceIdentifier(identity.uri)]
        certificate = self._sign(key, identity.name, names, ExtendedKeyUsageOID.CLIENT_AUTH, lifetime, now)
        return Issued(
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM),
            serial=format(certificate.serial_number, "x"),
            expire_time=certificate.not_valid_after_utc,
            renew_time=now + lifetime * 2 / 3,
            public_key_sha256=public_key_sha256(key),
            identity=identity,
        )

    def _sign(
        self,
        key: ec.EllipticCurvePublicKey,
        common_name: str,
        names: Iterable[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        lifetime: dt.timedelta,
        now: dt.datetime | None,
    ) -> x509.Certificate:
        now = now or dt.datetime.now(dt.UTC)
        # A certificate of a day that is valid until next year would outlive its authority unnoticed.
        end = min(now + lifetime, self._certificate.not_valid_after_utc)
        builder = _builder(common_name, self._certificate.subject, key, now - BACKDATED, end)
        own_key = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        authority_key = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_key)
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(authority_key, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _self_sign(key: ec.EllipticCurvePrivateKey, now: dt.datetime) -> x509.Certificate:
    # A name of its own for each authority, so that two clouds' chains are told apart by name too.
    common_name = f"Ebbflow authority {public_key_sha256(key.public_key())[:16]}"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    return (
        _builder(common_name, subject, key.public_key(), now - BACKDATED, now + AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _builder(
    common_name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: dt.datetime, end: dt.datetime
) -> x509.CertificateBuilder:
    # X.520 bounds a common name at 64 characters; the name that counts is the URI.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)
