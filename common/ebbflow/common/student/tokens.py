"""Tokenizers: byte-level BPE of our own, or the one a teacher brings."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SMALLEST_VOCABULARY = 3 + 256
"""Special tokens and bytes."""

# How the tokenizers of well-known models call their special tokens, where nobody says it; the first that exists counts.
_PAD_NAMES = (PAD, "<|pad|>", "[PAD]", "<unk>", "<|endoftext|>")
_BOS_NAMES = (
    BOS,
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|begin_of_sentence|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "[BOS]",
)
_EOS_NAMES = (
    EOS,
    "<eos>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_sentence|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
    "[EOS]",
)
# How tokenizers that are not byte-level write a byte of its own, and a space.
_SINGLE_BYTE = re.compile("<0x([0-9A-F]{2})>")
_SPACE_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


class Tokenizer:
    """Turns text into token ids and back.

    Text is only ever text: "</s>" in a user's prompt is four characters and never the end of the sequence.

    Attributes:
        eos_id: token that ends a text.
        bos_id: token that may begin one, or None.
        pad_id: token to fill up with; `eos_id` where the tokenizer has none of its own.
    """

    def __init__(
        self, backend: Backend, *, eos: str | None = None, bos: str | None = None, pad: str | None = None
    ) -> None:
        """Wraps a tokenizer of the `tokenizers` library.

        Args:
            backend: what to wrap.
            eos: name of the token that ends a text; None looks for a usual name.
            bos: likewise for the token that begins one.
            pad: likewise for padding.

        Raises:
            EbbflowError: CHECKPOINT_UNREADABLE if no token ends a text.
        """
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        eos_id = _first(backend, (eos,) if eos else _EOS_NAMES)
        if eos_id is None:
            raise EbbflowError(
                Reason.CHECKPOINT_UNREADABLE, "the tokenizer has no token that ends a text", field="eos_token"
            )
        self.eos_id: int = eos_id
        self.bos_id: int | None = _first(backend, (bos,) if bos else _BOS_NAMES)
        pad_id = _first(backend, (pad,) if pad else _PAD_NAMES)
        self.pad_id: int = eos_id if pad_id is None else pad_id
        added = backend.get_added_tokens_decoder().items()
        self._added = {id_: b"" if token.special else token.content.encode() for id_, token in added}
        self._byte_level = backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> Self:
        """Trains byte-level BPE: the same texts in the same order give the same tokenizer.

        Tokens 0, 1 and 2 are "<pad>", "<s>" and "</s>"; every byte has a token, so no text is unknown.

        Args:
            texts: what to learn from.
            vocabulary_size: most tokens, special ones included; few texts may give fewer.

        Raises:
            EbbflowError: INVALID_REQUEST if there is no room for every byte.
        """
        if vocabulary_size < SMALLEST_VOCABULARY:
            message = f"vocabulary_size must be at least {SMALLEST_VOCABULARY}, not {vocabulary_size}"
            raise EbbflowError(Reason.INVALID_REQUEST, message, field="vocabulary_size")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def from_bytes(cls, data: bytes, *, eos: str | None = None, bos: str | None = None, pad: str | None = None) -> Self:
        """Reads the content of a tokenizer.json.

        Raises:
            EbbflowError: CHECKPOINT_UNREADABLE if it is none, or no token ends a text.
        """
        try:
            backend = Backend.from_buffer(data)
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, "the tokenizer cannot be read") from error
        return cls(backend, eos=eos, bos=bos, pad=pad)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a tokenizer.json, and a tokenizer_config.json beside it for the names of the special tokens.

        Raises:
            EbbflowError: CHECKPOINT_UNREADABLE if either cannot be read, or no token ends a text.
        """
        try:
            data = path.read_bytes()
            return cls.from_bytes(data, **_special_names(path.with_name("tokenizer_config.json")))
        except (OSError, ValueError) as error:
            raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, f"{path} cannot be read", path=path) from error

    def to_bytes(self) -> bytes:
        """Returns the content of a tokenizer.json."""
        return str(self._backend.to_str()).encode()

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json.

        Raises:
            EbbflowError: DISK_FULL if it does not fit.
        """
        write_atomic(path, self.to_bytes(), mode=0o644)

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def vocabulary(self) -> dict[str, int]:
        """Returns the id of every token by its text, special ones included."""
        return dict(self._backend.get_vocab(with_added_tokens=True))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Returns the tokens of a text, after `bos_id` if asked and if there is one."""
        tokens: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *tokens] if bos and self.bos_id is not None else tokens

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        """Does `encode` for many texts, on all cores."""
        head = [self.bos_id] if bos and self.bos_id is not None else []
        return [head + found.ids for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, without special ones; broken UTF-8 becomes U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns a token's bytes of UTF-8, which need not be whole characters; none for special and unknown tokens."""
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._added:
            return self._added.get(token_id, b"")
        if self._byte_level:
            return bytes(_BYTES[character] for character in token if character in _BYTES)
        single = _SINGLE_BYTE.fullmatch(token)
        return bytes([int(single[1], 16)]) if single else token.replace(_SPACE_MARK, " ").encode()


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


def _first(backend: Backend, names: Iterable[str]) -> int | None:
    ids = (backend.token_to_id(name) for name in names)
    return next((found for found in ids if found is not None), None)


def _special_names(path: Path) -> dict[str, str]:
    """Names of special tokens in a tokenizer_config.json, where each is a string or an object with "content"."""
    if not path.exists():
        return {}
    config: Any = json.loads(path.read_bytes())
    if not isinstance(config, dict):
        raise ValueError("not an object")
    tokens = {field: config.get(f"{field}_token") for field in ("eos", "bos", "pad")}
    names = {field: token.get("content") if isinstance(token, dict) else token for field, token in tokens.items()}
    return {field: name for field, name in names.items() if isinstance(name, str)}
