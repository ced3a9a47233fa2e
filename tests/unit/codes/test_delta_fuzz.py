"""Hostile deltas: refused or a file of the promised length, never anything else, and never much memory."""

import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from delta_world import CONFIG, WIDER, Pair, random_weights, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ebbflow.common.codes import delta, delta_head, differences, rans
from ebbflow.common.codes.artefact import Precision, write_variant
from ebbflow.common.codes.compiled import best_coder
from ebbflow.common.codes.container import Entry, encode_header, read_layout
from ebbflow.common.codes.delta_head import Coding, Head, Mode, encode_head
from ebbflow.common.codes.rans import Coder, NumpyCoder
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig

START = struct.Struct("<16s32s32sQQII")
NUMPY, BEST = NumpyCoder(), best_coder()


@pytest.fixture(scope="module", params=["int8", "int4", "bf16", "wider"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    if request.param == "wider":
        write_variant(folder / "base", random_weights(CONFIG), CONFIG, "int4")
        write_variant(folder / "target", random_weights(WIDER), WIDER, "int4")
        pair = Pair(folder / "base", folder / "target")
    else:
        pair = write_pair(folder, request.param, 1.05, kept=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "BLOCK_ITEMS", 1 << 10)
        delta.encode(pair.base, pair.target, folder / "delta")
    return pair, (folder / "delta").read_bytes()


def applied(pair: Pair, content: bytes, coder: Coder) -> bytes | None:
    """The file that comes out of a delta, or None if it is refused as it should be."""
    folder = pair.base.parent
    out = folder / "out"
    (folder / "mutated").write_bytes(content)
    try:
        delta.apply(pair.base, folder / "mutated", out, target_size_bytes=pair.size_bytes, coder=coder)
    except EbbflowError as error:
        assert error.reason is Reason.DELTA_INVALID  # noqa: PT017 - some damage is for the hash to find
        assert not out.exists()
        return None
    finally:
        assert not list(folder.glob(".out*"))
    content = out.read_bytes()
    out.unlink()
    assert len(content) == pair.size_bytes
    return content


def mutate(data: st.DataObject, content: bytes) -> bytes:
    """Overwrites, removes or repeats a few stretches."""
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(mutated) - 1)))
        size = data.draw(st.sampled_from([1, 1, 1, 2, 4, 8, 40]))
        how = data.draw(st.sampled_from(["bits", "bytes", "cut", "repeat"]))
        if how == "bits" and mutated:
            mutated[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del mutated[at : at + size]
        elif how == "repeat":
            mutated[at:at] = mutated[at : at + size]
        else:
            mutated[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
    return bytes(mutated)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_delta_is_refused_or_gives_a_file_of_the_right_length(
    whole: tuple[Pair, bytes], data: st.DataObject
) -> None:
    pair, content = whole
    mutated = mutate(data, content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "BLOCK_ITEMS", 1 << 10)
        assert applied(pair, mutated, BEST) == applied(pair, mutated, NUMPY)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_mutated_head_that_inflates_is_refused_or_gives_a_file_of_the_right_length(
    whole: tuple[Pair, bytes], data: st.DataObject
) -> None:
    pair, content = whole
    *start, deflated_bytes, _ = START.unpack_from(content)
    plain = zlib.decompress(content[START.size : START.size + deflated_bytes])
    plain = mutate(data, plain)
    deflated = zlib.compress(plain)
    mutated = START.pack(*start, len(deflated), len(plain)) + deflated + content[START.size + deflated_bytes :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(differences, "BLOCK_ITEMS", 1 << 10)
        assert applied(pair, mutated, BEST) == applied(pair, mutated, NUMPY)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=st.binary(max_size=400), named=st.booleans())
def test_any_bytes_are_refused(whole: tuple[Pair, bytes], content: bytes, named: bool) -> None:
    pair, true_content = whole
    assert applied(pair, true_content[: START.size] * named + content, BEST) is None


def hostile(pair: Pair, rest: bytes, *, plain_bytes: int | None = None) -> bytes:
    """A delta with a head of one's own."""
    deflated = zlib.compress(rest)
    sizes = pair.base.stat().st_size, pair.size_bytes, len(deflated), len(rest) if plain_bytes is None else plain_bytes
    return START.pack(b"ebbflow.delta/1\0", b"", b"", *sizes) + deflated


def heads() -> dict[str, bytes]:
    """Rests of heads that promise much."""
    deep = b"[" * 500_000
    wide = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(15_000)}).encode()
    huge = json.dumps({"a": {"dtype": "BF16", "shape": [1 << 62] * 8, "data_offsets": [0, 1 << 400]}}).encode()
    found = {}
    for name, text in {"deep": deep, "wide": wide, "huge": huge}.items():
        prefix = len(text).to_bytes(8, "little") + text
        found[name] = len(prefix).to_bytes(4, "little") + prefix
    return {**found, "zeros": bytes(delta_head.REST_MOST_BYTES), "long": (0xFFFFFFFF).to_bytes(4, "little")}


@pytest.mark.parametrize("name", ["deep", "wide", "huge", "zeros", "long"])
def test_a_hostile_head_costs_little_memory(tmp_path: Path, name: str) -> None:
    pair = write_pair(tmp_path, "int8", 1.05)
    content = hostile(pair, heads()[name])
    tracemalloc.start()
    try:
        assert applied(pair, content, BEST) is None
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < 48 << 20


@pytest.mark.parametrize("said", [1, 1 << 20, (1 << 32) - 1])
def test_a_head_that_inflates_to_more_than_it_says_or_may_is_refused(tmp_path: Path, said: int) -> None:
    pair = write_pair(tmp_path, "int8", 1.05)
    content = hostile(pair, bytes(64 << 20), plain_bytes=said)
    tracemalloc.start()
    try:
        assert applied(pair, content, BEST) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def wide(vocabulary: int) -> StudentConfig:
    """One large matrix."""
    return StudentConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=16,
    )


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
def test_blocks_are_held_and_not_the_model(tmp_path: Path, precision: Precision) -> None:
    pair = write_pair(tmp_path, precision, 1.05, wide(64_000))
    assert pair.size_bytes > 8 << 20
    tracemalloc.start()
    try:
        delta.encode(pair.base, pair.target, tmp_path / "delta", coder=BEST)
        encode_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        delta.apply(pair.base, tmp_path / "delta", tmp_path / "out", target_size_bytes=pair.size_bytes, coder=BEST)
        apply_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out").read_bytes() == pair.target.read_bytes()
    assert max(encode_bytes, apply_bytes) < 16 * differences.BLOCK_ITEMS


def test_the_coder_in_numpy_holds_one_batch(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "int8", 1.05, wide(6_000))
    delta.encode(pair.base, pair.target, tmp_path / "delta", coder=BEST)
    coder = NumpyCoder()
    coder.batch_symbols = 1 << 18
    tracemalloc.start()
    try:
        delta.apply(pair.base, tmp_path / "delta", tmp_path / "out", target_size_bytes=pair.size_bytes, coder=coder)
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < 16 * coder.batch_symbols


def test_many_small_tensors_cost_the_coder_in_numpy_little(tmp_path: Path) -> None:
    """Each stream has a table of 16 KiB, so a batch is bounded in streams as well."""
    entries = {f"t{i:04}": Entry("BF16", (3,)) for i in range(3000)}
    prefix = encode_header(entries, {})
    random = np.random.default_rng(0)
    old, new = (random.integers(0, 256, 6 * len(entries)).astype(np.uint8) for _ in range(2))
    for name, numbers in (("base", old), ("target", new)):
        (tmp_path / name).write_bytes(prefix + numbers.tobytes())
    pair = Pair(tmp_path / "base", tmp_path / "target")
    layout = read_layout(pair.base)
    units = differences.units_of(layout, layout)
    table = rans.normalise(np.ones(256, np.int64))
    coding = Coding(Mode.SHARED, frequencies=table)
    head = Head(b"", b"", layout, units, [[coding, coding]] * len(units))
    streams = [encode_head(head, layout, {"numbers-low": table, "numbers-high": table})]
    for unit in units:
        at = unit.target_offset - len(prefix)
        for symbols in unit.difference(old[at : at + 6], new[at : at + 6]):
            (payload,) = NUMPY.encode([(symbols, table)])
            streams.append(len(payload).to_bytes(4, "little") + payload)
    tracemalloc.start()
    try:
        assert applied(pair, b"".join(streams), NUMPY) == pair.target.read_bytes()
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most_bytes < 24 << 20
