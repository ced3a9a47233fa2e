from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.release.packing import PackedWeights, number_files, pack_weights
from ebbflow.common.codes import delta, derive
from ebbflow.common.codes.artefact import PRECISIONS, Variant, read_variant
from ebbflow.common.codes.kept import choose_kept
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
GATED, KEPT = "model.layers.0.mlp", ("gate", "up")
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


def test_sensitive_matrices_stay_bf16_in_every_file_and_the_manifest_names_them(
    blobs: LocalBlobStore, tmp_path: Path
) -> None:
    student = Student.random(CONFIG, 1, std=0.3)
    kept = choose_kept(CONFIG, ["model.embed_tokens.*", "*.0.mlp.up_proj.*"])
    before = pack_weights(student, tiny_models.tokenizer().to_bytes(), blobs, PROBE, tmp_path)
    neighbour = before.variants["int8"].sha256
    packed = pack_weights(student, tiny_models.tokenizer().to_bytes(), blobs, PROBE, tmp_path, neighbour, kept)
    targets = number_files(packed, blobs, "faq", 7)
    manifest = Manifest.from_json(blobs.read(targets["student/faq/7.manifest.json"]["sha256"]))
    assert manifest.kept_bf16 == kept == ("model.embed_tokens.weight", *(f"{GATED}.{x}_proj.weight" for x in KEPT))
    variants = {}
    for precision, variant in manifest.variants.items():
        path = tmp_path / precision
        blobs.fetch(targets[variant.target]["sha256"], path)
        variants[precision] = read_variant(path)
        assert variants[precision].kept_bf16 == kept
        engine = load_engine(path, threads=1)
        measured = manifest.probe.mean([sequence_loss(engine, ids) for ids in manifest.probe.token_ids])
        assert measured == pytest.approx(variant.probe_loss, abs=1e-4)
    for name in kept:
        for precision in PRECISIONS:
            np.testing.assert_array_equal(variants[precision].tensors[name], variants["bf16"].tensors[name])
    derive.derive_int4(tmp_path / "int8", tmp_path / "derived")
    assert (tmp_path / "derived").read_bytes() == (tmp_path / "int4").read_bytes()
    # A release that keeps nothing takes over the scales that this one has, and makes the others anew.
    after = pack_weights(student, b"{}", blobs, PROBE, tmp_path, packed.variants["int8"].sha256)
    assert after.variants == before.variants


def test_packing_twice_gives_the_same_files(blobs: LocalBlobStore, tmp_path: Path) -> None:
    student = Student.random(CONFIG, 1)
    first, second = (
        number_files(pack_weights(student, b"{}", blobs, PROBE, tmp_path), blobs, "faq", 1) for _ in range(2)
    )
    assert first == second


def moved(student: Student, rms: float) -> Student:
    """The student after a small step of training."""
    after = Student.random(student.config, 1)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(torch.randn_like(parameter) * rms)
    return after


def int8_of(packed: PackedWeights, blobs: LocalBlobStore, path: Path) -> Variant:
    blobs.fetch(packed.variants["int8"].sha256, path)
    return read_variant(path)


def test_a_release_keeps_the_scales_of_its_neighbour_and_so_its_codes(blobs: LocalBlobStore, tmp_path: Path) -> None:
    student = Student.random(CONFIG, 1)
    after = moved(student, 1e-5)
    old = pack_weights(student, b"{}", blobs, PROBE, tmp_path)
    neighbour = old.variants["int8"].sha256
    new, again = (pack_weights(after, b"{}", blobs, PROBE, tmp_path, neighbour) for _ in range(2))
    fresh = pack_weights(after, b"{}", blobs, PROBE, tmp_path)
    assert new == again
    base, kept = int8_of(old, blobs, tmp_path / "old"), int8_of(new, blobs, tmp_path / "new")
    for name, scales in base.tensors.items():
        if name.endswith(".scales"):
            np.testing.assert_array_equal(kept.tensors[name], scales)
    derive.derive_int4(tmp_path / "new", tmp_path / "derived")
    assert blobs.read(new.variants["int4"].sha256) == (tmp_path / "derived").read_bytes()
    sizes = []
    for packed in (new, fresh):
        blobs.fetch(packed.variants["int4"].sha256, tmp_path / "target4")
        blobs.fetch(old.variants["int4"].sha256, tmp_path / "base4")
        sizes.append(delta.encode(tmp_path / "base4", tmp_path / "target4", tmp_path / "delta").size_bytes)
    assert sizes[0] < sizes[1]
    assert list(tmp_path.glob("tmp*")) == []


@pytest.mark.parametrize("why", ["gone", "damaged", "int4", "wider"])
def test_a_neighbour_whose_scales_cannot_be_kept_changes_nothing(
    blobs: LocalBlobStore, tmp_path: Path, why: str
) -> None:
    student = Student.random(CONFIG, 1)
    fresh = pack_weights(student, b"{}", blobs, PROBE, tmp_path)
    neighbour = {
        "gone": lambda: "ab" * 32,
        "damaged": lambda: blobs.put([b"no artefact"]).sha256,
        "int4": lambda: fresh.variants["int4"].sha256,
        "wider": lambda: (
            pack_weights(Student.random(replace(CONFIG, intermediate_size=96), 1), b"{}", blobs, PROBE, tmp_path)
            .variants["int8"]
            .sha256
        ),
    }[why]()
    assert pack_weights(student, b"{}", blobs, PROBE, tmp_path, neighbour) == fresh


def test_weights_that_are_not_finite_are_not_packed(blobs: LocalBlobStore, tmp_path: Path) -> None:
    student = Student.random(CONFIG, 1)
    with torch.no_grad():
        student.model.norm.weight[3] = torch.nan
    with pytest.raises(EbbflowError) as caught:
        pack_weights(student, b"{}", blobs, PROBE, tmp_path)
    assert caught.value.reason is Reason.WEIGHTS_INVALID
