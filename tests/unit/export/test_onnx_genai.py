"""The real ONNX Runtime GenAI runs an exported folder as it is. Installs it the first time."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import export_world as world
import pytest
from rivals import onnx_genai

from ebbflow.common.codes.artefact import PRECISIONS, Precision
from ebbflow.common.codes.twin import load_student
from ebbflow.common.export.onnx_folder import write_onnx

pytestmark = pytest.mark.rivals

PROGRAM = Path(world.__file__).with_name("onnx_genai_program.py")
COUNT = 12


@pytest.mark.parametrize("precision", PRECISIONS)
def test_onnx_runtime_genai_answers_as_devices_do(
    released: Callable[[str], Path], precision: Precision, tmp_path: Path
) -> None:
    source = world.source(released("tied"), precision)
    write_onnx(source, tmp_path / "onnx")
    prompts = [source.tokenizer.encode(prompt, bos=True) for prompt in world.PROMPTS]
    asked = {"folder": str(tmp_path / "onnx"), "prompts": prompts, "count": COUNT, "texts": world.PROMPTS}
    command = [onnx_genai.interpreter(), PROGRAM]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    twin = load_student(released("tied") / f"{precision}.safetensors")
    assert found["said"] == [world.greedy(twin, ids, COUNT) for ids in prompts]
    assert found["tokens"] == [source.tokenizer.encode(prompt) for prompt in world.PROMPTS], "without a beginning"
