"""GGUF, for llama.cpp: the same codes as blocks of Q8_0 or Q4_0, other matrices as BF16, vectors as float32.

Names and keys are those of llama.cpp's `ernie4_5` (src/models/ernie4-5.cpp), which turns neighbouring pairs as the
student does, so that no rows change places. It knows no biases in the feed-forward layers; a student that has them is
written as `llama`, which computes the same and knows them.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ebbflow.common.codes import artefact, quantise
from ebbflow.common.codes.container import Array
from ebbflow.common.export import chat, vocabulary
from ebbflow.common.export.gguf_blocks import q4_0, q8_0
from ebbflow.common.export.source import Source, bf16_bits, staged

_FILE_TYPES = {"bf16": 32, "int8": 7, "int4": 2}
_QUANTISATION_VERSION = 2
_PIECES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(name: str) -> str:
    """Returns llama.cpp's name of a tensor by its Hugging Face name."""
    stem, _, part = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{part}"
    _, _, layer, piece = stem.split(".", 3)
    return f"blk.{layer}.{_PIECES[piece]}.{part}"


def write_gguf(source: Source, out: Path) -> None:
    """Writes one file that llama.cpp loads, tensor by tensor.

    Args:
        source: the release.
        out: the file; must not exist.

    Raises:
        EbbflowError: INVALID_REQUEST if the tokenizer is of a kind that llama.cpp cannot be told; FILE_CORRUPT if the
            weights hold numbers that no code stands for; ALREADY_EXISTS, DISK_FULL.
    """
    from gguf import GGUFWriter

    config = source.config
    words = vocabulary.read(source.tokenizer_json, config.vocab_size)
    arch = "llama" if config.use_bias else "ernie4_5"
    with staged(out) as path, closing(GGUFWriter(path, arch)) as writer:
        _add_shape(writer, source)
        _add_tokenizer(writer, source, words)
        for name, shape in config.tensor_shapes().items():
            _describe(writer, tensor_name(name), shape, _kind(source.variant, name, shape))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in config.tensor_shapes():
            writer.write_tensor_data(_data(source.variant, name))


def _add_shape(writer: Any, source: Source) -> None:
    config = source.config
    writer.add_type("model")
    writer.add_name(source.name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(_FILE_TYPES[source.variant.precision])
    writer.add_quantization_version(_QUANTISATION_VERSION)


def _add_tokenizer(writer: Any, source: Source, words: vocabulary.Vocabulary) -> None:
    tokenizer = source.tokenizer
    writer.add_tokenizer_model(words.model)
    writer.add_token_list(words.tokens)
    writer.add_token_types([int(kind) for kind in words.types])
    if words.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.blank_prefix)
    else:
        writer.add_tokenizer_pre(words.pre)
        writer.add_token_merges(words.merges)
    bos_id = tokenizer.bos_id
    if bos_id is not None:
        writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(bos_id is not None)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat.template(None if bos_id is None else words.tokens[bos_id]))


def _kind(variant: artefact.Variant, name: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 1:  # llama.cpp computes norms and adds biases in float32 only
        return "F32"
    if not variant.is_coded(name):
        return "BF16"
    return "Q8_0" if variant.precision == "int8" else "Q4_0"


def _describe(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Announces a tensor. The library takes shapes in bytes for everything but float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    of = GGMLQuantizationType[kind]
    block_weights, block_bytes = GGML_QUANT_SIZES[of]
    row_bytes = shape[-1] // block_weights * block_bytes
    if kind == "F32":
        writer.add_tensor_info(name, shape, np.dtype(np.float32), row_bytes)
    else:
        writer.add_tensor_info(name, (*shape[:-1], row_bytes), np.dtype(np.uint8), shape[0] * row_bytes, of)


def _data(variant: artefact.Variant, name: str) -> Array:
    shape = variant.config.tensor_shapes()[name]
    kind = _kind(variant, name, shape)
    if kind == "F32":
        return variant.weight(name)
    if kind == "BF16":
        return bf16_bits(variant, name).view(np.uint8)
    return np.concatenate(list(_blocks(variant, name, shape)))


def _blocks(variant: artefact.Variant, name: str, shape: tuple[int, ...]) -> Iterator[quantise.UInt8]:
    encode = q8_0 if variant.precision == "int8" else q4_0
    return (encode(*variant.codes(name, begin, end)) for begin, end in artefact.blocks(shape))
