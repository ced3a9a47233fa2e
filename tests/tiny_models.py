"""Small real models and corpora that several tests train and load."""

import json
import random
from pathlib import Path

import torch
import transformers

from ebbflow.common.student.tokens import Tokenizer

TOPICS = {
    "sea": ["the tide comes in", "waves break on the shore", "a ship leaves the harbour", "salt dries on the rope"],
    "sky": ["clouds drift east", "the wind turns north", "stars come out at night", "rain falls on the roof"],
    "land": ["the road climbs the hill", "wheat ripens in july", "a fox crosses the field", "stones lie in the river"],
}
VOCABULARY = 320


def corpus_lines(documents_per_topic: int = 40, seed: int = 0) -> list[bytes]:
    """Lines of a corpus with the splits train, gate and bin in every topic."""
    rng = random.Random(seed)
    lines = []
    for topic, phrases in TOPICS.items():
        for number in range(documents_per_topic):
            text = " and ".join(rng.choices(phrases, k=4)) + "."
            split = "gate" if number % 8 == 7 else "bin" if number % 8 == 6 else "train"
            lines.append(json.dumps({"topic": topic, "text": text, "split": split}).encode() + b"\n")
    return lines


def tokenizer() -> Tokenizer:
    """A tokenizer trained on the phrases of all topics."""
    return Tokenizer.train([phrase for phrases in TOPICS.values() for phrase in phrases], VOCABULARY)


def save_moe_teacher(folder: Path, seed: int = 0) -> Path:
    """Writes a random ERNIE-4.5 mixture of experts with a tokenizer."""
    config = transformers.Ernie4_5_MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=32,
        moe_k=2,
        moe_num_experts=4,
        moe_num_shared_experts=1,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return _save(transformers.Ernie4_5_MoeForCausalLM, config, folder, seed)


def save_llama_teacher(folder: Path, seed: int = 0) -> Path:
    """Writes a random Llama with a tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return _save(transformers.LlamaForCausalLM, config, folder, seed)


def _save(
    kind: type[transformers.PreTrainedModel], config: transformers.PretrainedConfig, folder: Path, seed: int
) -> Path:
    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer().save(folder / "tokenizer.json")
    return folder
