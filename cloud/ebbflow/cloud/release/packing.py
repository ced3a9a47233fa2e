"""Turns a trained student into the files of a release: three precisions, tokenizer and manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ebbflow.cloud.blobs.base import Blob, BlobStore
from ebbflow.cloud.registry.tables import Json
from ebbflow.cloud.release.measure import probe_loss
from ebbflow.common.codes.artefact import PRECISIONS, write_variant
from ebbflow.common.codes.twin import load_student
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import path_of

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


def pack_weights(
    student: Student, tokenizer: bytes, blobs: BlobStore, probe_token_ids: Sequence[Sequence[int]], scratch: Path
) -> PackedWeights:
    """Writes every precision and measures it as a device will load it.

    Args:
        student: float32 weights.
        tokenizer: content of its tokenizer.json.
        blobs: where the files go.
        probe_token_ids: what devices measure before they commit; two tokens each at least.
        scratch: folder on a disk with room for the largest file.

    Raises:
        EbbflowError: WEIGHTS_INVALID if a weight is not finite or too large to code; DISK_FULL.
    """
    tensors = {name: tensor.detach().float().numpy() for name, tensor in student.state_dict().items()}
    probe = Probe(tuple(map(tuple, probe_token_ids)), PROBE_TOLERANCE)
    variants: dict[str, Blob] = {}
    losses: dict[str, float] = {}
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        for precision in PRECISIONS:
            path = Path(folder) / f"{precision}.safetensors"
            write_variant(path, tensors, student.config, precision)
            losses[precision] = probe_loss(load_student(path), probe)
            variants[precision] = blobs.put_file(path)
            path.unlink()
    return PackedWeights(student.config, variants, losses, blobs.put([tokenizer]), probe)


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
