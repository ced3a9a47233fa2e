"""Deltas lead from file to file, byte for byte, and cost what they should."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_students
from delta_world import CONFIG, WIDER, Pair, random_weights, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.common.codes import delta, differences
from ebbflow.common.codes.artefact import PRECISIONS, Precision, read_variant, write_variant
from ebbflow.common.codes.compiled import best_coder
from ebbflow.common.codes.rans import Coder, NumpyCoder
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig

every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_coder = pytest.mark.parametrize("coder", [NumpyCoder(), best_coder()], ids=["numpy", "best"])


def round_trip(pair: Pair, coder: Coder | None = None) -> delta.DeltaInfo:
    """Both ways; returns what was said about it."""
    folder = pair.base.parent
    info = delta.encode(pair.base, pair.target, folder / "delta", coder=coder)
    assert (folder / "delta").stat().st_size == info.size_bytes
    delta.apply(pair.base, folder / "delta", folder / "out", target_size_bytes=pair.size_bytes, coder=coder)
    assert (folder / "out").read_bytes() == pair.target.read_bytes()
    return info


def refused(pair: Pair, content: bytes, **options: object) -> None:
    folder = pair.base.parent
    (folder / "bad").write_bytes(content)
    arguments = {"target_size_bytes": pair.size_bytes, **options}
    with pytest.raises(EbbflowError) as caught:
        delta.apply(pair.base, folder / "bad", folder / "out", **arguments)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.DELTA_INVALID
    assert not (folder / "out").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@every_precision
@every_coder
@pytest.mark.parametrize("steps", [0.01, 1.05, 40.0])
@pytest.mark.parametrize("kept", [True, False])
def test_every_file_comes_back(tmp_path: Path, precision: Precision, coder: Coder, steps: float, kept: bool) -> None:
    pair = write_pair(tmp_path, precision, steps, kept=kept)
    info = round_trip(pair, coder)
    assert json.loads(json.dumps(info.statistics)) == info.statistics


@every_precision
def test_every_coder_makes_the_same_delta(tmp_path: Path, precision: Precision) -> None:
    pair = write_pair(tmp_path, precision, 1.05, kept=False)
    delta.encode(pair.base, pair.target, tmp_path / "one", coder=NumpyCoder())
    delta.encode(pair.base, pair.target, tmp_path / "two", coder=best_coder())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@every_precision
@pytest.mark.parametrize("block", [1 << 6, 1 << 9, 1 << 11])
def test_blocks_of_any_size_come_back(
    tmp_path: Path, precision: Precision, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences, "BLOCK_ITEMS", block)
    round_trip(write_pair(tmp_path, precision, 1.05, kept=False))


@every_precision
def test_equal_files_cost_next_to_nothing(tmp_path: Path, precision: Precision) -> None:
    pair = write_pair(tmp_path, precision, 0.0)
    info = round_trip(pair)
    assert info.size_bytes < 160
    assert info.statistics["changed_share"] == info.statistics["rescaled_share"] == 0.0
    assert info.statistics["entropy_bytes"] == 0


@every_precision
def test_one_changed_weight_costs_little(tmp_path: Path, precision: Precision) -> None:
    weights = random_weights()
    write_variant(tmp_path / "base", weights, CONFIG, precision)
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] *= -1.0
    write_variant(tmp_path / "target", weights, CONFIG, precision)
    info = round_trip(Pair(tmp_path / "base", tmp_path / "target"))
    assert info.size_bytes < 260
    changed = {name for name, tensor in info.statistics["tensors"].items() if tensor["changed_share"] > 0}
    assert changed == {name}


@every_precision
@every_coder
@pytest.mark.parametrize("grows", [True, False])
def test_a_student_of_another_vocabulary_comes_back(
    tmp_path: Path, precision: Precision, coder: Coder, grows: bool
) -> None:
    old, new = (CONFIG, WIDER) if grows else (WIDER, CONFIG)
    write_variant(tmp_path / "base", random_weights(old), old, precision)
    write_variant(tmp_path / "target", random_weights(new), new, precision)
    info = round_trip(Pair(tmp_path / "base", tmp_path / "target"), coder)
    assert info.size_bytes < (tmp_path / "target").stat().st_size * 1.02


@every_precision
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), share=st.sampled_from([0.0, 0.001, 0.5, 1.0]), best=st.booleans())
def test_any_numbers_come_back(tmp_path: Path, precision: Precision, seed: int, share: float, best: bool) -> None:
    """Not only what quantisation makes: codes of -128, scales that are negative or no numbers."""
    random = np.random.default_rng(seed)
    config = StudentConfig(
        vocab_size=int(random.integers(3, 70)),
        hidden_size=32,
        intermediate_size=int(random.integers(1, 80)),
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=16,
    )
    write_variant(tmp_path / "base", random_weights(config), config, precision)
    content = np.frombuffer((tmp_path / "base").read_bytes(), np.uint8).copy()
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    noise = random.integers(0, 256, content.size - begin).astype(np.uint8)
    for name, part in (("base", share), ("target", share)):
        chosen = random.random(noise.size) < part
        content[begin:][chosen] = noise[chosen]
        noise = random.permutation(noise)
        (tmp_path / name).write_bytes(content.tobytes())
    round_trip(Pair(tmp_path / "base", tmp_path / "target"), best_coder() if best else NumpyCoder())


@every_precision
def test_students_as_tests_and_devices_have_them_come_back(tmp_path: Path, precision: Precision) -> None:
    tokenizer = tiny_students.train_tokenizer()
    for seed, name in enumerate(("base", "target")):
        tiny_students.write_student(tmp_path / name, tokenizer, seed, precision)
    round_trip(Pair(tmp_path / "base", tmp_path / "target"))


def test_what_is_said_about_a_delta_is_true(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "int8", 2.0, kept=True)
    info = round_trip(pair)
    base, target = (read_variant(path) for path in (pair.base, pair.target))
    changed = numbers = rescaled = groups = 0
    for name, said in info.statistics["tensors"].items():
        coded = name + ".scales" in base.tensors
        key = name + ".codes" if coded else name
        old, new = base.tensors[key], target.tensors[key]
        numbers += old.size
        if not coded:
            changed += int((old != new).sum())
            assert said == {"changed_share": float((old != new).mean()), "rescaled_share": 0.0, "rms_steps": 0.0}
            continue
        scales = base.tensors[name + ".scales"] != target.tensors[name + ".scales"]
        assert said["rescaled_share"] == pytest.approx(float(scales.mean()))
        rescaled, groups = rescaled + int(scales.sum()), groups + scales.size
        step = new.astype(float) - old
        changed += int((step != 0).sum())
        assert said["changed_share"] == pytest.approx(float((step != 0).mean()))
        assert said["rms_steps"] == pytest.approx(float(np.sqrt((step**2).mean())))
    assert info.statistics["changed_share"] == pytest.approx(changed / numbers)
    assert info.statistics["rescaled_share"] == pytest.approx(rescaled / groups)
    assert 0 < rescaled < groups
    assert info.size_bytes > info.statistics["entropy_bytes"]


# 200 steps at a learning rate of 1e-5 move weights by about 1.05 int8 steps, 0.06 int4 steps.
@pytest.mark.parametrize(
    ("precision", "percent_most", "over_entropy_most"), [("int4", 7.5, 0.04), ("int8", 27.0, 0.01)]
)
def test_a_release_of_a_small_step_costs_what_is_promised(
    tmp_path: Path, precision: Precision, percent_most: float, over_entropy_most: float
) -> None:
    config = StudentConfig(
        vocab_size=4096,
        hidden_size=320,
        intermediate_size=896,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=64,
        max_position_embeddings=256,
    )
    pair = write_pair(tmp_path, precision, 1.05, config)
    info = round_trip(pair)
    assert info.size_bytes < pair.size_bytes * percent_most / 100
    assert info.size_bytes < info.statistics["entropy_bytes"] * (1 + over_entropy_most)


def test_no_delta_leads_from_one_precision_to_another(tmp_path: Path) -> None:
    write_variant(tmp_path / "base", random_weights(), CONFIG, "int8")
    write_variant(tmp_path / "target", random_weights(), CONFIG, "int4")
    with pytest.raises(EbbflowError) as caught:
        delta.encode(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_what_is_no_artefact_is_not_encoded(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "int8", 1.0)
    pair.target.write_bytes(pair.target.read_bytes()[:-1])
    with pytest.raises(EbbflowError) as caught:
        delta.encode(pair.base, pair.target, tmp_path / "delta")
    assert caught.value.reason is Reason.FILE_CORRUPT
    assert not (tmp_path / "delta").exists()


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return write_pair(tmp_path, "int8", 1.05)


def content_of(pair: Pair) -> bytes:
    delta.encode(pair.base, pair.target, pair.base.with_name("delta"))
    return pair.base.with_name("delta").read_bytes()


def test_a_delta_for_another_length_or_base_is_refused(pair: Pair) -> None:
    content = content_of(pair)
    refused(pair, content, target_size_bytes=pair.size_bytes - 1)
    refused(pair, content, target_size_bytes=pair.size_bytes + 1)
    refused(pair, content, base_sha256="ab" * 32)
    write_variant(pair.base, random_weights(WIDER), WIDER, "int8")
    refused(pair, content)
    pair.base.write_bytes(b"no artefact")
    refused(pair, content)
    pair.base.unlink()
    refused(pair, content)


def test_a_delta_whose_base_is_known_by_its_digest_is_applied(pair: Pair) -> None:
    content_of(pair)
    folder = pair.base.parent
    digest = hashlib.sha256(pair.base.read_bytes()).hexdigest()
    delta.apply(pair.base, folder / "delta", folder / "out", target_size_bytes=pair.size_bytes, base_sha256=digest)
    assert (folder / "out").read_bytes() == pair.target.read_bytes()


def test_a_delta_that_is_cut_short_lengthened_missing_or_foreign_is_refused(pair: Pair) -> None:
    content = content_of(pair)
    for size in (0, 1, 15, 100, len(content) // 2, len(content) - 1):
        refused(pair, content[:size])
    refused(pair, content + b"\0")
    refused(pair, content.replace(b"ebbflow.delta/1", b"ebbflow.delta/2"))
    with pytest.raises(EbbflowError) as caught:
        delta.apply(pair.base, Path("/nowhere"), pair.base.with_name("out"), target_size_bytes=pair.size_bytes)
    assert caught.value.reason is Reason.DELTA_INVALID


def test_an_old_result_is_replaced_only_by_a_whole_one(pair: Pair) -> None:
    content = content_of(pair)
    out = pair.base.with_name("out")
    out.write_bytes(b"old")
    pair.base.with_name("bad").write_bytes(content[:-1])
    with pytest.raises(EbbflowError):
        delta.apply(pair.base, pair.base.with_name("bad"), out, target_size_bytes=pair.size_bytes)
    assert out.read_bytes() == b"old"
    delta.apply(pair.base, pair.base.with_name("delta"), out, target_size_bytes=pair.size_bytes)
    assert out.read_bytes() == pair.target.read_bytes()
