"""Turns a trained student into the files of a release: three precisions, tokenizer and manifest."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import sqlalchemy as sa
from sqlalchemy.orm import Session

from ebbflow.cloud.blobs.base import Blob, BlobStore
from ebbflow.cloud.registry.tables import Distillation, Json, Release, ReleaseState
from ebbflow.cloud.release.measure import probe_loss
from ebbflow.common.codes.artefact import PRECISIONS, Variant, read_variant, write_variant
from ebbflow.common.codes.twin import load_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of

_log = logging.getLogger(__name__)

PROBE_TOLERANCE = 0.02
"""Difference from the signed loss that engines may show, in nats per token; wrong weights differ by far more."""


@dataclass(frozen=True)
class PackedWeights:
    """Everything of a release that does not depend on its number."""

    config: StudentConfig
    variants: Mapping[str, Blob]
    losses: Mapping[str, float]
    """Probe loss of each precision in nats per token."""
    tokenizer: Blob
    probe: Probe
    kept_bf16: tuple[str, ...] = ()
    """Matrices that no precision codes."""


def neighbour(session: Session, job: Distillation) -> str | None:
    """Returns the SHA-256 of the INT8 file whose scales the release of a job should keep.

    That is the release that the job begins from, else the student's newest published one: what devices have, so that
    the delta to the new release is small.
    """
    query = sa.select(Release).where(Release.student_id == job.student_id)
    if job.base_release is not None:
        query = query.where(Release.number == job.base_release)
    else:
        query = query.where(Release.state == ReleaseState.PUBLISHED).order_by(Release.number.desc()).limit(1)
    release = session.scalars(query).one_or_none()
    files = release.targets.values() if release is not None else ()
    return next((str(file["sha256"]) for file in files if file["kind"] == "int8"), None)


def pack_weights(
    student: Student,
    tokenizer: bytes,
    blobs: BlobStore,
    probe_token_ids: Sequence[Sequence[int]],
    scratch: Path,
    neighbour_sha256: str | None = None,
    kept_bf16: Sequence[str] = (),
) -> PackedWeights:
    """Writes every precision and measures it as a device will load it.

    Args:
        student: float32 weights.
        tokenizer: content of its tokenizer.json.
        blobs: where the files go.
        probe_token_ids: what devices measure before they commit; two tokens each at least.
        scratch: folder on a disk with room for the two largest files.
        neighbour_sha256: INT8 file of an earlier release. Its scales are kept if its tensors have the same shapes; a
            file that is gone or damaged only makes deltas longer.
        kept_bf16: matrices that no precision codes, as `choose_kept` returns them.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a weight is not finite or too large to code; INVALID_REQUEST if `kept_bf16`
            names what cannot be kept; DISK_FULL.
    """
    tensors = {name: tensor.detach().float().numpy() for name, tensor in student.state_dict().items()}
    probe = Probe(tuple(map(tuple, probe_token_ids)), PROBE_TOLERANCE)
    variants: dict[str, Blob] = {}
    losses: dict[str, float] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        kept = _kept(blobs, neighbour_sha256, student.config, Path(folder) / "neighbour.safetensors")
        for precision in PRECISIONS:
            path = Path(folder) / f"{precision}.safetensors"
            write_variant(path, tensors, student.config, precision, kept, kept_bf16)
            losses[precision] = probe_loss(load_student(path), probe)
            variants[precision] = blobs.put_file(path)
            path.unlink()
    return PackedWeights(student.config, variants, losses, blobs.put([tokenizer]), probe, tuple(kept_bf16))


def _kept(blobs: BlobStore, sha256: str | None, config: StudentConfig, path: Path) -> Variant | None:
    """Fetches the variant whose scales can be kept, if there is one."""
    if sha256 is None:
        return None
    try:
        blobs.fetch(sha256, path)
        variant = read_variant(path)
    except EbbflowError as error:
        if error.reason not in {Reason.BLOB_NOT_FOUND, Reason.FILE_CORRUPT}:
            raise
        _log.warning("no scales are kept, and deltas to this release will be long: %s", error)
        return None
    same = variant.precision == "int8" and variant.config.tensor_shapes() == config.tensor_shapes()
    return variant if same else None


def number_files(packed: PackedWeights, blobs: BlobStore, student_id: str, number: int) -> dict[str, Json]:
    """Writes the manifest of a numbered release.

    Returns:
        Column `targets` of the release.

    Raises:
        EbbflowError: FILE_CORRUPT if the manifest would break its own rules; DISK_FULL.
    """
    manifest = Manifest(
        student=student_id,
        release=number,
        config=packed.config.to_hf(),
        variants={
            precision: ManifestVariant(
                path_of(student_id, number, precision), blob.size_bytes, packed.losses[precision]
            )
            for precision, blob in packed.variants.items()
        },
        probe=packed.probe,
        kept_bf16=packed.kept_bf16,
    )
    files: dict[str, Blob] = {
        "manifest": blobs.put([manifest.to_json()]),
        "tokenizer": packed.tokenizer,
        **packed.variants,
    }
    return {
        path_of(student_id, number, kind): {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "kind": kind}
        for kind, blob in files.items()
    }
