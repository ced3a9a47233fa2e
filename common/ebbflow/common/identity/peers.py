"""Identities as certificates carry them: one SPIFFE-style URI in the subject alternative name."""

import datetime as dt
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.identity.keys import public_key_of_certificate

Kind = Literal["agent", "admin", "server"]

ADMIN_ROLES = ("viewer", "operator", "owner")
"""Roles of admins, weakest first; each may do what those before it may."""

_AGENT = re.compile(r"spiffe://ebbflow/agents/([a-z0-9-]{1,63})")
_ADMIN = re.compile(r"spiffe://ebbflow/admins/(viewer|operator|owner)/([a-z0-9-]{1,63})")
_SERVER = re.compile(r"spiffe://ebbflow/servers/([a-z0-9-]{1,63})")


@dataclass(frozen=True)
class Identity:
    """Who holds a certificate."""

    kind: Kind
    """What it is."""
    id: str
    """Last part of its resource name."""
    role: str
    """"agent", "server", or an admin's role."""

    @classmethod
    def agent(cls, agent_id: str) -> "Identity":
        """An agent's identity."""
        return cls("agent", agent_id, "agent")

    @classmethod
    def admin(cls, admin_id: str, role: str) -> "Identity":
        """An admin's identity."""
        return cls("admin", admin_id, role)

    @classmethod
    def server(cls, server_id: str = "cloud") -> "Identity":
        """A server's identity."""
        return cls("server", server_id, "server")

    @property
    def uri(self) -> str:
        """The URI in the certificate, such as "spiffe://ebbflow/admins/owner/ada"."""
        middle = f"{self.role}/" if self.kind == "admin" else ""
        return f"spiffe://ebbflow/{self.kind}s/{middle}{self.id}"

    @property
    def name(self) -> str:
        """The resource name, such as "agents/kiosk-7"."""
        return f"{self.kind}s/{self.id}"

    def allows(self, role: str) -> bool:
        """Whether this is an admin whose role is `role` or a stronger one."""
        return self.kind == "admin" and ADMIN_ROLES.index(self.role) >= ADMIN_ROLES.index(role)

    @classmethod
    def from_uri(cls, uri: str) -> "Identity":
        """Reads `uri` back.

        Raises:
            EbbflowError: CERTIFICATE_INVALID if it is none of ours.
        """
        if match := _AGENT.fullmatch(uri):
            return cls.agent(match[1])
        if match := _ADMIN.fullmatch(uri):
            return cls.admin(match[2], match[1])
        if match := _SERVER.fullmatch(uri):
            return cls.server(match[1])
        raise EbbflowError(Reason.CERTIFICATE_INVALID, "the certificate names no identity of Ebbflow")

    @classmethod
    def from_certificate(cls, certificate_pem: bytes) -> "Identity":
        """Reads the identity in a certificate (PEM, the first of a chain) without checking who signed it.

        Raises:
            EbbflowError: CERTIFICATE_INVALID if there is not exactly one URI of ours in it.
        """
        return Peer.from_certificate(certificate_pem).identity


@dataclass(frozen=True)
class Peer:
    """The other side of a mutually authenticated connection."""

    identity: Identity
    """Who it is."""
    serial: str
    """Serial number of its certificate, hexadecimal; revocation goes by it."""
    public_key: ec.EllipticCurvePublicKey
    """Key that the certificate speaks for."""
    expire_time: dt.datetime
    """When the certificate stops being valid."""

    @classmethod
    @functools.lru_cache(maxsize=16_384)
    def from_certificate(cls, certificate_pem: bytes) -> "Peer":
        """Reads a certificate without checking who signed it: for one that TLS has checked.

        Raises:
            EbbflowError: CERTIFICATE_INVALID if it is not one of ours by its form.
        """
        public_key = public_key_of_certificate(certificate_pem)
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        except (x509.ExtensionNotFound, ValueError) as error:
            raise EbbflowError(Reason.CERTIFICATE_INVALID, "the certificate names no identity") from error
        serial = format(certificate.serial_number, "x")
        return cls(Identity.from_uri(uri), serial, public_key, certificate.not_valid_after_utc)

    @classmethod
    def from_auth_context(cls, auth_context: Mapping[str, Iterable[bytes]]) -> "Peer":
        """Reads the peer of a call from gRPC's `context.auth_context()`.

        Raises:
            EbbflowError: CERTIFICATE_REQUIRED if the peer presented none, CERTIFICATE_INVALID if it is not ours.
        """
        for certificate_pem in auth_context.get("x509_pem_cert", ()):
            return cls.from_certificate(bytes(certificate_pem))
        raise EbbflowError(Reason.CERTIFICATE_REQUIRED, "this call needs a client certificate")
