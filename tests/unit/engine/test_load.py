"""Choosing an engine."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ebbflow.common.codes.artefact import write_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
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


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artefact") / "weights"
    student = Student.random(CONFIG, seed=3, std=0.2)
    write_variant(path, {name: tensor.numpy() for name, tensor in student.state_dict().items()}, CONFIG, "int4")
    return path


@pytest.mark.parametrize("prefer", ["auto", "torch"])
def test_the_torch_engine_serves_where_torch_is(artefact: Path, prefer: Any) -> None:
    engine = load_engine(artefact, prefer, threads=1, context_tokens=16, memory_limit_bytes=1 << 20)
    assert (engine.name, engine.precision, engine.context_tokens) == ("torch", "int4", 16)


def test_an_unknown_engine_is_refused(artefact: Path) -> None:
    with pytest.raises(EbbflowError, match="abacus") as caught:
        load_engine(artefact, cast("Any", "abacus"))
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_without_torch_the_missing_extra_is_named(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(EbbflowError, match="edge-torch") as caught:
        load_engine(artefact)
    assert caught.value.reason is Reason.EXTRA_MISSING


def test_importing_the_engine_room_does_not_import_torch() -> None:
    modules = "base, load, loss"
    code = f"import sys; from ebbflow.edge.engine import {modules}; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


def test_the_loss_is_torchs_cross_entropy(artefact: Path) -> None:
    from ebbflow.common.codes.twin import load_student

    tokens = torch.randint(0, 64, (150,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(load_student(artefact)(tokens[None, :-1])[0], tokens[1:]).item()
    engine = load_engine(artefact)
    assert sequence_loss(engine, tokens.tolist()) == pytest.approx(expected, abs=1e-5)
    assert engine.open() == 0, "the slot is closed again"


def test_the_loss_of_one_token_is_refused(artefact: Path) -> None:
    with pytest.raises(EbbflowError, match="two tokens"):
        sequence_loss(load_engine(artefact), [1])
