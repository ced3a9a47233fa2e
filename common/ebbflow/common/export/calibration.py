"""Static int8 for ONNX: ranges of activations, measured on texts, and weights with a scale for each output.

Not the release's codes: integer units of phones and accelerators want one scale for a whole tensor of activations and
one for each row of weights. What that costs depends on the student; the release's own precisions cost less.
Activations are uint8 because ONNX Runtime on x86 joins no others that several matrices multiply.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnx import TensorProto

from ebbflow.common.codes import artefact
from ebbflow.common.codes.quantise import Float32, Int8
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.export.onnx_decoder import Matrices
from ebbflow.common.export.onnx_graph import Graph
from ebbflow.common.export.onnx_matrices import EMBEDDING, CodedMatrices
from ebbflow.common.export.source import Source

MOST_TEXTS = 128
MOST_TOKENS = 256
"""Of one text; what is longer is cut."""
_MOST = 127
_LEVELS = 255
_LOW, _HIGH = ".low", ".high"

Ranges = Mapping[str, tuple[float, float]]
"""Lowest and highest number of what a matrix multiplies, by its Hugging Face name."""


def read_texts(path: Path) -> list[str]:
    """Reads the texts of a corpus (JSON lines with a field "text") or of a plain file, one a line.

    Raises:
        EbbflowError: CORPUS_INVALID if it cannot be read or holds no text.
    """
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EbbflowError(Reason.CORPUS_INVALID, f"{path} cannot be read as text", path=path) from error
    texts = [text for text in map(_text, lines[:MOST_TEXTS]) if text]
    if not texts:
        raise EbbflowError(Reason.CORPUS_INVALID, f"{path} holds no text to calibrate with", path=path)
    return texts


class ObservedMatrices(CodedMatrices):
    """The release's matrices, each with the range of what it multiplies as outputs of the graph."""

    def linear(self, graph: Graph, x: str, name: str) -> str:
        """Returns x times a matrix, [B, T, O]."""
        for kind, ending in (("ReduceMin", _LOW), ("ReduceMax", _HIGH)):
            graph.output(graph.op(kind, x, keepdims=0), name + ending, TensorProto.FLOAT, ())
        return super().linear(graph, x, name)


class StaticMatrices:
    """Matrices of int8 with a scale for each output, which multiply activations of uint8 in a measured range."""

    def __init__(self, variant: artefact.Variant, ranges: Ranges) -> None:
        """Takes weights and ranges."""
        self._variant, self._ranges, self._vectors = variant, ranges, CodedMatrices(variant)

    def embed(self, graph: Graph, token_ids: str) -> str:
        """Returns rows of the embedding, [B, T, C]: int8 with a scale for each token."""
        codes_VC, scales_V = per_output(self._variant.weight(EMBEDDING))
        codes = graph.weight(EMBEDDING + ".codes.rows", TensorProto.INT8, codes_VC.shape, [codes_VC])
        scales = graph.weight(EMBEDDING + ".scales.rows", TensorProto.FLOAT, (len(scales_V), 1), [scales_V])
        numbers = graph.op("Cast", graph.op("Gather", codes, token_ids), to=TensorProto.FLOAT)
        return graph.op("Mul", numbers, graph.op("Gather", scales, token_ids))

    def linear(self, graph: Graph, x: str, name: str) -> str:
        """Returns x times a matrix, [B, T, O]."""
        scale, zero = activation_scale(*self._ranges[name])
        parameters = graph.constant(scale), graph.constant(zero, np.uint8)
        near = graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, *parameters), *parameters)
        codes_OI, scales_O = per_output(self._variant.weight(name))
        codes = graph.weight(name + ".codes", TensorProto.INT8, codes_OI.T.shape, [codes_OI.T])
        scales = graph.weight(name + ".scales", TensorProto.FLOAT, scales_O.shape, [scales_O])
        zeros = graph.weight(name + ".zeros", TensorProto.INT8, scales_O.shape, [np.zeros(scales_O.shape, np.int8)])
        return graph.op("MatMul", near, graph.op("DequantizeLinear", codes, scales, zeros, axis=1))

    def vector(self, graph: Graph, name: str) -> str:
        """Returns a norm's weight or a bias."""
        return self._vectors.vector(graph, name)


def measure(source: Source, texts: Sequence[str], scratch: Path) -> Ranges:
    """Runs texts through the student in ONNX Runtime; returns the range of what each matrix multiplies.

    Args:
        source: the release.
        texts: what to run.
        scratch: folder on a disk with room for the student.

    Raises:
        EbbflowError: CORPUS_INVALID if no text has a token; DISK_FULL.
    """
    from ebbflow.common.export.onnx_folder import MODEL, write_onnx

    with TemporaryDirectory(dir=scratch) as home:
        folder = Path(home) / "observed"
        write_onnx(source, folder, ObservedMatrices(source.variant))
        session = _session(folder / MODEL)
        names = [output.name for output in session.get_outputs() if output.name.endswith((_LOW, _HIGH))]
        runs = [dict(zip(names, session.run(names, feeds), strict=True)) for feeds in _feeds(source, texts)]
    if not runs:
        raise EbbflowError(Reason.CORPUS_INVALID, "no text to calibrate with has a token")
    matrices = [name.removesuffix(_LOW) for name in names if name.endswith(_LOW)]
    return {
        name: (float(min(run[name + _LOW] for run in runs)), float(max(run[name + _HIGH] for run in runs)))
        for name in matrices
    }


def calibrated(source: Source, texts: Sequence[str], scratch: Path) -> Matrices:
    """Returns the matrices of a static int8 model, calibrated on texts.

    Raises:
        EbbflowError: as `measure`.
    """
    return StaticMatrices(source.variant, measure(source, texts, scratch))


def per_output(weight_OI: Float32) -> tuple[Int8, Float32]:
    """Returns int8 codes [O, I] and one scale for each output [O], symmetric."""
    scales_O = np.abs(weight_OI).max(axis=1) / np.float32(_MOST)
    # Among float32's subnormals a scale is too coarse to divide by; what is so small counts as nothing.
    scales_O = np.where(scales_O >= np.finfo(np.float32).tiny, scales_O, np.float32(1.0)).astype(np.float32)
    return np.rint(weight_OI / scales_O[:, None]).astype(np.int8), scales_O


def activation_scale(low: float, high: float) -> tuple[float, int]:
    """Returns scale and zero point of uint8 numbers that reach from `low` to `high` and hold 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / _LEVELS or 1.0
    return scale, round(-low / scale)


def _text(line: str) -> str:
    try:
        parsed = json.loads(line)
    except ValueError:
        return line
    text = parsed.get("text") if isinstance(parsed, dict) else line
    return text if isinstance(text, str) else ""


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations in float32
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _feeds(source: Source, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    config, tokenizer = source.config, source.tokenizer
    nothing = np.zeros((1, config.num_key_value_heads, 0, config.head_dim), np.float32)
    past = {
        f"past_key_values.{layer}.{part}": nothing
        for layer in range(config.num_hidden_layers)
        for part in ("key", "value")
    }
    longest = min(MOST_TOKENS, config.max_position_embeddings)
    for text in texts:
        if ids := tokenizer.encode(text, bos=True)[:longest]:
            ids_BT = np.array([ids], np.int64)
            seen = {"attention_mask": np.ones_like(ids_BT), "position_ids": np.arange(len(ids))[None]}
            yield {"input_ids": ids_BT, **seen, **past}
