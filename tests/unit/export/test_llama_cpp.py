"""The real llama.cpp loads what is exported, cuts text as we do and answers as we do. Builds it the first time."""

import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import export_world as world
import jinja2
import pytest
import torch
from rivals import llama_cpp
from tokenizer_kinds import LINES, SPLITS, byte_level, sentence_piece

from ebbflow.common.codes.artefact import PRECISIONS, Precision
from ebbflow.common.codes.twin import load_student
from ebbflow.common.export.gguf_file import write_gguf
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.serving.chat import Message, transcript

pytestmark = pytest.mark.rivals

Released = Callable[[str], Path]
PROGRAM = Path(world.__file__).with_name("llama_cpp_program.py")
COUNT = 12
TEXTS = [
    *LINES,
    world.TEXT,
    "</s> is text",
    "a  b   c\n\n\n",
    "it's IT'S 1 12 123 1234",
    "\N{SNOWMAN}\u0301é",
    "日本",
    "x",
]


@pytest.fixture(scope="module")
def interpreter() -> Path:
    return llama_cpp.interpreter()


def ask(interpreter: Path, gguf: Path, prompts: list[list[int]], count: int = COUNT) -> dict[str, Any]:
    asked = json.dumps({"gguf": str(gguf), "texts": TEXTS, "prompts": prompts, "count": count})
    done = subprocess.run([interpreter, PROGRAM], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_llama_cpp_computes_what_devices_compute(
    interpreter: Path, released: Released, shape: str, precision: Precision, tmp_path: Path
) -> None:
    source = world.source(released(shape), precision)
    write_gguf(source, tmp_path / "faq.gguf")
    twin = load_student(released(shape) / f"{precision}.safetensors")
    ids = source.tokenizer.encode(world.TEXT, bos=True)
    found = ask(interpreter, tmp_path / "faq.gguf", [ids], 1)
    assert found["tokens"] == [source.tokenizer.encode(text, bos=True) for text in TEXTS]
    wanted = world.logits(twin, ids)
    assert (torch.tensor(found["logits"][0]) - wanted).std() < 0.02 * wanted.std()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_llama_cpp_answers_as_devices_do(
    interpreter: Path, released: Released, precision: Precision, tmp_path: Path
) -> None:
    source = world.source(released("tied"), precision)
    write_gguf(source, tmp_path / "faq.gguf")
    twin = load_student(released("tied") / f"{precision}.safetensors")
    prompts = [source.tokenizer.encode(prompt, bos=True) for prompt in world.PROMPTS]
    said = ask(interpreter, tmp_path / "faq.gguf", prompts)["said"]
    assert said == [world.greedy(twin, ids, COUNT) for ids in prompts]


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    **{name: partial(byte_level, name) for name in SPLITS},
    "sentence-piece": partial(sentence_piece, "first"),
    "sentence-piece without a blank": partial(sentence_piece, "never"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(
    interpreter: Path, released: Released, name: str, tmp_path: Path
) -> None:
    tokenizer = TOKENIZERS[name]()
    (tmp_path / "int4.safetensors").write_bytes((released("untied") / "int4.safetensors").read_bytes())
    tokenizer.save(tmp_path / "tokenizer.json")
    write_gguf(world.source(tmp_path, "int4"), tmp_path / "faq.gguf")
    found = ask(interpreter, tmp_path / "faq.gguf", [])
    assert found["tokens"] == [tokenizer.encode(text, bos=True) for text in TEXTS]
    assert [piece.strip() for piece in found["pieces"]] == [text.strip() for text in TEXTS]


def test_chats_are_put_before_the_student_as_on_a_device(interpreter: Path, released: Released, tmp_path: Path) -> None:
    write_gguf(world.source(released("tied"), "int4"), tmp_path / "faq.gguf")
    template = ask(interpreter, tmp_path / "faq.gguf", [])["metadata"]["tokenizer.chat_template"]
    messages = [Message("system", "Be brief."), Message("user", "Hi!")]
    chat = [{"role": message.role, "content": message.text} for message in messages]
    rendered = jinja2.Template(template).render(messages=chat, bos_token="<s>", add_generation_prompt=True)
    assert rendered == "<s>" + transcript(messages)
