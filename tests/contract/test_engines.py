"""What every engine does: torch, and the native one with every instruction set of this machine."""

import contextlib
import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import (
    SHAPES,
    assert_alike,
    assert_same,
    instruction_sets,
    twin_logits,
    use_instruction_set,
    write_artefact,
    write_shape,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ebbflow.common.codes.artefact import PRECISIONS, KVKind, Precision, read_variant
from ebbflow.common.codes.twin import build_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Engine, StepEntry
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.engine.loss import sequence_loss

Load = Callable[..., Engine]
ENGINES = ["torch", *(f"native-{name}" for name in instruction_sets())]
KV_KINDS: tuple[KVKind, ...] = ("bf16", "int8")
TOKENS = np.random.default_rng(0).integers(0, 67, 240).tolist()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder = tmp_path_factory.mktemp("artefacts")
    return {
        (shape, precision): write_shape(folder / f"{shape}-{precision}", shape, precision)
        for shape, precision in itertools.product(SHAPES, PRECISIONS)
    }


@pytest.fixture(params=ENGINES)
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    kind, _, instruction_set = request.param.partition("-")
    if instruction_set:
        use_instruction_set(instruction_set)
    loaded: list[Engine] = []

    def load_one(path: Path, **options: Any) -> Engine:
        engine = load_engine(path, kind, **{"threads": 1, **options})
        assert (engine.name, engine.instruction_set) == (kind, instruction_set)
        loaded.append(engine)
        return engine

    yield load_one
    for engine in loaded:
        engine.shutdown()
    if instruction_set:
        use_instruction_set(instruction_sets()[0])


@pytest.mark.parametrize("kv_cache", KV_KINDS)
@pytest.mark.parametrize(("shape", "precision"), list(itertools.product(SHAPES, PRECISIONS)))
def test_logits_are_the_twins(
    load: Load, artefacts: dict[tuple[str, str], Path], shape: str, precision: Precision, kv_cache: KVKind
) -> None:
    path = artefacts[shape, precision]
    engine = load(path, kv_cache=kv_cache)
    prompts = [TOKENS[begin : begin + 3] for begin in range(0, 192, 3)]
    slots = [engine.open() for _ in prompts]
    found = engine.step([StepEntry(slot, prompt, "all") for slot, prompt in zip(slots, prompts, strict=True)])
    assert_same(np.stack(found), twin_logits(path, prompts, kv_cache=kv_cache))

    slot = engine.open()
    pieces = [engine.step([StepEntry(slot, TOKENS[a:b], "all")])[0] for a, b in itertools.pairwise((0, 40, 41, 200))]
    assert_alike(np.concatenate(pieces), twin_logits(path, [TOKENS[:200]], kv_cache=kv_cache)[0])


@pytest.mark.parametrize("shape", ["tied", "sensitive"])
@pytest.mark.parametrize(("own", "asked"), [("int8", "int4"), ("bf16", "int8"), ("bf16", "int4")])
def test_a_smaller_precision_derives_from_an_artefact(
    load: Load, artefacts: dict[tuple[str, str], Path], shape: str, own: Precision, asked: Precision
) -> None:
    engine = load(artefacts[shape, own], precision=asked)
    assert engine.precision == asked
    prompts = [TOKENS[begin : begin + 3] for begin in range(0, 96, 3)]
    found = engine.step([StepEntry(engine.open(), prompt, "all") for prompt in prompts])
    assert_same(np.stack(found), twin_logits(artefacts[shape, own], prompts, asked))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_student_whose_matrices_are_all_kept_computes_its_bf16(
    load: Load, artefacts: dict[tuple[str, str], Path], tmp_path: Path, precision: Precision
) -> None:
    path = write_artefact(tmp_path / "weights", SHAPES["biased"], precision, keep=["*"])
    kept, plain = load(path), load(artefacts["biased", "bf16"])
    assert (kept.precision, len(kept.kept_bf16), plain.kept_bf16) == (precision, 2 + 3 * 6, ())
    first, second = (engine.step([StepEntry(engine.open(), TOKENS[:20], "all")])[0] for engine in (kept, plain))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("shape", ["biased", "sensitive"])
def test_int4_derived_from_int8_is_the_releases_own(
    load: Load, artefacts: dict[tuple[str, str], Path], shape: str
) -> None:
    derived, own = load(artefacts[shape, "int8"], precision="int4"), load(artefacts[shape, "int4"])
    first, second = (engine.step([StepEntry(engine.open(), TOKENS[:20], "all")])[0] for engine in (derived, own))
    np.testing.assert_array_equal(first, second)


def test_a_larger_precision_does_not_derive(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    with pytest.raises(EbbflowError, match="int8") as caught:
        load(artefacts["tied", "int8"], precision="bf16")
    assert caught.value.reason is Reason.INVALID_REQUEST


PIECES = st.lists(
    st.dictionaries(
        st.integers(0, 4),
        st.tuples(st.integers(1, 45), st.sampled_from(["last", "all"])),
        min_size=1,
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("shape", ["tied", "uneven"])
def test_ragged_steps_equal_whole_sequences(load: Load, artefacts: dict[tuple[str, str], Path], shape: str) -> None:
    engine = load(artefacts[shape, "bf16"])
    twin = build_student(read_variant(artefacts[shape, "bf16"]))

    @settings(max_examples=15, deadline=None)
    @given(steps=PIECES, closings=st.lists(st.integers(0, 4), max_size=6), data=st.data())
    def check(steps: list[dict[int, tuple[int, Any]]], closings: list[int], data: st.DataObject) -> None:
        slots, seen = {who: engine.open() for who in range(5)}, {who: list[int]() for who in range(5)}
        for number, drawn in enumerate(steps):
            step = {who: what for who, what in drawn.items() if len(seen[who]) + what[0] <= 240}
            order = data.draw(st.permutations(list(step)))
            news = {who: TOKENS[len(seen[who]) : len(seen[who]) + step[who][0]] for who in order}
            found = engine.step([StepEntry(slots[who], news[who], step[who][1]) for who in order])
            for who, result in zip(order, found, strict=True):
                seen[who] += news[who]
                with torch.inference_mode():
                    expected = twin(torch.tensor([seen[who]]))[0].numpy()
                want_all = step[who][1] == "all"
                assert_alike(result, expected[-len(news[who]) :] if want_all else expected[-1])
            if number < len(closings):
                who = closings[number]
                engine.close(slots[who])
                slots[who], seen[who] = engine.open(), []
        for slot in slots.values():
            engine.close(slot)

    check()


def test_a_long_step_is_one_step(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["tied", "int8"])
    first, second, third = (engine.open() for _ in range(3))
    entries = [StepEntry(first, TOKENS[:150]), StepEntry(second, TOKENS[:200], "all"), StepEntry(third, TOKENS[:1])]
    alone, both, one = engine.step(entries)
    expected = twin_logits(artefacts["tied", "int8"], [TOKENS[:200]])[0]
    assert_alike(both, expected)
    assert_alike(alone, expected[149])
    assert_alike(one, expected[0])


def test_the_embedding_is_the_mean_hidden_state(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    path = artefacts["biased", "int4"]
    engine, twin = load(path), build_student(read_variant(path))
    slot = engine.open()
    engine.step([StepEntry(slot, [1, 2])])
    for count in (1, 7, 200):
        with torch.inference_mode():
            expected = twin.hidden(torch.tensor([TOKENS[:count]]))[0].mean(0).numpy()
        assert_alike(engine.embed(TOKENS[:count]), expected)
    assert_alike(engine.step([StepEntry(slot, [3])])[0], twin_logits(path, [[1, 2, 3]])[0, -1])
    assert engine.open() == slot + 1, "it kept no slot"


def test_the_loss_is_the_twins(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    path = artefacts["tied", "int4"]
    twin, tokens = build_student(read_variant(path)), torch.tensor(TOKENS[:150])
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(twin(tokens[None, :-1])[0], tokens[1:]).item()
    assert sequence_loss(load(path), TOKENS[:150]) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([StepEntry(9, [1])], Reason.INVALID_REQUEST),
        ([StepEntry(-1, [1])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [1]), StepEntry(0, [2])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [300])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [1 << 40])], Reason.INVALID_REQUEST),
        ([StepEntry(0, [-1])], Reason.INVALID_REQUEST),
        ([StepEntry(1, [1]), StepEntry(0, [1] * 255)], Reason.CONTEXT_TOO_LONG),
    ],
)
def test_a_refused_step_changes_nothing(
    load: Load, artefacts: dict[tuple[str, str], Path], entries: list[StepEntry], reason: Reason
) -> None:
    engine = load(artefacts["tied", "int8"])
    assert [engine.open(), engine.open()] == [0, 1]
    engine.step([StepEntry(0, [1, 2]), StepEntry(1, [3])])
    with pytest.raises(EbbflowError) as caught:
        engine.step(entries)
    assert caught.value.reason is reason
    found = engine.step([StepEntry(0, [4]), StepEntry(1, [5])])
    assert_alike(found[0], twin_logits(artefacts["tied", "int8"], [[1, 2, 4]])[0, -1])
    assert_alike(found[1], twin_logits(artefacts["tied", "int8"], [[3, 5]])[0, -1])


def test_the_context_can_be_filled_to_the_last_token(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["tied", "int8"], context_tokens=70)
    slot = engine.open()
    engine.step([StepEntry(slot, TOKENS[:60])])
    found = engine.step([StepEntry(slot, TOKENS[60:70])])[0]
    assert_alike(found, twin_logits(artefacts["tied", "int8"], [TOKENS[:70]])[0, -1])
    for refused in (lambda: engine.step([StepEntry(slot, [3])]), lambda: engine.embed([1] * 71)):
        with pytest.raises(EbbflowError) as caught:
            refused()
        assert caught.value.reason is Reason.CONTEXT_TOO_LONG
    assert load(artefacts["tied", "int8"], context_tokens=1000).context_tokens == 256


def test_slots_are_unlimited_and_given_out_again(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["uneven", "int8"])
    slots = [engine.open() for _ in range(40)]
    assert slots == list(range(40))
    found = engine.step([StepEntry(slot, [slot, 1]) for slot in slots])
    expected = twin_logits(artefacts["uneven", "int8"], [[slot, 1] for slot in slots])[:, -1]
    assert_same(np.stack(found), expected)
    engine.close(7)
    with pytest.raises(EbbflowError, match="not open"):
        engine.close(7)
    assert engine.open() == 7
    assert_alike(engine.step([StepEntry(7, [4])])[0], twin_logits(artefacts["uneven", "int8"], [[4]])[0, -1])
    for slot in slots:
        engine.close(slot)
    assert engine.open() == 0


def test_no_entries_are_no_step(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    assert load(artefacts["tied", "bf16"]).step([]) == []


def test_a_prompt_needs_no_step_for_what_is_reused(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["tied", "int8"])
    first = engine.open()
    assert engine.reuse(first, TOKENS[:100]) == 0
    engine.step([StepEntry(first, TOKENS[:100])])
    second = engine.open()
    done = engine.reuse(second, TOKENS[:90])
    assert 0 <= done < 90
    found = engine.step([StepEntry(second, TOKENS[done:90])])[0]
    assert_alike(found, twin_logits(artefacts["tied", "int8"], [TOKENS[:90]])[0, -1])
    for slot, tokens in ((first, [1]), (99, [1]), (engine.open(), []), (engine.open(), [300])):
        with pytest.raises(EbbflowError) as caught:
            engine.reuse(slot, tokens)
        assert caught.value.reason is Reason.INVALID_REQUEST


def test_threads_change_between_steps_and_never_the_answer(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["tied", "int8"])
    slot = engine.open()
    most = engine.max_threads
    found = []
    for index, count in enumerate((1, most, 1, most)):
        engine.threads = count
        assert engine.threads == count
        found.append(engine.step([StepEntry(slot, TOKENS[index * 9 : index * 9 + 9], "all")])[0])
    assert_alike(np.concatenate(found), twin_logits(artefacts["tied", "int8"], [TOKENS[:36]])[0])
    for count in (0, -1, most + 1):
        with pytest.raises(EbbflowError) as caught:
            engine.threads = count
        assert caught.value.reason is Reason.CONFIG_INVALID
    engine.threads = 1


def test_what_it_offers_begins_with_no_better_than_its_artefact(
    load: Load, artefacts: dict[tuple[str, str], Path]
) -> None:
    for index, precision in enumerate(PRECISIONS):
        engine = load(artefacts["uneven", precision])
        assert engine.precision == precision
        assert engine.offered in {PRECISIONS[index:], (precision,)}
        assert (engine.reason == "") == (engine.name == "native")
        with pytest.raises(EbbflowError) as caught:
            engine.prepare("int2")
        assert caught.value.reason is Reason.INVALID_REQUEST


def test_replaced_weights_compute_what_their_artefact_says(
    load: Load, artefacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    config = dataclasses.replace(SHAPES["biased"], eos_token_id=5)
    other = write_artefact(tmp_path / "other", config, "int8", seed=9)
    engine = load(artefacts["biased", "int8"])
    slot = engine.open()
    engine.step([StepEntry(slot, TOKENS[:70])])
    with pytest.raises(EbbflowError) as caught:
        engine.replace(other)
    assert caught.value.reason is Reason.STATE_CONFLICT
    engine.close(slot)
    engine.replace(other)
    assert engine.config == config
    slot = engine.open()
    done = engine.reuse(slot, TOKENS[:70])
    assert done == 0, "nothing of the old release is reused"
    assert_alike(engine.step([StepEntry(slot, TOKENS[:70], "all")])[0], twin_logits(other, [TOKENS[:70]])[0])


@pytest.mark.parametrize("case", ["shape", "precision", "kept", "missing", "torn", "scale"])
def test_what_cannot_replace_changes_nothing(
    load: Load, artefacts: dict[tuple[str, str], Path], tmp_path: Path, case: str
) -> None:
    path = tmp_path / "other"
    reason = Reason.FILE_CORRUPT
    if case == "shape":
        path, reason = artefacts["tied", "int8"], Reason.INVALID_REQUEST
    elif case == "precision":
        path, reason = artefacts["biased", "int4"], Reason.INVALID_REQUEST
    elif case == "kept":
        path, reason = write_artefact(path, SHAPES["biased"], "int8", keep=["lm_head.*"]), Reason.INVALID_REQUEST
    elif case == "torn":
        path.write_bytes(artefacts["biased", "int8"].read_bytes()[:-3])
    elif case == "scale":  # the very last number is not one: whatever comes before must not be packed yet
        shutil.copy(artefacts["biased", "int8"], path)
        content = bytearray(path.read_bytes())
        content[-2:] = b"\xff\x7f"
        path.write_bytes(content)
    engine = load(artefacts["biased", "int8"])
    with pytest.raises(EbbflowError) as caught:
        engine.replace(path)
    assert caught.value.reason is reason
    found = engine.step([StepEntry(engine.open(), TOKENS[:9], "all")])[0]
    assert_alike(found, twin_logits(artefacts["biased", "int8"], [TOKENS[:9]])[0])


def test_memory_is_counted_and_given_back(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["tied", "int8"])
    before = engine.memory()
    assert before.weights_bytes >= artefacts["tied", "int8"].stat().st_size * 0.8
    slot = engine.open()
    engine.step([StepEntry(slot, TOKENS[:33])])
    during = engine.memory()
    assert 0 < during.cache_used_bytes <= during.cache_bytes
    engine.step([StepEntry(slot, TOKENS[33:200])])
    assert engine.memory().cache_used_bytes > during.cache_used_bytes
    engine.close(slot)
    assert engine.memory().cache_used_bytes == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_above_the_limit_are_not_loaded(
    load: Load, artefacts: dict[tuple[str, str], Path], precision: Precision
) -> None:
    weights_bytes = load(artefacts["tied", precision]).memory().weights_bytes
    with pytest.raises(EbbflowError) as caught:
        load(artefacts["tied", precision], memory_limit_bytes=weights_bytes - 1)
    assert caught.value.reason is Reason.OUT_OF_MEMORY


def test_a_cache_above_the_limit_is_refused_and_the_others_go_on(
    load: Load, artefacts: dict[tuple[str, str], Path]
) -> None:
    path = artefacts["tied", "int8"]
    # What an engine needs beside its cache is its own business; this finds the least that it runs with.
    limit, engine, first = 100_000, None, -1
    while engine is None:
        limit += 10_000
        with contextlib.suppress(EbbflowError):
            small = load(path, memory_limit_bytes=limit)
            first = small.open()
            small.step([StepEntry(first, TOKENS[:30])])
            engine = small
    with pytest.raises(EbbflowError) as caught:
        engine.step([StepEntry(engine.open(), TOKENS[:200])])
    assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert_alike(engine.step([StepEntry(first, [TOKENS[30]])])[0], twin_logits(path, [TOKENS[:31]])[0, -1])


def test_an_engine_that_is_shut_down_holds_nothing(load: Load, artefacts: dict[tuple[str, str], Path]) -> None:
    engine = load(artefacts["tied", "int8"])
    engine.step([StepEntry(engine.open(), TOKENS[:50])])
    engine.shutdown()
    held = engine.memory()
    assert (held.weights_bytes, held.cache_bytes, held.cache_used_bytes) == (0, 0, 0)
    engine.shutdown()
