"""ONNX, for ONNX Runtime and what reads its files: the student with its keys and values as inputs and outputs."""

from pathlib import Path
from typing import Any

from ebbflow.common.export.onnx_decoder import Decoder, Matrices
from ebbflow.common.export.onnx_graph import DATA_ENDING, Graph
from ebbflow.common.export.onnx_matrices import CodedMatrices
from ebbflow.common.export.source import Source, staged
from ebbflow.common.export.tokenizer_files import write_json, write_tokenizer

MODEL = "model.onnx"


def write_onnx(source: Source, out: Path, matrices: Matrices | None = None) -> None:
    """Writes a folder: the graph, its weights, the tokenizer, and what ONNX Runtime GenAI wants to know of them.

    Args:
        source: the release.
        out: the folder; must not exist.
        matrices: how matrices are kept; the release's codes by default.

    Raises:
        EbbflowError: FILE_CORRUPT if the weights hold numbers that no code stands for; CHECKPOINT_UNREADABLE if the
            tokenizer cannot be read; ALREADY_EXISTS, DISK_FULL.
    """
    with staged(out) as folder:
        folder.mkdir()
        write_json(folder / "config.json", source.config.to_hf())
        write_json(folder / "genai_config.json", genai_config(source))
        write_tokenizer(source, folder)
        with (folder / (MODEL + DATA_ENDING)).open("wb") as data:
            graph = Graph(data, MODEL + DATA_ENDING)
            Decoder(graph, source.config, matrices or CodedMatrices(source.variant)).build()
            graph.save(folder / MODEL, source.name)


def genai_config(source: Source) -> dict[str, Any]:
    """Returns the content of a genai_config.json: the names of inputs and outputs, and greedy search."""
    config, tokenizer = source.config, source.tokenizer
    layer = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    decoder = {
        "filename": MODEL,
        "session_options": {},
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
            **{f"past_{part}_names": name for part, name in layer.items()},
        },
        "outputs": {
            "logits": "logits",
            **{f"present_{part}_names": f"present.%d.{part}" for part in layer},
        },
    }
    model = {
        "type": "ernie4_5",
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "bos_token_id": tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "decoder": decoder,
    }
    search = {"max_length": config.max_position_embeddings, "past_present_share_buffer": False, "do_sample": False}
    return {"model": model, "search": search}
