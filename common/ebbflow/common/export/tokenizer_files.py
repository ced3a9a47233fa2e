"""The tokenizer of an exported folder, as transformers reads it."""

import json
from pathlib import Path
from typing import Any

from ebbflow.common.export import chat
from ebbflow.common.export.source import Source
from ebbflow.common.files import write_atomic


def write_tokenizer(source: Source, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json: a text begins as agents begin it, a chat likewise.

    Raises:
        EbbflowError: CHECKPOINT_UNREADABLE if the tokenizer cannot be read; DISK_FULL.
    """
    tokenizer = source.tokenizer
    texts = {token_id: text for text, token_id in tokenizer.vocabulary().items()}
    special = {"eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        special["bos"] = tokenizer.bos_id
    names = {f"{what}_token": texts[token_id] for what, token_id in special.items()}
    parsed = json.loads(source.tokenizer_json)
    if tokenizer.bos_id is not None:
        parsed["post_processor"] = _beginning(names["bos_token"], tokenizer.bos_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.config.max_position_embeddings,
        "chat_template": chat.template(names.get("bos_token")),
        **names,
    }
    write_json(folder / "tokenizer.json", parsed)
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: object) -> None:
    """Writes a small file of JSON.

    Raises:
        EbbflowError: DISK_FULL.
    """
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(), mode=0o644)


def _beginning(bos: str, bos_id: int) -> dict[str, Any]:
    """What `tokenizers` reads as: put this token before every text."""
    begin, first, second = ({"SpecialToken": {"id": bos, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1))
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}
