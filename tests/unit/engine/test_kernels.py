"""The compiled kernels against numpy, and every instruction set of this machine against the portable one."""

import ctypes
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_models import GROUP, Float32, KernelModel, KernelRun, RandomMatrix, Shape

from ebbflow.edge.engine.library import LIBRARY, open_library

KNOWN = ("avx512", "avxvnni", "avx2", "i8mm", "dotprod", "portable")
BITS = (4, 8, 16)
LIB = open_library(LIBRARY)
HERE = [name for name in KNOWN if LIB.ebb_use_isa(name.encode()) == 0]
BEST = HERE[0]


@pytest.fixture(autouse=True)
def the_best_afterwards() -> Iterator[None]:
    use(BEST)
    yield
    use(BEST)


def use(name: str) -> None:
    assert LIB.ebb_use_isa(name.encode()) == 0


def off(found: Float32, wanted: Float32) -> float:
    """The largest difference as a share of the largest number."""
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def matrices() -> st.SearchStrategy[tuple[int, int, int, int, int, bool]]:
    """Bits, rows, columns, rows of activations, seed, bias."""
    return st.sampled_from(BITS).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            st.integers(1, 70),
            st.integers(1, 6).map(lambda n: n * GROUP) if bits < 16 else st.integers(1, 90).map(lambda n: 2 * n),
            st.integers(1, 19),
            st.integers(0, 2**32 - 1),
            st.booleans(),
        )
    )


@given(case=matrices())
def test_products_are_those_of_numpy_on_every_instruction_set(case: tuple[int, int, int, int, int, bool]) -> None:
    bits, rows, columns, count, seed, bias = case
    rng = np.random.default_rng(seed)
    matrix = RandomMatrix(LIB, rng, rows, columns, bits, bias=bias)
    x = (rng.standard_normal((count, columns)) * 10.0 ** rng.integers(-3, 3, (count, 1))).astype(np.float32)
    x[rng.random(count) < 0.1] = 0
    wanted = matrix.reference(x)
    for name in HERE:
        use(name)
        found = matrix.multiply(LIB, x)
        # Integer sums are exact; what is left is the rounding of float32 sums over groups.
        size = np.abs(matrix.round_input(x)) @ np.abs(matrix.weight_OI).T + 1e-6
        size += 0 if matrix.bias_O is None else np.abs(matrix.bias_O)
        assert float((np.abs(found - wanted) / size).max()) < (2e-6 if bits < 16 else 1e-5), name


@given(case=matrices(), cuts=st.lists(st.integers(0, 4), max_size=3))
def test_rows_may_be_packed_in_parts(case: tuple[int, int, int, int, int, bool], cuts: list[int]) -> None:
    bits, rows, columns, _, seed, _ = case
    matrix = RandomMatrix(LIB, np.random.default_rng(seed), rows, columns, bits)
    ends = sorted({16 * cut for cut in cuts if 0 < 16 * cut < rows} | {rows})
    parts = np.full_like(matrix.packed, 0x11)
    for begin, end in zip([0, *ends], ends, strict=False):
        matrix.pack(LIB, parts, begin, end)
    np.testing.assert_array_equal(parts, matrix.packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_numbers_that_are_none_come_out_as_none(bits: int, value: float) -> None:
    matrix = RandomMatrix(LIB, np.random.default_rng(0), 16, 64, bits)
    x = np.ones((2, 64), np.float32)
    x[1, 5] = value
    for name in HERE:
        use(name)
        found = matrix.multiply(LIB, x)
        assert np.isfinite(found[0]).all(), name
        assert not np.isfinite(found[1]).any(), name


@pytest.mark.parametrize("bits", BITS)
def test_the_extremes_of_codes_do_not_overflow(bits: int) -> None:
    columns = 64 * GROUP
    matrix = RandomMatrix(LIB, np.random.default_rng(0), 16, columns, bits)
    if bits == 16:
        matrix.parts[0][:] = 0x4380  # 256
    else:
        matrix.parts[0][:] = 0x11 if bits == 4 else -127
        matrix.parts[1][:] = 1
    matrix.pack(LIB, matrix.packed, 0, 16)
    weight = {4: -7, 8: -127, 16: 256}[bits]
    for sign in (1, -1):
        x = np.full((9, columns), sign * 127, np.float32)
        for name in HERE:
            use(name)
            assert off(matrix.multiply(LIB, x), np.full((9, 16), weight * sign * 127.0 * columns, np.float32)) < 1e-6


def shapes() -> st.SearchStrategy[Shape]:
    return st.builds(
        lambda kv_heads, share, dim, **sizes: Shape(kv_heads=kv_heads, heads=kv_heads * share, head_dim=dim, **sizes),
        kv_heads=st.integers(1, 3),
        share=st.sampled_from([1, 2, 3, 5, 8, 9]),
        dim=st.sampled_from([32, 64, 96]),
        hidden=st.sampled_from([32, 96]),
        inner=st.sampled_from([32, 160]),
        layers=st.integers(0, 2),
        vocabulary=st.integers(1, 50),
        bias=st.booleans(),
    )


@given(
    shape=shapes(),
    bits=st.sampled_from(BITS) | st.lists(st.sampled_from(BITS), min_size=2, max_size=5).map(tuple),
    kv_bits=st.sampled_from([8, 16]),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    threads=st.integers(1, 3),
    data=st.data(),
)
def test_ragged_batches_give_the_logits_of_numpy_on_every_instruction_set(
    shape: Shape, bits: int | tuple[int, ...], kv_bits: int, lengths: list[int], threads: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    model = KernelModel(LIB, shape, bits, kv_bits, seed)
    ids = [rng.integers(0, shape.vocabulary, length).tolist() for length in lengths]
    wanted = [model.reference(sequence) for sequence in ids]
    # In each step every sequence takes as many of its tokens as chance says, or none.
    steps: list[list[tuple[int, list[int]]]] = []
    left = [list(sequence) for sequence in ids]
    while any(left):
        takes = [int(rng.integers(0, min(len(tokens), 40) + 1)) for tokens in left]
        steps.append([(s, left[s][:take]) for s, take in enumerate(takes) if take])
        left = [tokens[take:] for tokens, take in zip(left, takes, strict=True)]
    for name in HERE:
        use(name)
        found: list[list[Float32]] = [[] for _ in ids]
        with KernelRun(model, len(ids), threads=threads, seed=seed) as run:
            for entries in filter(None, steps):
                for (sequence, _), logits in zip(entries, run.step(entries), strict=True):
                    found[sequence].append(logits)
        for parts, reference in zip(found, wanted, strict=True):
            # A difference of float32 rounding may move a code of an activation, a key or a value by one.
            # Logits have a spread near one, however small those of a tiny vocabulary may happen to be.
            apart = np.abs(np.concatenate(parts) - reference) / max(1.0, np.abs(reference).max())
            assert float(apart.max()) < 0.03, name
            assert float(apart.mean()) < 0.005, name


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kv_bits", [8, 16])
def test_threads_neighbours_and_chunks_change_no_bit_of_an_answer(name: str, bits: int, kv_bits: int) -> None:
    use(name)
    # A width that fills no register, where bits allow it.
    shape = Shape(heads=6, kv_heads=2, head_dim=24 if bits == 16 else 32)
    model = KernelModel(LIB, shape, bits, kv_bits)
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 77, 90).tolist()
    other = rng.integers(0, 77, 90).tolist()
    with KernelRun(model) as run:
        (alone,) = run.step([(0, ids)])
    found = []
    with KernelRun(model, 2, threads=4, seed=9, rubbish=0) as run:
        for begin, end, threads in ((0, 37, 3), (37, 38, 1), (38, 80, 4), (80, 90, 2)):
            entries = [(1, other[begin:end]), (0, ids[begin:end])]
            found.append(run.step(entries, threads)[1])
    np.testing.assert_array_equal(np.concatenate(found), alone)


def test_a_long_context_agrees_with_numpy() -> None:
    model = KernelModel(LIB, Shape(hidden=32, inner=32, layers=1, heads=8, kv_heads=1, head_dim=32), 8, 16)
    ids = np.random.default_rng(1).integers(0, 77, 1500).tolist()
    wanted = model.reference(ids)
    for name in HERE:
        use(name)
        with KernelRun(model, positions=1536, threads=2) as run:
            found = [run.step([(0, ids[begin : begin + 250])])[0] for begin in range(0, 1500, 250)]
        assert off(np.concatenate(found), wanted) < 0.03


def test_the_last_hidden_state_is_what_the_head_multiplies() -> None:
    model = KernelModel(LIB, Shape(layers=0), 16, 16)
    with KernelRun(model) as run:
        run.step([(0, [3, 9, 4])])
        x = model.embedding.weight_OI[[3, 9, 4]]
        wanted = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * model.norms[-1]
        assert off(run.hidden, wanted.astype(np.float32)) < 1e-6


def test_idle_threads_sleep() -> None:
    with KernelRun(KernelModel(LIB, Shape(), 8, 16), threads=4) as run:
        run.step([(0, [1, 2, 3])])
        worked_s = []
        for _ in range(5):  # what else this process does is none of their business, and does not last
            time.sleep(0.05)
            before_s = time.process_time()
            time.sleep(0.4)
            worked_s.append(time.process_time() - before_s)
            if worked_s[-1] < 0.05:
                break
        assert worked_s[-1] < 0.05, worked_s


def test_an_instruction_set_that_is_not_there_changes_nothing() -> None:
    assert LIB.ebb_use_isa(b"sparc") == -1
    assert LIB.ebb_isa().decode() == BEST


def test_a_page_holds_what_the_layout_says() -> None:
    for kv_bits, vector_bytes in ((16, 2 * 32), (8, 32 + 4)):
        with KernelRun(KernelModel(LIB, Shape(layers=3, kv_heads=2, head_dim=32), 8, kv_bits)) as run:
            assert run.pages[0].size == 3 * 2 * 2 * 32 * vector_bytes


def test_a_library_of_another_version_is_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebbflow.edge.engine.library.ABI", 99)
    with pytest.raises(ValueError, match="version 1 of the kernels' interface where 99"):
        open_library(LIBRARY)
    assert isinstance(LIB, ctypes.CDLL)
