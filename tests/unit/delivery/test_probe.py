"""A real student in the real engine, held against its signed loss."""

from pathlib import Path

import pytest
from delivery_device import desired
from delivery_world import World

from ebbflow.common.codes.artefact import write_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.trust.manifest import Manifest, ManifestVariant, Probe
from ebbflow.common.trust.targets import variant_path
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

CONFIG = StudentConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)
PROBE = Probe((tuple(range(1, 40)), (5, 4, 3)), 0.02)


def weights(path: Path, seed: int, kept: tuple[str, ...] = ()) -> bytes:
    student = Student.random(CONFIG, seed=seed, std=0.2)
    tensors = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    write_variant(path, tensors, CONFIG, "int8", kept_bf16=kept)
    return path.read_bytes()


def publish(world: World, number: int, data: bytes, loss: float, kept: tuple[str, ...] = ()) -> None:
    def manifest(size_bytes: int) -> Manifest:
        variant = ManifestVariant(variant_path("faq", number, "int8"), size_bytes, loss)
        return Manifest("faq", number, CONFIG.to_hf(), {"int8": variant}, PROBE, kept)

    world.publish(number, weights=data, manifest=manifest)


def test_a_real_student_passes_its_probe_and_a_swapped_one_does_not(world: World, tmp_path: Path) -> None:
    mine, other = weights(tmp_path / "mine", 1), weights(tmp_path / "other", 2)
    engine = load_engine(tmp_path / "mine")
    loss = PROBE.mean([sequence_loss(engine, token_ids) for token_ids in PROBE.token_ids])
    publish(world, 1, mine, loss)
    publish(world, 2, other, loss)
    installer = world.device().installer
    installed, _ = installer.install(desired(1), load_engine)
    installer.commit(installed)
    assert installed.probe_loss == pytest.approx(loss)
    with pytest.raises(EbbflowError) as caught:
        installer.install(desired(2), load_engine)
    assert caught.value.reason is Reason.PROBE_FAILED
    assert abs(float(caught.value.metadata["probe_loss"]) - loss) > PROBE.tolerance
    started = installer.start("faq", load_engine)
    assert started
    assert started[0].number == 1


def test_weights_that_keep_other_matrices_in_bf16_than_the_manifest_says_are_not_served(
    world: World, tmp_path: Path
) -> None:
    kept = ("model.embed_tokens.weight",)
    data = weights(tmp_path / "mine", 1, kept)
    engine = load_engine(tmp_path / "mine")
    loss = PROBE.mean([sequence_loss(engine, token_ids) for token_ids in PROBE.token_ids])
    publish(world, 1, data, loss, kept)
    publish(world, 2, data, loss)
    installer = world.device().installer
    installed, serving = installer.install(desired(1), load_engine)
    assert serving.kept_bf16 == installed.manifest.kept_bf16 == kept
    installer.commit(installed)
    with pytest.raises(EbbflowError, match="kept in bf16") as caught:
        installer.install(desired(2), load_engine)
    assert caught.value.reason is Reason.ARTEFACT_UNTRUSTED
    current = installer.current("faq")
    assert current is not None
    assert current.number == 1
