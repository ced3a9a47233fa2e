"""INT4 on the device is the release's own INT4 file."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from delta_world import CONFIG, moved, random_weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.common.codes import artefact
from ebbflow.common.codes.artefact import read_variant, write_variant
from ebbflow.common.codes.derive import derive_int4
from ebbflow.common.codes.kept import choose_kept
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1 << 32),
    exponent=st.integers(-30, 20),
    kept=st.booleans(),
    sensitive=st.sets(st.sampled_from(["model.embed_tokens.*", "*.0.*", "*.1.mlp.down_proj.*", "*.v_proj.*"])),
)
def test_the_derived_file_is_the_packed_one_byte_for_byte(
    tmp_path: Path, seed: int, exponent: int, kept: bool, sensitive: set[str]
) -> None:
    names = choose_kept(CONFIG, sorted(sensitive))
    weights = {name: weight * np.float32(2.0**exponent) for name, weight in random_weights(CONFIG, seed).items()}
    write_variant(tmp_path / "before", weights, CONFIG, "int8")
    scales = read_variant(tmp_path / "before") if kept else None
    weights = moved(weights, 0.005 * 2.0**exponent)
    write_variant(tmp_path / "int8", weights, CONFIG, "int8", scales, names)
    write_variant(tmp_path / "int4", weights, CONFIG, "int4", scales, names)
    derive_int4(tmp_path / "int8", tmp_path / "derived")
    assert (tmp_path / "derived").read_bytes() == (tmp_path / "int4").read_bytes()


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_int4_derives_from_int8_alone(tmp_path: Path, precision: artefact.Precision) -> None:
    write_variant(tmp_path / "other", random_weights(), CONFIG, precision)
    with pytest.raises(EbbflowError) as caught:
        derive_int4(tmp_path / "other", tmp_path / "derived")
    assert caught.value.reason is Reason.FILE_CORRUPT
    assert not (tmp_path / "derived").exists()


def test_a_damaged_int8_file_leaves_nothing_behind(tmp_path: Path) -> None:
    write_variant(tmp_path / "int8", random_weights(), CONFIG, "int8")
    content = (tmp_path / "int8").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for damaged in (content[:-5], content[:begin] + b"\x80" + content[begin + 1 :], b""):
        (tmp_path / "int8").write_bytes(damaged)
        with pytest.raises(EbbflowError) as caught:
            derive_int4(tmp_path / "int8", tmp_path / "derived")
        assert caught.value.reason is Reason.FILE_CORRUPT
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_deriving_holds_blocks_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefact, "_BLOCK_WEIGHTS", 1 << 16)
    config = StudentConfig(
        vocab_size=40_000,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=16,
    )
    write_variant(tmp_path / "int8", random_weights(config), config, "int8")
    tracemalloc.start()
    try:
        derive_int4(tmp_path / "int8", tmp_path / "derived")
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < (tmp_path / "derived").stat().st_size / 2
