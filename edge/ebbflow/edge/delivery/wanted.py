"""What the signed metadata says of a release that the cloud assigns."""

from collections.abc import Mapping
from dataclasses import dataclass

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust import roles
from ebbflow.common.trust.targets import path_of
from ebbflow.edge.delivery.files import SignedFile
from ebbflow.edge.delivery.trust import TrustClient

_PRECISIONS = {
    resources_pb2.PRECISION_BF16: "bf16",
    resources_pb2.PRECISION_INT8: "int8",
    resources_pb2.PRECISION_INT4: "int4",
}


@dataclass(frozen=True)
class Wanted:
    """A release to install, as far as the signed metadata stands behind it."""

    student_id: str
    number: int
    precision: str
    rollout: str
    files: Mapping[str, SignedFile]
    """By "manifest", "tokenizer" and "weights"."""


def verified(trust: TrustClient, desired: agent_pb2.DesiredRelease) -> Wanted:
    """Brings the metadata up to date, and says which files to install.

    Raises:
        EbbflowError: INVALID_REQUEST, RELEASE_TOO_OLD, ARTEFACT_UNTRUSTED, or as `TrustClient.refresh`.
    """
    student_id = names.parse(desired.student, "students")
    of, number = names.parse_release(desired.release)
    precision = _PRECISIONS.get(desired.precision)
    if of != student_id or precision is None:
        raise EbbflowError(Reason.INVALID_REQUEST, f"{desired.release[:80]} is no release to install")
    trust.refresh()
    lowest = trust.min_release(student_id)
    if number < lowest:
        message = f"release {number} of {student_id} is below {lowest}, the lowest that may be installed"
        raise EbbflowError(Reason.RELEASE_TOO_OLD, message, release=number, min_release=lowest)
    kinds = {"manifest": "manifest", "tokenizer": "tokenizer", "weights": precision}
    files = {what: signed_file(trust, student_id, number, kind) for what, kind in kinds.items()}
    return Wanted(student_id, number, precision, desired.rollout, files)


def signed_file(trust: TrustClient, student_id: str, number: int, kind: str) -> SignedFile:
    """Length and hash of one file of a release.

    Raises:
        EbbflowError: ARTEFACT_UNTRUSTED if the signed metadata does not list it as what it is.
    """
    path = path_of(student_id, number, kind)
    target = trust.target(path)
    if target.custom != roles.custom(student_id, number, kind) or set(target.hashes) != {"sha256"}:
        raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, f"{path} is signed as another file", target=path)
    return SignedFile(target.hashes["sha256"], target.length)
