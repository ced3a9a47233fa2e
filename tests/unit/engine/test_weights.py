"""Packing: bounded memory, and files that somebody has tampered with."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from code_strategies import WEIGHTS
from engine_support import SHAPES, instruction_sets, use_instruction_set, write_artefact, write_shape
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.common.codes import container, quantise
from ebbflow.common.codes.artefact import PRECISIONS, Precision, read_variant, write_variant
from ebbflow.common.codes.container import Array
from ebbflow.common.codes.derive import offered_by
from ebbflow.common.codes.quantise import Float32
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.edge.engine.base import StepEntry
from ebbflow.edge.engine.library import find_library
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.weights import PackedWeights, check_numbers, code

DERIVATIONS = [(own, asked) for own in PRECISIONS for asked in offered_by(own)]
MIB = 1 << 20


def packed_bytes(path: Path, precision: Precision) -> bytes:
    library = find_library()
    assert library is not None
    weights = PackedWeights(library, read_variant(path), precision)
    content = weights._memory[:]
    weights.close()
    return content


@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_of_the_pieces_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    for own, asked in DERIVATIONS:
        path = write_shape(tmp_path / own, shape, own)
        whole = packed_bytes(path, asked)
        with monkeypatch.context() as patch:
            patch.setattr("ebbflow.edge.engine.weights._PIECE_WEIGHTS", 1)
            assert packed_bytes(path, asked) == whole


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    derivation=st.sampled_from(DERIVATIONS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    kept=st.floats(0, 1) | st.just(1.0),
)
def test_a_file_that_was_tampered_with_is_refused_or_computes(
    tmp_path: Path, shape: str, derivation: tuple[Precision, Precision], changes: list[tuple[float, int]], kept: float
) -> None:
    original = tmp_path / f"{shape}-{derivation[0]}"
    if not original.exists():
        write_shape(original, shape, derivation[0])
    content = bytearray(original.read_bytes())
    content = content[: int(len(content) * kept)]
    for where, byte in changes:
        if content:
            content[int(where * len(content))] = byte
    path = tmp_path / "tampered"
    path.write_bytes(content)
    try:
        with_tampered = load_engine(path, "native", threads=1, precision=derivation[1])
    except EbbflowError as error:
        allowed = {Reason.FILE_CORRUPT, Reason.WEIGHTS_INVALID, Reason.CONFIG_INVALID, Reason.INVALID_REQUEST}
        if error.reason not in allowed:
            raise
        return
    logits = with_tampered.step([StepEntry(with_tampered.open(), [0, 1, 2], "all")])[0]
    assert logits.shape == (3, with_tampered.config.vocab_size)
    with_tampered.shutdown()


@pytest.mark.parametrize("derivation", DERIVATIONS)
def test_numbers_that_no_code_stands_for_are_found_wherever_they_are(
    tmp_path: Path, derivation: tuple[Precision, Precision]
) -> None:
    own, asked = derivation
    path = write_artefact(tmp_path / "weights", SHAPES["biased"], own)
    content = path.read_bytes()
    layout = container.read_layout(path)
    library = find_library()
    assert library is not None
    bad = {"I8": b"\x80", "U8": b"\x01", "F16": b"\x00\x7c", "BF16": b"\x80\x7f"}
    for place in layout.places.values():
        wrong = bad[place.entry.dtype]
        for at in (place.offset_bytes, place.offset_bytes + place.entry.size_bytes - len(wrong)):
            path.write_bytes(content[:at] + wrong + content[at + len(wrong) :])
            with pytest.raises(EbbflowError) as caught:
                check_numbers(library, read_variant(path), asked)
            assert caught.value.reason is Reason.FILE_CORRUPT
            with pytest.raises(EbbflowError):
                PackedWeights(library, read_variant(path), asked)


def test_scales_too_large_for_int4_are_refused_when_it_derives(tmp_path: Path) -> None:
    path = write_artefact(tmp_path / "weights", SHAPES["tied"], "int8")
    layout = container.read_layout(path)
    place = layout.places["model.layers.1.mlp.down_proj.weight.scales"]
    content = bytearray(path.read_bytes())
    content[place.offset_bytes : place.offset_bytes + 2] = np.float16(60_000).tobytes()
    path.write_bytes(content)
    engine = load_engine(path, "native", threads=1)
    with pytest.raises(EbbflowError) as caught:
        engine.prepare("int4")
    assert caught.value.reason is Reason.WEIGHTS_INVALID
    engine.step([StepEntry(engine.open(), [1])])


def assert_coded_alike(weights: Float32) -> None:
    """Holds the kernels' codes and scales against numpy's, to the bit, with every instruction set of this machine."""
    library = find_library()
    assert library is not None
    bits = quantise.to_bf16(weights)
    codes8, scales8 = quantise.quantise_int8(quantise.from_bf16(bits))
    wanted: dict[int, Sequence[Array]] = {8: (codes8, scales8), 4: quantise.derive_nibbles(codes8, scales8)}
    for name in instruction_sets():
        use_instruction_set(name)
        for width, pair in wanted.items():
            found = code(library, bits, width)
            assert found is not None
            for array, expected in zip(found, pair, strict=True):
                assert array.dtype == expected.dtype
                np.testing.assert_array_equal(array.view(np.uint8), expected.view(np.uint8), err_msg=name)
    use_instruction_set(instruction_sets()[0])


@settings(max_examples=300, deadline=None)
@given(weights=WEIGHTS)
def test_kernels_code_weights_as_numpy_does(weights: Float32) -> None:
    assert_coded_alike(np.clip(weights, -450_000, 450_000))  # a bfloat16 beyond would be rounded up to what is refused


def test_kernels_code_groups_of_every_magnitude_as_numpy_does() -> None:
    most = quantise.from_bf16(np.arange(0x7F80, dtype=np.uint16))
    most = most[most <= quantise.WEIGHT_MOST]
    assert most.size > 18_000
    rng = np.random.default_rng(4)
    for shares in (
        rng.uniform(-1, 1, (most.size, 32)),
        np.linspace(-1, 1, 32),
        np.round(rng.uniform(-1, 1, 32) * 127) / 127,
    ):
        weights = (most[:, None] * np.broadcast_to(shares, (most.size, 32))).astype(np.float32)
        weights[:, 7] = most
        assert_coded_alike(weights)


@pytest.mark.parametrize("wrong", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x48E0, 0xC8E0])
def test_kernels_refuse_to_code_what_is_too_large_or_no_number(wrong: int) -> None:
    library = find_library()
    assert library is not None
    for name in instruction_sets():
        use_instruction_set(name)
        for at in (0, 31, 32, 40 * 32 - 1):
            bits = np.full((2, 20 * 32), 0x3F80, np.uint16)
            bits.reshape(-1)[at] = wrong
            assert code(library, bits, 8) is None
            assert code(library, bits, 4) is None
    use_instruction_set(instruction_sets()[0])


def test_weights_too_large_to_code_are_refused_when_a_precision_derives(tmp_path: Path) -> None:
    path = write_artefact(tmp_path / "weights", SHAPES["tied"], "bf16")
    place = container.read_layout(path).places["model.layers.1.mlp.down_proj.weight"]
    content = bytearray(path.read_bytes())
    content[place.offset_bytes + 64 : place.offset_bytes + 66] = b"\xe0\x48"  # 458,752
    path.write_bytes(content)
    engine = load_engine(path, "native", threads=1)
    for precision in ("int8", "int4"):
        with pytest.raises(EbbflowError) as caught:
            engine.prepare(precision)
        assert caught.value.reason is Reason.WEIGHTS_INVALID
    engine.shutdown()


MEASURE = """
import pathlib, sys
from ebbflow.edge.engine.load import load_engine
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) << 10
path = pathlib.Path(sys.argv[1])
before = peak()
with load_engine(path, "native", threads=1) as engine:
    loaded = peak()
    engine.replace(path)
    replaced = peak()
    for precision in sys.argv[2:]:
        engine.switch(engine.prepare(precision))
    print(before, loaded, replaced, peak())
"""


class Lazy(dict[str, np.ndarray]):
    """Makes each tensor when it is asked for."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(dict.fromkeys(config.tensor_shapes()))  # type: ignore[arg-type]
        self._shapes = config.tensor_shapes()

    def __getitem__(self, name: str) -> np.ndarray:
        return np.random.default_rng(len(name)).standard_normal(self._shapes[name], np.float32)


def test_loading_replacing_and_switching_stay_within_their_memory(tmp_path: Path) -> None:
    config = StudentConfig(
        vocab_size=60_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=4096,
    )
    path = tmp_path / "weights"
    write_variant(path, Lazy(config), config, "int8")
    size = path.stat().st_size
    command = [sys.executable, "-c", MEASURE, str(path), "int4", "int8"]
    done = subprocess.run(
        command,
        env={"PYTHONPATH": ":".join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    before, loaded, replaced, switched = map(int, done.stdout.split())
    assert size > 100 * MIB
    assert loaded < size + 100 * MIB
    assert loaded - before < size + 40 * MIB
    assert replaced - loaded < 20 * MIB, "no second copy"
    assert switched < 2 * size + 100 * MIB
    assert switched > 1.4 * size, "the measure sees what it should"
