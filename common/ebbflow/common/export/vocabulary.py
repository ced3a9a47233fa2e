"""A tokenizer.json as llama.cpp wants it: a list of tokens with their types, and merges or scores. No IO.

Two families of tokenizers can be told to llama.cpp: byte-level BPE whose splitting of text it knows by name, and BPE in
the manner of SentencePiece, which merges by the scores of tokens.
"""

import json
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ebbflow.common.errors import EbbflowError, Reason

# Names of llama.cpp (`llama_vocab::impl::load`) by the pattern that a tokenizer.json splits text with.
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
}
_BLANK = "\u2581"
_UNMERGED = -1e9
"""Score of a token that no merge makes."""


class TokenType(IntEnum):
    """GGUF's types of tokens."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF keeps of a tokenizer.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for the manner of SentencePiece.
        tokens: texts of all tokens of the student, by id.
        types: their types.
        pre: name of the splitting of text; empty for "llama".
        merges: pairs in the order of their ranks, each as "left right"; empty for "llama".
        scores: of all tokens; empty for "gpt2".
        blank_prefix: whether a text begins with a blank that it does not have.
    """

    model: str
    tokens: list[str]
    types: list[TokenType]
    pre: str = ""
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    blank_prefix: bool = False


def read(tokenizer_json: bytes, size: int) -> Vocabulary:
    """Reads a tokenizer.json for a student of `size` tokens.

    Raises:
        EbbflowError: INVALID_REQUEST if it is of a kind that llama.cpp cannot be told.
    """
    try:
        parsed = json.loads(tokenizer_json)
        return _read(parsed, size)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise _unknown("it is not a BPE tokenizer as `tokenizers` writes it") from error


def _read(parsed: dict[str, Any], size: int) -> Vocabulary:
    model = parsed["model"]
    if model.get("type", "BPE") != "BPE":
        raise _unknown(f"its model is {model['type']!r:.40}, not BPE")
    tokens, types = _tokens(parsed, size)
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(pairs)))}
        scores = [-float(ranks[token]) if token in ranks else _UNMERGED for token in tokens]
        return Vocabulary("llama", tokens, types, scores=scores, blank_prefix=_blank_prefix(parsed))
    return Vocabulary("gpt2", tokens, types, pre=_split_name(parsed), merges=[" ".join(pair) for pair in pairs])


def _tokens(parsed: dict[str, Any], size: int) -> tuple[list[str], list[TokenType]]:
    """Texts and types by id; ids without a token, and those that the student has beyond the tokenizer, are unused."""
    model = parsed["model"]
    by_id = {token_id: (text, TokenType.NORMAL) for text, token_id in model["vocab"].items()}
    if model.get("byte_fallback"):
        names = {f"<0x{byte:02X}>" for byte in range(256)}
        by_id |= {at: (text, TokenType.BYTE) for at, (text, _) in by_id.items() if text in names}
    for added in parsed.get("added_tokens") or ():
        by_id[added["id"]] = (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    if (unknown := model.get("unk_token")) is not None:
        by_id[model["vocab"][unknown]] = (unknown, TokenType.UNKNOWN)
    listed = [by_id.get(token_id, (f"[UNUSED_{token_id}]", TokenType.UNUSED)) for token_id in range(size)]
    if not all(isinstance(text, str) for text, _ in listed):
        raise TypeError("token")
    if max(by_id) >= size or len({text for text, _ in listed}) != size:
        raise _unknown("two of its tokens have the same text, or one has an id beyond the student's")
    return [text for text, _ in listed], [kind for _, kind in listed]


def _split_name(parsed: dict[str, Any]) -> str:
    """The name by which llama.cpp knows how a byte-level tokenizer splits text."""
    if (parsed.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _unknown("it changes text before splitting it")
    steps = parsed["pre_tokenizer"]
    parts = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown("it is not byte-level, or puts a blank before every text")
    if len(parts) == 1 and last.get("use_regex", True):
        return "gpt-2"
    patterns = [part["pattern"].get("Regex") for part in parts[:-1] if part["type"] == "Split"]
    if len(parts) == 2 and not last.get("use_regex", True) and patterns and patterns[0] in _SPLITS:  # noqa: PLR2004
        return _SPLITS[patterns[0]]
    raise _unknown("llama.cpp has no name for how it splits text")


def _blank_prefix(parsed: dict[str, Any]) -> bool:
    """Checks that blanks become SentencePiece's marks; returns whether one is put before every text."""
    normalizer, splitting = parsed.get("normalizer"), parsed.get("pre_tokenizer")
    if splitting is not None and normalizer is None and splitting["type"] == "Metaspace":
        if splitting.get("split", True):
            raise _unknown("it splits text at blanks before it merges")
        return bool(splitting["prepend_scheme"] != "never")
    if splitting is None and normalizer is not None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        *before, last = steps
        marks = last["type"] == "Replace" and last["pattern"].get("String") == " " and last["content"] == _BLANK
        prepends = [step["type"] == "Prepend" and step["prepend"] == _BLANK for step in before]
        if marks and len(prepends) <= 1 and all(prepends):
            return bool(prepends)
    raise _unknown("it changes text in a way that llama.cpp does not")


def _unknown(why: str) -> EbbflowError:
    message = f"the tokenizer cannot be told to llama.cpp: {why}; export with --format hf or onnx"
    return EbbflowError(Reason.INVALID_REQUEST, message, field="format")
