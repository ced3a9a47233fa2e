"""The demo's teacher: a small ERNIE-4.5 mixture of experts, trained on the spot, kept as a `transformers` folder."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 2_048
BATCH = 8
SEQUENCE = 96
PEAK_LEARNING_RATE = 3e-3


def config(vocabulary_size: int) -> Ernie4_5_MoeConfig:
    """The teacher's shape: the model case's parts, at a size that two cores train in a minute."""
    return Ernie4_5_MoeConfig(
        vocab_size=vocabulary_size,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        moe_intermediate_size=160,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )


def train(
    texts: Sequence[str], folder: Path, *, steps: int, seed: int, report: Callable[[int, float], None] = lambda *_: None
) -> dict[str, float]:
    """Trains a teacher on the texts and saves it with its tokenizer.

    Args:
        texts: Training texts.
        folder: Where the checkpoint goes.
        steps: Optimiser steps of `BATCH` sequences of `SEQUENCE` tokens.
        seed: Seed of the weights and of the order.
        report: Called with step and loss in nats per token.

    Returns:
        `loss` of the last steps in nats per token, `parameters`, and `seconds`.
    """
    begin = time.monotonic()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    stream_N = torch.tensor([token for text in texts for token in [1, *tokenizer.encode(text), 2]])
    model = Ernie4_5_MoeForCausalLM(config(len(tokenizer)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    loss = math.inf
    for step in range(steps):
        share = (step + 1) / max(1, steps // 20)
        rate = min(share, 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * rate
        start_B1 = torch.randint(len(stream_N) - SEQUENCE - 1, (BATCH, 1))
        tokens_BT = stream_N[start_B1 + torch.arange(SEQUENCE + 1)]
        logits_BTV = model(tokens_BT[:, :-1], use_cache=False).logits
        mean = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        mean.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        loss = mean.item() if math.isinf(loss) else 0.95 * loss + 0.05 * mean.item()
        report(step + 1, loss)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    return {"loss": loss, "parameters": float(parameters), "seconds": time.monotonic() - begin}
