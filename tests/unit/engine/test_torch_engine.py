"""What only the torch engine does: its memory is one tensor for all slots. The rest is in tests/contract."""

from pathlib import Path

import numpy as np
import pytest
from engine_support import assert_alike, twin_logits, write_artefact

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.edge.engine.base import StepEntry
from ebbflow.edge.engine.torch_engine import TorchEngine

CONFIG = StudentConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=96,
    tie_word_embeddings=False,
)
WEIGHTS_BYTES = CONFIG.parameters * 4


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artefact(tmp_path_factory.mktemp("artefact") / "weights", CONFIG, "int8")


def test_many_single_tokens_with_holes_between_their_slots(artefact: Path) -> None:
    engine = TorchEngine(artefact)
    slots = [engine.open() for _ in range(6)]
    prompts = [[n + 1] * (3 * n + 2) for n in range(6)]
    engine.step([StepEntry(slot, prompt) for slot, prompt in zip(slots, prompts, strict=True)])
    chosen = [5, 0, 3]
    results = engine.step([StepEntry(slots[n], [7]) for n in chosen])
    for n, result in zip(chosen, results, strict=True):
        assert_alike(result, twin_logits(artefact, [[*prompts[n], 7]])[0, -1])


def test_a_cache_above_the_memory_limit_is_refused_and_the_others_go_on(artefact: Path) -> None:
    token_bytes = 2 * (CONFIG.num_hidden_layers + 1) * CONFIG.key_width * 4
    engine = TorchEngine(artefact, memory_limit_bytes=WEIGHTS_BYTES + 2 * 20 * token_bytes)
    first, second, third = engine.open(), engine.open(), engine.open()
    engine.step([StepEntry(first, [1] * 18), StepEntry(second, [2])])
    for entry in (StepEntry(third, [3]), StepEntry(second, [2] * 20)):
        with pytest.raises(EbbflowError) as caught:
            engine.step([entry])
        assert caught.value.reason is Reason.OUT_OF_MEMORY
    assert_alike(engine.step([StepEntry(first, [4])])[0], twin_logits(artefact, [[1] * 18 + [4]])[0, -1])


def test_rounded_keys_and_values_are_what_it_keeps(artefact: Path) -> None:
    engine = TorchEngine(artefact, kv_cache="int8")
    engine.step([StepEntry(engine.open(), list(range(20)))])
    kept_KSD = engine._slots.keys_LRKSD[0][0, :, :20].numpy()
    codes_KSD = kept_KSD / (np.abs(kept_KSD).max(axis=-1, keepdims=True) / 127)
    np.testing.assert_allclose(codes_KSD, np.rint(codes_KSD), atol=1e-3)


def test_it_switches_to_nothing(artefact: Path) -> None:
    engine = TorchEngine(artefact, precision="int4", reason="a test asked for it")
    assert (engine.offered, engine.reason) == (("int4",), "a test asked for it")
    with pytest.raises(EbbflowError, match="int4 only") as caught:
        engine.prepare("int8")
    assert caught.value.reason is Reason.INVALID_REQUEST
