"""The matrices of a release in ONNX: the very codes, as the blocks of 32 of DequantizeLinear.

ONNX multiplies by [I, O], so matrices are stored turned. ONNX Runtime joins DequantizeLinear and MatMul into one
operation that makes int8 activations in groups of 32 on the fly, as our engines do, unless it is told to keep them in
float32 (`session.qdq_matmulnbits_accuracy_level`). It does so only where nothing else reads the codes: a tied
embedding is therefore in the file twice, in rows for look-ups and turned for the head.
"""

import numpy as np
from onnx import TensorProto

from ebbflow.common.codes import artefact
from ebbflow.common.codes.container import CODES, SCALES
from ebbflow.common.codes.quantise import GROUP, Int8, UInt8
from ebbflow.common.export.onnx_graph import Graph
from ebbflow.common.export.source import bf16_bits

EMBEDDING = "model.embed_tokens.weight"
_ROWS = ".rows"
"""How the names of what is looked up by rows end."""


class CodedMatrices:
    """Matrices as the artefact has them: int8 or int4 codes with scales, else bfloat16."""

    def __init__(self, variant: artefact.Variant) -> None:
        """Takes the release's weights."""
        self._variant, self._shapes = variant, variant.config.tensor_shapes()

    def embed(self, graph: Graph, token_ids: str) -> str:
        """Returns rows of the embedding, [B, T, C]."""
        shape = self._shapes[EMBEDDING]
        if not self._variant.is_coded(EMBEDDING):
            bits = graph.weight(EMBEDDING + _ROWS, TensorProto.BFLOAT16, shape, [bf16_bits(self._variant, EMBEDDING)])
            return graph.op("Cast", graph.op("Gather", bits, token_ids), to=TensorProto.FLOAT)
        for begin, end in artefact.blocks(shape):
            self._variant.codes(EMBEDDING, begin, end)  # checks what is copied as it is
        scales_VG = self._variant.scales(EMBEDDING).astype("<f4")
        scales = graph.weight(EMBEDDING + SCALES + _ROWS, TensorProto.FLOAT, scales_VG.shape, [scales_VG])
        small = self._variant.precision == "int4"
        numbers = self._small_rows(graph, token_ids) if small else self._rows(graph, token_ids)
        grouped = graph.op("Reshape", numbers, graph.constant([0, 0, -1, GROUP], np.int64))
        wide = graph.op("Unsqueeze", graph.op("Gather", scales, token_ids), graph.constant([-1], np.int64))
        return graph.op("Reshape", graph.op("Mul", grouped, wide), graph.constant([0, 0, shape[1]], np.int64))

    def linear(self, graph: Graph, x: str, name: str) -> str:
        """Returns x times a matrix, [B, T, O]."""
        rows, inputs = self._shapes[name]
        if not self._variant.is_coded(name):
            bits_IO = bf16_bits(self._variant, name).T
            turned_bits = (bits_IO[begin : begin + GROUP] for begin in range(0, inputs, GROUP))
            bits = graph.weight(name, TensorProto.BFLOAT16, (inputs, rows), turned_bits)
            return graph.op("MatMul", x, graph.op("Cast", bits, to=TensorProto.FLOAT))
        codes_OI, scales_OG = self._variant.codes(name, 0, rows)
        scales_GO = scales_OG.T.astype("<f4")
        turned = (codes_OI[:, begin : begin + GROUP].T for begin in range(0, inputs, GROUP))
        small = self._variant.precision == "int4"
        kind, blocks = (TensorProto.INT4, map(pack_int4, turned)) if small else (TensorProto.INT8, turned)
        codes = graph.weight(name + CODES, kind, (inputs, rows), blocks)
        scales = graph.weight(name + SCALES, TensorProto.FLOAT, scales_GO.shape, [scales_GO])
        weight = graph.op("DequantizeLinear", codes, scales, axis=0, block_size=GROUP)
        return graph.op("MatMul", x, weight)

    def vector(self, graph: Graph, name: str) -> str:
        """Returns a norm's weight or a bias."""
        return graph.weight(name, TensorProto.FLOAT, self._shapes[name], [self._variant.weight(name)])

    def _rows(self, graph: Graph, token_ids: str) -> str:
        """Looks int8 codes up, as float32 numbers [B, T, C]."""
        codes_VC = self._variant.tensors[EMBEDDING + CODES]
        codes = graph.weight(EMBEDDING + CODES + _ROWS, TensorProto.INT8, codes_VC.shape, [codes_VC])
        return graph.op("Cast", graph.op("Gather", codes, token_ids), to=TensorProto.FLOAT)

    def _small_rows(self, graph: Graph, token_ids: str) -> str:
        """Looks int4 codes up, as float32 numbers [B, T, C]: as bytes of two, because Gather takes no INT4."""
        packed = self._variant.tensors[EMBEDDING + CODES]
        pairs = graph.weight(EMBEDDING + CODES + _ROWS, TensorProto.UINT8, packed.shape, [packed])
        rows = graph.op("Gather", pairs, token_ids)
        low = graph.op("BitwiseAnd", rows, graph.constant(0x0F, np.uint8))
        high = graph.op("BitShift", rows, graph.constant(4, np.uint8), direction="RIGHT")
        last = graph.constant([-1], np.int64)
        both = graph.op("Concat", graph.op("Unsqueeze", low, last), graph.op("Unsqueeze", high, last), axis=-1)
        raised = graph.op("Reshape", both, graph.constant([0, 0, -1], np.int64))
        return graph.op("Sub", graph.op("Cast", raised, to=TensorProto.FLOAT), graph.constant(8.0))


def pack_int4(codes: Int8) -> UInt8:
    """Packs codes as ONNX's INT4: in the order of the elements, the first of two in the low nibble, signed."""
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(0x0F)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed: UInt8 = flat[0::2] | (flat[1::2] << np.uint8(4))
    return packed
