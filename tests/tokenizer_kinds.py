"""Tokenizers in the manners that teachers bring, trained on a few lines."""

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from ebbflow.common.student.tokens import Tokenizer

LINES = [
    "The tide comes in twice a day, and it's the ferry that waits for it.",
    "Grüße aus Kiel! 日本語 and 🦊 are welcome.\n\n  def f(x):\r\n\treturn x ** 12345  \n",
    "The theatre, there, then; WE'LL see what they'd say in 2026.",
]
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {
    "gpt-2": "",
    "llama-bpe": rf"{_HEAD}|\p{{N}}{{1,3}}|{_TAIL}",
    "qwen2": rf"{_HEAD}|\p{{N}}|{_TAIL}",
}
"""Patterns by the names of llama.cpp, as the published tokenizers have them; GPT-2's is built in."""


def byte_level(name: str) -> Tokenizer:
    """Byte-level BPE that splits text as a well-known model does."""
    backend = Backend(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not SPLITS[name])
    if SPLITS[name]:
        split = pre_tokenizers.Split(Regex(SPLITS[name]), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    else:
        backend.pre_tokenizer = bytes_
    backend.decoder = decoders.ByteLevel()
    _train(backend, ["<pad>", "<s>", "</s>"], sorted(pre_tokenizers.ByteLevel.alphabet()), 330)
    return Tokenizer(backend)


def sentence_piece(prepend: str) -> Tokenizer:
    """BPE with marks for blanks and tokens for bytes; `prepend` as Metaspace takes it ("first", "never")."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    blank = "" if prepend == "never" else " "
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(blank or " ", 1, 0)]
        if blank
        else [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(backend, ["<unk>", "<s>", "</s>"], [], 140, bytes_)
    return Tokenizer(backend)


def _train(
    backend: Backend, special: list[str], alphabet: list[str], size: int, bytes_: list[str] | None = None
) -> None:
    import json

    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=8
    )
    backend.train_from_iterator(LINES, trainer)
    if bytes_:  # the trainer makes none
        parsed = json.loads(backend.to_str())
        vocab = parsed["model"]["vocab"]
        vocab |= {text: len(vocab) + at for at, text in enumerate(bytes_)}
        backend.__setstate__(json.dumps(parsed).encode())
