"""Three ways to liken texts in the cloud: a supplied sentence encoder, the student, or shared words."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.feedback.pool import Embed
from ebbflow.cloud.registry.tables import Json
from ebbflow.common.codes.twin import load_weights
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.common.student.model import Student
from ebbflow.common.student.tokens import Tokenizer

BATCH = 32
MOST_TOKENS = 128
"""Longer texts are judged by their beginning."""

MOST_WORDS = 8_192
"""Words by which texts are likened, the most common ones: a pool's vectors then fit into 130 MB."""

_Array = npt.NDArray[np.float32]
_WORDS = re.compile(r"\w+")


def choose(
    encoder: str,
    release: Json | None,
    public: Sequence[str],
    blobs: BlobStore,
    scratch: Path,
    check: Callable[[], None] = lambda: None,
) -> Embed:
    """Returns the best measure that there is.

    Args:
        encoder: folder of a sentence encoder; empty for none.
        release: column `targets` of the student's newest release; None before its first.
        public: public texts, by which words are weighed.
        blobs: where releases are.
        scratch: for a moment's copy of the weights.
        check: called before every batch; what it raises ends the work.

    Raises:
        EbbflowError: CHECKPOINT_UNREADABLE if the encoder cannot be loaded, BLOB_NOT_FOUND, FILE_CORRUPT.
    """
    if encoder:
        return sentence_encoder(encoder, check)
    if release is not None:
        return of_release(release, blobs, scratch, check)
    return by_words(public)


def by_words(public: Sequence[str]) -> Embed:
    """Likens texts by the words that they share, weighted by how rare they are among public texts."""
    counts = Counter(word for text in public for word in sorted(set(_words(text))))
    places = {word: place for place, (word, _) in enumerate(counts.most_common(MOST_WORDS))}

    def encode(text: str) -> list[int]:
        return [places[word] for word in _words(text) if word in places]

    return Lexicon(public, encode, max(1, len(places)))


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.casefold())


def of_release(release: Json, blobs: BlobStore, scratch: Path, check: Callable[[], None]) -> Embed:
    """Likens texts by the mean of a release's last hidden states.

    Raises:
        EbbflowError: BLOB_NOT_FOUND, FILE_CORRUPT, CHECKPOINT_UNREADABLE, RELEASE_NOT_FOUND.
    """
    tokenizer = Tokenizer.from_bytes(blobs.read(_sha256(release, "tokenizer")))
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "student.safetensors"
        blobs.fetch(_sha256(release, "bf16"), path)
        student = load_weights(path).eval().requires_grad_(False)
    return of_student(student, tokenizer, check)


def of_student(student: Student, tokenizer: Tokenizer, check: Callable[[], None] = lambda: None) -> Embed:
    """Likens texts by the mean of a student's last hidden states."""
    most = min(MOST_TOKENS, student.config.max_position_embeddings)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [(ids or [tokenizer.eos_id])[:most] for ids in tokenizer.encode_batch(texts, bos=True)]

    return _in_batches(encode, lambda tokens_BT, _: student.hidden(tokens_BT), tokenizer.pad_id, check)


def sentence_encoder(folder: str, check: Callable[[], None] = lambda: None) -> Embed:
    """Likens texts by a sentence encoder of any architecture that transformers knows: the mean of its last states.

    Raises:
        EbbflowError: CHECKPOINT_UNREADABLE.
    """
    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "tokenizer.json").is_file():
        message = f"the sentence encoder {folder[:200]!r} has no config.json and tokenizer.json on this worker"
        raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, message, source=folder[:200])
    auto: Any = transformers.AutoModel
    fast: Any = transformers.PreTrainedTokenizerFast
    try:
        tokenizer = fast.from_pretrained(folder, local_files_only=True)
        model = auto.from_pretrained(folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a broken checkpoint raises anything here
        message = f"the sentence encoder {folder[:200]!r} cannot be loaded by transformers"
        raise EbbflowError(Reason.CHECKPOINT_UNREADABLE, message, source=folder[:200]) from error
    model = model.eval().requires_grad_(False)
    pad_id = tokenizer.pad_token_id or 0
    most = min(MOST_TOKENS, int(getattr(model.config, "max_position_embeddings", MOST_TOKENS)))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [(ids or [pad_id])[:most] for ids in tokenizer(list(texts))["input_ids"]]

    def states(tokens_BT: Tensor, real_BT: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens_BT, attention_mask=real_BT.long()).last_hidden_state
        return found

    return _in_batches(encode, states, pad_id, check)


def _in_batches(
    encode: Callable[[Sequence[str]], list[list[int]]],
    states: Callable[[Tensor, Tensor], Tensor],
    fill: int,
    check: Callable[[], None],
) -> Embed:
    """Returns a measure that averages the states of real tokens, batch by batch, texts of like length together."""

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> _Array:
        encoded = encode(texts)
        order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))
        rows: dict[int, _Array] = {}
        for begin in range(0, len(order), BATCH):
            check()
            chosen = order[begin : begin + BATCH]
            tokens_BT, real_BT = _pad_right([encoded[at] for at in chosen], fill)
            weight_BT1 = real_BT[:, :, None].float()
            mean_BE = (states(tokens_BT, real_BT).float() * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1)
            rows |= zip(chosen, mean_BE.numpy(), strict=True)
        return np.stack([rows[at] for at in range(len(encoded))])

    return embed


def _pad_right(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    tokens_BT = torch.full((len(rows), longest), fill, dtype=torch.int64)
    real_BT = torch.zeros((len(rows), longest), dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens_BT[row, : len(ids)] = torch.tensor(ids)
        real_BT[row, : len(ids)] = True
    return tokens_BT, real_BT


def _sha256(targets: Json, kind: str) -> str:
    for file in targets.values():
        if file["kind"] == kind:
            return str(file["sha256"])
    raise EbbflowError(Reason.RELEASE_NOT_FOUND, f"the student's newest release has no {kind}")
