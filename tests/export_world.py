"""Students to export: small, and sure of what they say, so that a rounding does not change their answers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from ebbflow.common.codes.artefact import PRECISIONS, Precision, weights, write_variant
from ebbflow.common.codes.kept import choose_kept
from ebbflow.common.export.source import Source
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer

TEXT = (
    "The tide comes in twice a day, and the ferry waits for it. Tickets are sold at the kiosk beside the pier; "
    "children under six travel free. Grüße aus Kiel! 日本語 and 🦊 are welcome too. It's 12345 steps to the light."
)
PROMPTS = ("The tide comes", "Tickets are sold at", "children under six", "It's 12345")
SHAPE = StudentConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rope_theta=10_000.0,
)
SHAPES = {
    "tied": SHAPE,
    "untied": replace(SHAPE, tie_word_embeddings=False),
    "biased": replace(SHAPE, use_bias=True),
    "sensitive": replace(SHAPE, tie_word_embeddings=False),
    "narrow": replace(SHAPE, hidden_size=48, intermediate_size=64, num_attention_heads=3, num_key_value_heads=3),
}
"""Shapes by name; "narrow" has matrices that cannot be coded."""
KEEP = {"sensitive": ("lm_head.*", "model.layers.0.self_attn.*", "model.layers.1.mlp.up_proj.*")}
"""Patterns of the matrices that are kept in bfloat16, by the shape that has some."""


def tokenizer() -> Tokenizer:
    """Byte-level BPE of fewer tokens than the students have."""
    return Tokenizer.train([TEXT], SHAPE.vocab_size - 10)


def make(shape: str) -> Student:
    """A random student of a shape; the "tied" one has learnt the text by heart."""
    student = Student.random(SHAPES[shape], seed=1, std=0.1)
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return train(student) if shape == "tied" else student.requires_grad_(False)


def train(student: Student, steps: int = 60) -> Student:
    """Learns the text, beginning anywhere in it."""
    ids = tokenizer().encode(TEXT, bos=True)
    tokens_BT = torch.tensor([ids, *([ids[0], *ids[at:], *ids[1:at]] for at in (30, 60))])
    optimiser = torch.optim.AdamW(student.requires_grad_(True).parameters(), lr=1e-2)
    for _ in range(steps):
        logits_BTV = student(tokens_BT[:, :-1])
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return student.requires_grad_(False)


def write(student: Student, folder: Path, keep: Sequence[str] = ()) -> None:
    """Writes what a release of the student holds: every precision and the tokenizer."""
    kept = choose_kept(student.config, keep)
    tensors = {name: tensor.numpy() for name, tensor in student.state_dict().items()}
    for precision in PRECISIONS:
        write_variant(folder / f"{precision}.safetensors", tensors, student.config, precision, kept_bf16=kept)
    tokenizer().save(folder / "tokenizer.json")


def source(folder: Path, precision: Precision) -> Source:
    """What is exported of a folder that `write` filled."""
    return Source.read(folder / f"{precision}.safetensors", folder / "tokenizer.json", "faq/3")


def plain(path: Path) -> Student:
    """The student of an artefact's numbers, without any rounding of what they are multiplied with."""
    from ebbflow.common.codes.artefact import read_variant

    student = Student.empty(read_variant(path).config)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in weights(path).items()}
    student.load_state_dict(tensors, assign=True)
    return student.requires_grad_(False).eval()


def logits(student: Student, token_ids: list[int]) -> torch.Tensor:
    """Logits behind each token, [T, V]."""
    answer: torch.Tensor = student(torch.tensor([token_ids]))[0]
    return answer


def greedy(student: Student, token_ids: list[int], count: int) -> list[int]:
    """The most likely continuation."""
    ids = list(token_ids)
    for _ in range(count):
        ids.append(int(logits(student, ids)[-1].argmax()))
    return ids[len(token_ids) :]
