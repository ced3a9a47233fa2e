"""The evaluation gate: measures a proposed release by itself and says whether it may be published.

The gate trusts nothing that the distiller says: it loads the very files that the proposal names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf import json_format

from ebbflow.api.v1 import release_pb2
from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.registry.tables import Json
from ebbflow.cloud.release.lineage import Costs
from ebbflow.cloud.release.measure import bits_per_byte, probe_loss
from ebbflow.cloud.release.rules import ReleaseFile
from ebbflow.common.codes.artefact import PRECISIONS, read_variant
from ebbflow.common.codes.twin import build_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.common.trust.manifest import Manifest

MOST_PROBE_TOLERANCE = 0.05
"""Nats per token; a manifest that allows more protects no device."""
MOST_TEXTS_PER_TOPIC = 32


@dataclass(frozen=True)
class Limits:
    """How much worse a release may be.

    Attributes:
        regression: than its base in bits per byte, as a share.
        precision_loss: in int8 or int4 than in bf16, as a share.
    """

    regression: float
    precision_loss: float


@dataclass(frozen=True)
class Measurement:
    """What the gate found, by precision in the order of variants."""

    bits_per_byte: Mapping[str, float]
    topic_bits_per_byte: Mapping[str, float]
    """Of the first precision."""
    probe_loss: Mapping[str, float]
    """Nats per token."""
    signed_probe_loss: Mapping[str, float]
    """What the manifest says of it."""
    tolerance: float
    """Of the manifest's probe."""

    def card(self, costs: Costs) -> Json:
        """Returns the proto JSON of an `EvaluationCard`; numbers that are not finite are left out as 0."""
        card = release_pb2.EvaluationCard(
            bits_per_byte=map(_finite, self.bits_per_byte.values()),
            topic_bits_per_byte={topic: _finite(bits) for topic, bits in self.topic_bits_per_byte.items()},
            probe_loss=map(_finite, self.probe_loss.values()),
            feedback_epsilon=costs.feedback_epsilon,
            training_epsilon=costs.training_epsilon,
            training_delta=costs.training_delta,
        )
        return json_format.MessageToDict(card)


def measure(
    files: Mapping[str, ReleaseFile],
    student_id: str,
    number: int,
    blobs: BlobStore,
    texts: Sequence[Text],
    scratch: Path,
) -> Measurement:
    """Loads every precision of a release and measures it.

    Args:
        files: what the proposal adds, by kind.
        student_id: of the release.
        number: of the release.
        blobs: where the files are.
        texts: what to measure on.
        scratch: folder on a disk with room for the largest file.

    Raises:
        EbbflowError: FILE_CORRUPT, BLOB_NOT_FOUND or CHECKPOINT_UNREADABLE if the files are not a release.
    """
    manifest = Manifest.from_json(blobs.read(files["manifest"].sha256))
    _check_manifest(manifest, files, student_id, number)
    tokenizer = Tokenizer.from_bytes(blobs.read(files["tokenizer"].sha256))
    _check_tokens(manifest, tokenizer)
    bits: dict[str, float] = {}
    probes: dict[str, float] = {}
    by_topic: Mapping[str, float] = {}
    for precision in (precision for precision in PRECISIONS if precision in files):
        student = _load(files[precision], manifest, precision, blobs, scratch)
        probes[precision] = probe_loss(student, manifest.probe)
        bits[precision], topics = bits_per_byte(student, tokenizer, texts)
        by_topic = by_topic or topics
    signed = {precision: variant.probe_loss for precision, variant in manifest.variants.items()}
    return Measurement(bits, by_topic, probes, signed, manifest.probe.tolerance)


def objection(found: Measurement, base_bits_per_byte: float | None, limits: Limits) -> str:
    """Returns why a release may not be published, in one sentence; empty if it may. A decision without IO."""
    for precision, bits in found.bits_per_byte.items():
        if not (math.isfinite(bits) and math.isfinite(found.probe_loss[precision])):
            return f"{precision} gives losses that are not finite"
        apart = abs(found.probe_loss[precision] - found.signed_probe_loss[precision])
        if apart > found.tolerance:
            return f"{precision} differs from its manifest's probe loss by {apart:.4f} nats per token"
    if found.tolerance > MOST_PROBE_TOLERANCE:
        return f"the manifest's probe tolerates {found.tolerance:.3f} nats per token, more than {MOST_PROBE_TOLERANCE}"
    first, *others = found.bits_per_byte.items()
    for precision, bits in others:
        if bits > first[1] * (1 + limits.precision_loss):
            return f"{precision} needs {bits:.4f} bits per byte where {first[0]} needs {first[1]:.4f}"
    if base_bits_per_byte is not None and first[1] > base_bits_per_byte * (1 + limits.regression):
        return f"it needs {first[1]:.4f} bits per byte where its base release needs {base_bits_per_byte:.4f}"
    return ""


def gate_texts(texts: Sequence[Text]) -> list[Text]:
    """Returns the texts to measure on: the first of each topic, so that the time does not grow with the corpus."""
    seen: dict[str, int] = {}
    chosen = []
    for text in texts:
        seen[text.topic] = seen.get(text.topic, 0) + 1
        if seen[text.topic] <= MOST_TEXTS_PER_TOPIC:
            chosen.append(text)
    return chosen


def _check_manifest(manifest: Manifest, files: Mapping[str, ReleaseFile], student_id: str, number: int) -> None:
    if (manifest.student, manifest.release) != (student_id, number):
        raise _corrupt("the manifest is another release's")
    weights = {kind: (file.path, file.size_bytes) for kind, file in files.items() if kind in PRECISIONS}
    if weights != {kind: (variant.target, variant.size_bytes) for kind, variant in manifest.variants.items()}:
        raise _corrupt("the manifest lists other files than the proposal")


def _check_tokens(manifest: Manifest, tokenizer: Tokenizer) -> None:
    config = StudentConfig.from_hf(dict(manifest.config))
    if tokenizer.size > config.vocab_size or tokenizer.eos_id != config.eos_token_id:
        raise _corrupt("the tokenizer is not the student's")
    probe = manifest.probe.token_ids
    if max(map(max, probe)) >= config.vocab_size or max(map(len, probe)) > config.max_position_embeddings:
        raise _corrupt("the probe does not fit the student")


def _load(file: ReleaseFile, manifest: Manifest, precision: str, blobs: BlobStore, scratch: Path) -> Student:
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "weights.safetensors"
        blobs.fetch(file.sha256, path)
        if path.stat().st_size != file.size_bytes:
            raise _corrupt(f"{precision} is not as long as the proposal says")
        variant = read_variant(path)
        if variant.precision != precision or variant.config.to_hf() != dict(manifest.config):
            raise _corrupt(f"{precision} is of another precision or shape than the manifest says")
        if variant.kept_bf16 != manifest.kept_bf16:
            raise _corrupt(f"{precision} keeps other matrices in bf16 than the manifest says")
        return build_student(variant)


def _corrupt(message: str) -> EbbflowError:
    return EbbflowError(Reason.FILE_CORRUPT, message)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
