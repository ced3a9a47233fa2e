"""The identity files of an agent. The key is made here and never leaves; every renewal certifies the same key again.

So replacing the certificate is one atomic file, and a batch that waits in the outbox keeps a signature that verifies.
"""

import datetime as dt
import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ebbflow.api.v1 import enrolment_pb2 as pb
from ebbflow.client.endpoint import Endpoint
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import sync_folder, write_atomic
from ebbflow.common.identity.keys import BACKDATED, load_key
from ebbflow.edge.agent.state import StateFolder

KEY, CERTIFICATE, AUTHORITY, ROOT, FACTS = "key.pem", "certificate.pem", "authority.pem", "root.json", "agent.toml"
REQUEST = "request.toml"
"""What an enrolment under way has asked for."""
_BEFORE_IT_WAS_KEPT = "1970-01-01T00:00:00+00:00"


@dataclass(frozen=True)
class Credentials:
    """Who this agent is and how it proves it."""

    agent: str
    """Resource name, such as "agents/kiosk-7"."""
    endpoint: str
    """host:port of the mutually authenticated listener."""
    enrol_endpoint: str
    """host:port of the listener for devices without a valid certificate."""
    expire_time: dt.datetime
    renew_time: dt.datetime
    certificate_pem: bytes = field(repr=False)
    authority_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    trust_root: bytes = field(repr=False)
    """The first trusted TUF root."""
    enrol_time: dt.datetime
    """When the device got this identity, by the cloud's clock or its own, whichever was later."""
    new_device: bool
    """The operator's word that nobody used the device under another identity."""

    @property
    def cloud(self) -> Endpoint:
        """For calls with the certificate."""
        return Endpoint(self.endpoint, self.authority_pem, self.certificate_pem, self.key_pem)

    @property
    def enrolment(self) -> Endpoint:
        """For calls without one."""
        return Endpoint(self.enrol_endpoint, self.authority_pem)

    def key(self) -> ec.EllipticCurvePrivateKey:
        """Returns the private key."""
        return load_key(self.key_pem)


class CredentialFiles:
    """Reads and writes the identity folder."""

    def __init__(self, folder: StateFolder) -> None:
        """Takes the state folder."""
        self._folder = folder

    @property
    def exist(self) -> bool:
        """Whether the device is enrolled."""
        self._finish_enrolment()
        return (self._folder.identity / FACTS).exists()

    def load(self) -> Credentials:
        """Reads the identity.

        Raises:
            EbbflowError: NOT_ENROLLED, or FILE_CORRUPT.
        """
        if not self.exist:
            raise EbbflowError(Reason.NOT_ENROLLED, f"there is no identity in {self._folder.path}")
        here = self._folder.identity
        try:
            facts = tomllib.loads((here / FACTS).read_text())
            files = {name: (here / name).read_bytes() for name in (KEY, CERTIFICATE, AUTHORITY, ROOT)}
            return Credentials(
                agent=facts["agent"],
                endpoint=facts["endpoint"],
                enrol_endpoint=facts["enrol_endpoint"],
                expire_time=dt.datetime.fromisoformat(facts["expire_time"]),
                renew_time=dt.datetime.fromisoformat(facts["renew_time"]),
                certificate_pem=files[CERTIFICATE],
                authority_pem=files[AUTHORITY],
                key_pem=files[KEY],
                trust_root=files[ROOT],
                enrol_time=dt.datetime.fromisoformat(facts.get("enrol_time", _BEFORE_IT_WAS_KEPT)),
                new_device=bool(facts.get("new_device", True)),
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise EbbflowError(Reason.FILE_CORRUPT, f"the identity in {here} is damaged", path=here) from error

    def enrolled(self, answer: pb.EnrolResponse, enrol_endpoint: str, *, new_device: bool = False) -> None:
        """Makes the pending key the identity that the cloud answered with; nothing of an identity before stays.

        Args:
            answer: the cloud's.
            enrol_endpoint: host:port that it came from.
            new_device: the operator's word that nobody used this device under another identity.
        """
        here = self._folder.pending_identity
        write_atomic(here / ROOT, answer.trust_root)
        enrol_time = max(_issued_at(answer.credentials.certificate_pem), dt.datetime.now(dt.UTC))
        facts: dict[str, str | bool] = {
            "agent": answer.agent,
            "enrol_endpoint": enrol_endpoint,
            "enrol_time": enrol_time.isoformat(),
            "new_device": new_device,
        }
        _write_credentials(here, answer.credentials, facts)
        self._finish_enrolment()

    def renewed(self, answer: pb.Credentials) -> Credentials:
        """Replaces the certificate; returns the identity as it is now."""
        known = self.load()
        facts: dict[str, str | bool] = {
            "agent": known.agent,
            "enrol_endpoint": known.enrol_endpoint,
            "enrol_time": known.enrol_time.isoformat(),
            "new_device": known.new_device,
        }
        _write_credentials(self._folder.identity, answer, facts)
        return self.load()

    def _finish_enrolment(self) -> None:
        """Moves a complete pending identity to its place, also after a crash in between."""
        pending, identity = self._folder.pending_identity, self._folder.identity
        if not (pending / FACTS).exists():
            return
        for stale in (identity, self._folder.trust):
            shutil.rmtree(stale, ignore_errors=True)
        (pending / REQUEST).unlink(missing_ok=True)
        pending.rename(identity)
        sync_folder(self._folder.path)


def _issued_at(certificate_pem: bytes) -> dt.datetime:
    """When a certificate was issued: the cloud's time, which a device without a clock of its own lacks."""
    try:
        return x509.load_pem_x509_certificate(certificate_pem).not_valid_before_utc + BACKDATED
    except (ValueError, OverflowError) as error:
        raise EbbflowError(Reason.CERTIFICATE_INVALID, "the cloud's answer holds no certificate") from error


def _write_credentials(here: Path, answer: pb.Credentials, facts: Mapping[str, str | bool]) -> None:
    """Writes what came from the cloud; the facts last, as their presence says that the rest is there."""
    write_atomic(here / CERTIFICATE, answer.certificate_pem)
    write_atomic(here / AUTHORITY, answer.authority_pem)
    times = {
        "expire_time": answer.expire_time.ToDatetime(dt.UTC).isoformat(),
        "renew_time": answer.renew_time.ToDatetime(dt.UTC).isoformat(),
    }
    lines = [
        f"{name} = {json.dumps(value)}\n" for name, value in {**facts, "endpoint": answer.endpoint, **times}.items()
    ]
    write_atomic(here / FACTS, "".join(lines).encode())
