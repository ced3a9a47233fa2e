"""The programs in docs/how-to/export-a-release.md do what the page says."""

import re
from collections.abc import Callable
from pathlib import Path

import export_world as world
import pytest

from ebbflow.common.codes.twin import load_student
from ebbflow.common.export.hf_folder import write_hf
from ebbflow.common.export.onnx_folder import write_onnx

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "export-a-release.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=["onnxruntime", "transformers"])
def test_a_program_of_the_page_prints_the_answer_of_a_device(
    released: Callable[[str], Path],
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_onnx(world.source(released("tied"), "int8"), tmp_path / "faq-3-onnx")
    write_hf(world.source(released("tied"), "bf16"), tmp_path / "faq-3-hf")
    monkeypatch.chdir(tmp_path)
    exec(compile(program, str(PAGE), "exec"), {})
    twin, tokenizer = load_student(released("tied") / "int8.safetensors"), world.tokenizer()
    answer = tokenizer.decode(world.greedy(twin, tokenizer.encode("The tide comes", bos=True), 20))
    assert capsys.readouterr().out.strip().removeprefix("The tide comes").strip() == answer.strip()
