"""What only the native engine does: shared beginnings, switching beside running sequences, memory."""

import gc
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import SHAPES, assert_alike, twin_logits, write_artefact

from ebbflow.common.codes.artefact import read_variant
from ebbflow.common.codes.twin import build_student
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.model import KVCache, rotation
from ebbflow.edge.engine.base import Logits, StepEntry
from ebbflow.edge.engine.library import find_library
from ebbflow.edge.engine.native_engine import NativeEngine
from ebbflow.edge.engine.session import buffer_bytes, frequencies

CONFIG = SHAPES["tied"]
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 250).tolist()


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artefact(tmp_path_factory.mktemp("artefact") / "weights", CONFIG, "int8")


def native(path: Path, **options: Any) -> NativeEngine:
    library = find_library()
    assert library is not None, "no kernels: run `make native`"
    return NativeEngine(library, path, **{"threads": 1, **options})


@pytest.fixture
def engine(artefact: Path) -> Iterator[NativeEngine]:
    with native(artefact) as engine:
        yield engine


def run(engine: NativeEngine, tokens: list[int]) -> tuple[int, int, Logits]:
    """Runs a prompt in a slot of its own; returns the slot, what was reused, and the last logits."""
    slot = engine.open()
    reused = engine.reuse(slot, tokens)
    return slot, reused, engine.step([StepEntry(slot, tokens[reused:])])[0]


def test_a_shared_beginning_is_computed_once_and_gives_the_same(engine: NativeEngine) -> None:
    first, reused, expected = run(engine, TOKENS[:100])
    assert reused == 0
    second, reused, found = run(engine, TOKENS[:100])
    assert reused == 96
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.std(expected)))
    engine.close(first)
    engine.close(second)
    _, reused, found = run(engine, TOKENS[:100])
    assert reused == 96, "it outlives the sequences"
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.std(expected)))
    memory = engine.memory()
    assert (memory.prefix_hits_tokens, memory.prefix_asked_tokens) == (192, 300)


def test_forgotten_prompts_are_nobodys_beginning_not_even_those_that_still_run(engine: NativeEngine) -> None:
    ended, _, _ = run(engine, TOKENS[:100])
    engine.close(ended)
    running, _, expected = run(engine, [*TOKENS[:64], *TOKENS[100:120]])
    waiting = engine.open()
    engine.forget_prompts()
    assert engine.reuse(waiting, TOKENS[:100]) == 0
    engine.step([StepEntry(running, TOKENS[120:160])])
    later, reused, found = run(engine, [*TOKENS[:64], *TOKENS[100:120]])
    assert reused == 0
    assert_alike(found, expected)
    for slot in (running, waiting):
        engine.close(slot)
    other, reused, _ = run(engine, [*TOKENS[:64], *TOKENS[100:160]])
    assert reused == 64, "of the one that was asked afterwards"
    for slot in (later, other):
        engine.close(slot)
    assert engine.memory().cache_bytes > 0
    engine.forget_prompts()
    assert engine.memory().cache_bytes == 0


def test_what_shares_a_beginning_goes_its_own_way(engine: NativeEngine, artefact: Path) -> None:
    run(engine, TOKENS[:80])
    other = [*TOKENS[:64], *TOKENS[100:150]]
    _, reused, found = run(engine, other)
    assert reused == 64
    assert_alike(found, twin_logits(artefact, [other])[0, -1])


def test_shared_pages_are_counted_once(engine: NativeEngine) -> None:
    run(engine, TOKENS[:100])
    alone = engine.memory().cache_used_bytes
    run(engine, TOKENS[:100])
    assert engine.memory().cache_used_bytes == alone * 5 // 4


def test_the_prefix_cache_stays_within_its_bytes(artefact: Path) -> None:
    with native(artefact) as probe:
        probe.close(run(probe, TOKENS[:32])[0])
        page_bytes = probe.memory().cache_bytes
    assert page_bytes > 0
    with native(artefact, prefix_cache_bytes=2 * page_bytes) as engine:
        slots = [run(engine, TOKENS[begin : begin + 40])[0] for begin in range(0, 200, 40)]
        for slot in slots:
            engine.close(slot)
        assert engine.memory().cache_bytes == 2 * page_bytes
    with native(artefact, prefix_cache_bytes=0) as engine:
        engine.close(run(engine, TOKENS[:100])[0])
        assert engine.memory().cache_bytes == 0


def test_sequences_that_run_carry_on_over_a_switch(engine: NativeEngine, artefact: Path) -> None:
    slot, _, _ = run(engine, TOKENS[:40])
    engine.switch(engine.prepare("int4"))
    assert (engine.precision, engine.offered) == ("int4", ("int8", "int4"))
    found = engine.step([StepEntry(slot, TOKENS[40:60])])[0]
    # Keys and values of the one, weights of the other.
    variant, cache = read_variant(artefact), KVCache(CONFIG, 1, 60)
    with torch.inference_mode():
        build_student(variant, "int8")(torch.tensor([TOKENS[:40]]), cache)
        expected = build_student(variant, "int4")(torch.tensor([TOKENS[40:60]]), cache)[0, -1].numpy()
    assert_alike(found, expected)


@pytest.mark.parametrize("order", [("int4",), ("int4", "int8"), ("int8",)])
def test_new_sequences_after_a_switch_know_nothing_of_the_other_precision(
    engine: NativeEngine, artefact: Path, order: tuple[str, ...]
) -> None:
    old, _, _ = run(engine, TOKENS[:70])
    waiting = engine.open()
    for precision in order:
        engine.switch(engine.prepare(precision))
    engine.step([StepEntry(old, TOKENS[70:140])])
    engine.close(old)
    expected = twin_logits(artefact, [TOKENS[:140]], engine.precision)[0, -1]
    for slot in (waiting, engine.open()):
        reused = engine.reuse(slot, TOKENS[:140])
        assert reused in ((64, 128) if order[-1] == "int8" else (0, 128))
        assert_alike(engine.step([StepEntry(slot, TOKENS[reused:140])])[0], expected)


def test_steps_go_on_while_another_precision_is_prepared(engine: NativeEngine, artefact: Path) -> None:
    slot, _, _ = run(engine, TOKENS[:10])
    ready, stop = [engine.prepare("int4")], threading.Event()

    def prepare() -> None:
        while not stop.is_set():
            ready.append(engine.prepare("int4"))
            ready.pop(0).discard()

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        found = [engine.step([StepEntry(slot, [token])])[0] for token in TOKENS[10:200]]
    finally:
        stop.set()
        thread.join()
    assert_alike(np.stack(found), twin_logits(artefact, [TOKENS[:200]])[0, 10:])
    engine.switch(ready[0])
    assert_alike(run(engine, TOKENS[:50])[2], twin_logits(artefact, [TOKENS[:50]], "int4")[0, -1])


def test_prepared_weights_serve_once_and_for_their_release_only(
    engine: NativeEngine, artefact: Path, tmp_path: Path
) -> None:
    used, discarded, stale = (engine.prepare("int4") for _ in range(3))
    engine.switch(used)
    discarded.discard()
    engine.replace(write_artefact(tmp_path / "other", CONFIG, "int8", seed=5))
    with native(artefact) as other:
        foreign = other.prepare("int4")
        for prepared in (used, discarded, stale, foreign):
            with pytest.raises(EbbflowError) as caught:
                engine.switch(prepared)
            assert caught.value.reason is Reason.INVALID_REQUEST
            prepared.discard()


def test_prepared_weights_count_until_they_are_gone(engine: NativeEngine) -> None:
    before = engine.memory().weights_bytes
    prepared = engine.prepare("int4")
    assert engine.memory().weights_bytes == before + prepared.bytes
    prepared.discard()
    prepared.discard()
    assert engine.memory().weights_bytes == before
    engine.prepare("int4")
    gc.collect()
    assert engine.memory().weights_bytes == before, "what nobody holds is given back"
    engine.switch(engine.prepare("int4"))
    assert engine.memory().weights_bytes == prepared.bytes


def test_both_precisions_must_fit_the_limit(artefact: Path) -> None:
    with native(artefact) as probe:
        weights_bytes, small = probe.memory().weights_bytes, probe.prepare("int4")
    fixed_bytes = buffer_bytes(CONFIG, probe.max_threads)
    with native(artefact, memory_limit_bytes=weights_bytes + fixed_bytes + small.bytes // 2) as engine:
        with pytest.raises(EbbflowError) as caught:
            engine.prepare("int4")
        assert caught.value.reason is Reason.OUT_OF_MEMORY
        assert engine.memory().weights_bytes == weights_bytes
    page_bytes = probe._session.page_bytes
    limit = weights_bytes + fixed_bytes + small.bytes + 3 * page_bytes
    with native(artefact, memory_limit_bytes=limit) as engine:
        engine.close(run(engine, TOKENS[:200])[0])
        assert engine.memory().cache_bytes == 6 * page_bytes
        prepared = engine.prepare("int4")
        memory = engine.memory()
        assert memory.weights_bytes + memory.cache_bytes + fixed_bytes <= limit, "the prefix cache has made room"
        slot, _, _ = run(engine, TOKENS[:96])
        with pytest.raises(EbbflowError) as caught:
            engine.step([StepEntry(slot, TOKENS[:1])])
        assert caught.value.reason is Reason.OUT_OF_MEMORY
        engine.switch(prepared)
        engine.step([StepEntry(slot, TOKENS[:100])])


def test_the_artefact_may_be_gone_when_a_precision_is_prepared(artefact: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    shutil.copy(artefact, path)
    with native(path) as engine:
        path.unlink()
        engine.switch(engine.prepare("int4"))
        assert_alike(run(engine, TOKENS[:30])[2], twin_logits(artefact, [TOKENS[:30]], "int4")[0, -1])


def test_a_replacement_serves_the_precision_that_was_switched_to(engine: NativeEngine, tmp_path: Path) -> None:
    engine.switch(engine.prepare("int4"))
    int4 = write_artefact(tmp_path / "int4", CONFIG, "int4", seed=5)
    engine.replace(int4)
    assert (engine.precision, engine.offered) == ("int4", ("int4",))
    slot, _, found = run(engine, TOKENS[:30])
    assert_alike(found, twin_logits(int4, [TOKENS[:30]])[0, -1])
    engine.close(slot)
    bf16 = write_artefact(tmp_path / "bf16", CONFIG, "bf16", seed=6)
    engine.replace(bf16)
    assert engine.offered == ("bf16", "int8", "int4")
    assert_alike(run(engine, TOKENS[:30])[2], twin_logits(bf16, [TOKENS[:30]], "int4")[0, -1])


def test_an_engine_that_failed_half_way_refuses_until_it_is_replaced(
    engine: NativeEngine, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk has gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine._weights, "fill", fail)
        with pytest.raises(OSError, match="gone"):
            engine.replace(artefact)
    for refused in (lambda: engine.step([StepEntry(engine.open(), [1])]), lambda: engine.embed([1])):
        with pytest.raises(EbbflowError) as caught:
            refused()
        assert caught.value.reason is Reason.STATE_CONFLICT
    engine.close(0)
    engine.replace(artefact)
    assert_alike(run(engine, TOKENS[:30])[2], twin_logits(artefact, [TOKENS[:30]])[0, -1])


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def anonymous_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise AssertionError


@pytest.mark.parametrize("way", ["shutdown", "collected"])
def test_what_an_engine_took_is_given_back(tmp_path: Path, way: str) -> None:
    config = replace(CONFIG, vocab_size=60_000, hidden_size=512, intermediate_size=512)
    path = write_artefact(tmp_path / "weights", config, "int8")
    native(path, threads=3).shutdown()  # what Python and the library take once
    gc.collect()
    threads, before = threads_of_this_process(), anonymous_mib()
    engine = native(path, threads=3)
    assert threads_of_this_process() == threads + 2
    assert anonymous_mib() > before + 25
    if way == "shutdown":
        engine.shutdown()
    else:
        del engine
        gc.collect()
    assert threads_of_this_process() == threads
    assert anonymous_mib() < before + 5


def test_a_thread_count_that_cannot_be_is_refused(artefact: Path) -> None:
    for threads in (0, -3, 100_000):
        with pytest.raises(EbbflowError) as caught:
            native(artefact, threads=threads)
        assert caught.value.reason is Reason.CONFIG_INVALID
    with native(artefact, threads=None) as engine:
        assert engine.threads == engine.max_threads


def test_the_angles_are_the_students() -> None:
    cosine, sine = rotation(CONFIG, torch.tensor([1.0]))
    np.testing.assert_allclose(frequencies(CONFIG), torch.atan2(sine, cosine)[0].numpy(), rtol=1e-5)
