from pathlib import Path

import pytest
import tiny_models
import torch

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.release.packing import number_files, pack_weights
from ebbflow.common.codes.artefact import PRECISIONS, read_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.trust.manifest import Manifest
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

CONFIG = StudentConfig(
    vocab_size=tiny_models.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
PROBE = [[1, 20, 30, 40], [1, 50, 60]]


def test_what_is_packed_is_what_a_device_measures(blobs: LocalBlobStore, tmp_path: Path) -> None:
    student = Student.random(CONFIG, 1, std=0.3)
    packed = pack_weights(student, tiny_models.tokenizer().to_bytes(), blobs, PROBE, tmp_path / "scratch")
    targets = number_files(packed, blobs, "faq", 7)
    assert set(targets) == {
        "student/faq/7.manifest.json",
        "student/faq/7.tokenizer.json",
        "student/faq/7.bf16.safetensors",
        "student/faq/7.int8.safetensors",
        "student/faq/7.int4.safetensors",
    }
    assert all(blobs.size(file["sha256"]) == file["size_bytes"] for file in targets.values())
    manifest = Manifest.from_json(blobs.read(targets["student/faq/7.manifest.json"]["sha256"]))
    assert dict(manifest.config) == CONFIG.to_hf()
    for precision, variant in manifest.variants.items():
        path = tmp_path / precision
        blobs.fetch(targets[variant.target]["sha256"], path)
        assert read_variant(path).precision == precision
        engine = load_engine(path, threads=1)
        measured = manifest.probe.mean([sequence_loss(engine, ids) for ids in manifest.probe.token_ids])
        assert measured == pytest.approx(variant.probe_loss, abs=1e-4)
    bf16, int8, int4 = (manifest.variants[precision].size_bytes for precision in PRECISIONS)
    assert bf16 > int8 > int4


def test_packing_twice_gives_the_same_files(blobs: LocalBlobStore, tmp_path: Path) -> None:
    student = Student.random(CONFIG, 1)
    first, second = (
        number_files(pack_weights(student, b"{}", blobs, PROBE, tmp_path), blobs, "faq", 1) for _ in range(2)
    )
    assert first == second


def test_weights_that_are_not_finite_are_not_packed(blobs: LocalBlobStore, tmp_path: Path) -> None:
    student = Student.random(CONFIG, 1)
    with torch.no_grad():
        student.model.norm.weight[3] = torch.nan
    with pytest.raises(EbbflowError) as caught:
        pack_weights(student, b"{}", blobs, PROBE, tmp_path)
    assert caught.value.reason is Reason.WEIGHTS_INVALID
