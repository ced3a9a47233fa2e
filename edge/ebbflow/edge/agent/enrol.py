"""How a device gets its identity: a token, a pinned authority, and a key that is made here."""

import hashlib
import json
import tomllib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from ebbflow.api.v1 import enrolment_pb2 as pb
from ebbflow.api.v1 import enrolment_pb2_grpc, resources_pb2
from ebbflow.client.channels import sync_channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.client.pinning import fetch_authority
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.identity.keys import generate_key, key_to_pem, load_key, make_csr
from ebbflow.common.identity.tokens import EnrolmentSecret
from ebbflow.edge.agent.credentials import KEY, REQUEST, CredentialFiles
from ebbflow.edge.agent.state import StateFolder

_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Wish:
    """What a device asks of the cloud."""

    cloud: str
    """host:port of the enrolment listener."""
    token: str = field(repr=False)
    """As `ebbflow token create` printed it."""
    agent_id: str = ""
    """The name it would like; empty lets the cloud choose."""
    labels: tuple[tuple[str, str], ...] = ()
    """Labels beside those of the token."""
    new_device: bool = False
    """The operator's word that nobody used the device under another identity, so that its users need not wait."""

    @property
    def sha256(self) -> str:
        """Tells one wish from another without holding the token."""
        said = [self.cloud, self.token, self.agent_id, self.labels, self.new_device]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def labels_of(pairs: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Splits texts such as "site=berlin".

    Raises:
        EbbflowError: INVALID_REQUEST if one has no equals sign or an empty key.
    """
    split = [pair.partition("=") for pair in pairs]
    for key, equals, _ in split:
        if not (key and equals):
            raise EbbflowError(Reason.INVALID_REQUEST, "a label has the form KEY=VALUE", field="label")
    return tuple(sorted((key, value) for key, _, value in split))


def enrol(folder: StateFolder, wish: Wish, profile: resources_pb2.DeviceProfile, *, force: bool = False) -> str:
    """Enrols the device and writes its identity.

    The key and the request's id are kept until the cloud has answered, so that repeating the command after a cut asks
    for the same identity and uses the token once.

    Args:
        folder: where the agent keeps its state.
        wish: what to ask.
        profile: what the device can run.
        force: replaces an identity that is there; what users did and the privacy accounts stay.

    Returns:
        The agent's name, such as "agents/kiosk-7".

    Raises:
        EbbflowError: ALREADY_ENROLLED, AGENT_RUNNING, TOKEN_INVALID, TOKEN_EXPIRED, TOKEN_USED_UP, AUTHORITY_MISMATCH,
            ALREADY_EXISTS (the name), SERVER_UNAVAILABLE, CONFIG_INVALID, DISK_FULL.
    """
    secret = EnrolmentSecret.decode(wish.token)
    with folder.locked():
        files = CredentialFiles(folder)
        if files.exist and not force:
            message = f"this device is {files.load().agent} already"
            raise EbbflowError(Reason.ALREADY_ENROLLED, message, path=folder.path)
        authority_pem = fetch_authority(wish.cloud, secret.authority_sha256)
        key_pem, request_id = _pending(folder, wish)
        request = pb.EnrolRequest(
            token=wish.token,
            csr_der=make_csr(load_key(key_pem)),
            agent_id=wish.agent_id,
            profile=profile,
            labels=dict(wish.labels),
            request_id=request_id,
            new_device=wish.new_device,
        )
        with sync_channel(Endpoint(wish.cloud, authority_pem)) as channel:
            answer = enrolment_pb2_grpc.EnrolmentServiceStub(channel).Enrol(request, timeout=_TIMEOUT_S)
        files.enrolled(answer, wish.cloud, new_device=wish.new_device)
        return answer.agent


def _pending(folder: StateFolder, wish: Wish) -> tuple[bytes, str]:
    """Returns the key and the request's id of this wish, made now or by an attempt that was cut off."""
    here = folder.pending_identity
    here.mkdir(mode=0o700, exist_ok=True)
    try:
        kept = tomllib.loads((here / REQUEST).read_text())
        if kept["sha256"] == wish.sha256:
            return (here / KEY).read_bytes(), str(kept["request_id"])
    except (OSError, KeyError, ValueError):
        pass  # none, or of a crash while it was written: begin anew
    key_pem, request_id = key_to_pem(generate_key()), str(uuid.uuid4())
    write_atomic(here / KEY, key_pem)
    write_atomic(here / REQUEST, f'sha256 = "{wish.sha256}"\nrequest_id = "{request_id}"\n'.encode())
    return key_pem, request_id
