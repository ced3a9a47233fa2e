"""A teacher and the student that was distilled from it, both real and small enough to train on the spot."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from escalation.facts import World
from torch.nn import functional

from ebbflow.cloud.distillation.corpus import Text
from ebbflow.cloud.distillation.mixture import Documents, Sequences, encode_documents
from ebbflow.cloud.distillation.recipe import Recipe
from ebbflow.cloud.distillation.trainer import Trainer
from ebbflow.cloud.teacher.model import Teacher
from ebbflow.common.codes.artefact import write_variant
from ebbflow.common.student.config import StudentConfig
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer

BATCH = 16
LEARNING_RATE = 3e-3
LENGTH = 64
CONTEXT = 128
PROBE_TEXTS = 8
PROBE_TOKENS = 128


@dataclass(frozen=True)
class Pair:
    """What a device and its cloud have."""

    teacher: Teacher
    weights: Path
    """The student's int8 artefact."""
    tokenizer: Tokenizer
    held_out: list[list[int]]
    """Texts that neither has read: as many as a release's probe holds, and then more to measure with."""


def train(world: World, folder: Path, *, teacher_steps: int, student_steps: int) -> Pair:
    """Trains the teacher on every fact alike, and distils it into a student on texts as users ask."""
    texts = world.texts(2000)
    tokenizer = Tokenizer.train(texts, 900)
    teacher = _teacher(world.lessons(2000), tokenizer, folder / "teacher", teacher_steps)
    weights = folder / "student.int8.safetensors"
    _distil(teacher, texts, weights, student_steps)
    held_out = [ids[:PROBE_TOKENS] for ids in encode_documents(tokenizer, world.texts(10 * PROBE_TEXTS))]
    return Pair(teacher, weights, tokenizer, held_out)


def _teacher(texts: list[str], tokenizer: Tokenizer, folder: Path, steps: int) -> Teacher:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    stream_N = torch.tensor([token for ids in encode_documents(tokenizer, texts) for token in ids])
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(steps):
        share = min((step + 1) / 50, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * share
        start_B1 = torch.randint(len(stream_N) - LENGTH - 1, (BATCH, 1))
        tokens_BT = stream_N[start_B1 + torch.arange(LENGTH + 1)]
        logits_BTV = model(tokens_BT[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    return Teacher.load(str(folder), "float32")


def _distil(teacher: Teacher, texts: list[str], weights: Path, steps: int) -> None:
    tokenizer = teacher.tokenizer
    config = StudentConfig(
        vocab_size=tokenizer.size,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    student = Student.random(config, seed=0).requires_grad_(True).train()
    recipe = Recipe(
        steps=steps,
        batch_size=BATCH,
        sequence_length=LENGTH,
        learning_rate=LEARNING_RATE,
        warmup_steps=50,
        kl_weight=0.7,
    )
    documents = Documents.encode([Text("facts", text, "train") for text in texts], tokenizer)
    sequences = Sequences(documents, {}, length=LENGTH, count=recipe.sequences, seed=0)
    Trainer(student, sequences, recipe, teacher).run(lambda _: None)
    tensors = student.state_dict()
    arrays = {name: tensors[name].detach().float().numpy() for name in config.tensor_shapes()}
    write_variant(weights, arrays, config, "int8")
