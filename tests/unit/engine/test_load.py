"""Choosing an engine."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from engine_support import assert_same, twin_logits, write_artefact

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.config import StudentConfig
from ebbflow.edge.engine import load
from ebbflow.edge.engine.base import StepEntry
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
    return write_artefact(tmp_path_factory.mktemp("artefact") / "weights", CONFIG, "int4")


@pytest.mark.parametrize(("prefer", "name"), [("auto", "native"), ("native", "native"), ("torch", "torch")])
def test_the_native_engine_serves_unless_torch_is_asked_for(artefact: Path, prefer: Any, name: str) -> None:
    engine = load_engine(artefact, prefer, threads=1, context_tokens=16, memory_limit_bytes=1 << 20)
    assert (engine.name, engine.precision, engine.context_tokens, engine.threads) == (name, "int4", 16, 1)
    assert (engine.reason == "") == (name == "native")


def test_without_kernels_torch_serves_and_says_why(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "find_library", lambda: None)
    engine = load_engine(artefact)
    assert (engine.name, engine.instruction_set) == ("torch", "")
    assert "not compiled" in engine.reason
    with pytest.raises(EbbflowError, match="C compiler") as caught:
        load_engine(artefact, "native")
    assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.mark.parametrize(
    ("change", "named"),
    [({"head_dim": 1026}, "1026 wide"), ({"hidden_size": 33}, "33 is odd"), ({"intermediate_size": 7}, "7 is odd")],
)
def test_torch_serves_a_shape_that_the_kernels_do_not_take(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write_artefact(tmp_path / "weights", dataclasses.replace(CONFIG, **change), "int8")
    engine = load_engine(path, threads=1)
    assert engine.name == "torch"
    assert named in engine.reason
    found = engine.step([StepEntry(engine.open(), [1, 2, 3], "all")])[0]
    assert_same(found, twin_logits(path, [[1, 2, 3]])[0])
    with pytest.raises(EbbflowError, match=named):
        load_engine(path, "native")


def test_an_unknown_engine_is_refused(artefact: Path) -> None:
    with pytest.raises(EbbflowError, match="abacus") as caught:
        load_engine(artefact, cast("Any", "abacus"))
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_without_torch_and_kernels_the_missing_extra_is_named(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    assert load_engine(artefact, threads=1).name == "native"
    monkeypatch.setattr(load, "find_library", lambda: None)
    with pytest.raises(EbbflowError, match="edge-torch") as caught:
        load_engine(artefact)
    assert caught.value.reason is Reason.EXTRA_MISSING


NATIVE_WORK = """
import pathlib, sys
from ebbflow.edge.engine import base, loss
from ebbflow.edge.engine.load import load_engine
with load_engine(pathlib.Path(sys.argv[1]), threads=1, precision="int4") as engine:
    engine.switch(engine.prepare("int4"))
    engine.embed([1, 2])
    print(engine.name, loss.sequence_loss(engine, [1, 2, 3]) > 0, "torch" in sys.modules)
"""


def test_the_native_engine_works_without_importing_torch(artefact: Path) -> None:
    command = [sys.executable, "-c", NATIVE_WORK, str(artefact)]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("native True False", "")


def test_the_loss_of_one_token_is_refused(artefact: Path) -> None:
    with pytest.raises(EbbflowError, match="two tokens"):
        sequence_loss(load_engine(artefact), [1])
