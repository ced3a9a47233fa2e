"""Builds an ONNX graph whose weights lie in a file beside it, written block by block."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ebbflow.common.codes.container import Array, write_blocks

OPSET = 21
"""The first with blocks in DequantizeLinear and with INT4."""
IR_VERSION = 10
DATA_ENDING = ".data"

_ALIGNMENT_BYTES = 4096
"""So that runtimes can map each tensor."""

Dimensions = Sequence[int | str]


class Graph:
    """Nodes in the order of computation; each is named after its output."""

    def __init__(self, data: BinaryIO, data_name: str) -> None:
        """Begins an empty graph.

        Args:
            data: where the weights go.
            data_name: name of that file, beside the model's.
        """
        self._data, self._data_name = data, data_name
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def input(self, name: str, kind: int, dimensions: Dimensions) -> str:
        """Adds an input; a dimension that is a text is dynamic. Returns its name."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, dimensions))
        return name

    def output(self, value: str, name: str, kind: int, dimensions: Dimensions) -> None:
        """Makes a value an output under a name."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=name))
        self._outputs.append(helper.make_tensor_value_info(name, kind, dimensions))

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Adds a node and returns the name of its output, the first if it has several."""
        return self.ops(kind, *inputs, outputs=outputs, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Adds a node and returns the names of all its outputs."""
        name = f"{kind}_{len(self._nodes)}"
        names = [name] if outputs == 1 else [f"{name}.{at}" for at in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Adds a small constant, once, and returns its name."""
        array = np.asarray(value, dtype)
        name = f"constant.{array.dtype}.{array.shape}.{array.tobytes().hex()}"
        if name not in self._initializers:
            short = f"constant_{len(self._initializers)}"
            self._initializers[name] = numpy_helper.from_array(array, short)
        return str(self._initializers[name].name)

    def weight(self, name: str, kind: int, shape: Sequence[int], blocks: Iterable[Array]) -> str:
        """Adds a weight whose bytes go to the file beside the model, once; returns its name.

        Args:
            name: its name.
            kind: element type of `TensorProto`.
            shape: its shape in elements; INT4 packs two to a byte.
            blocks: its content, in order.
        """
        if name not in self._initializers:
            self._data.write(bytes(-self._data.tell() % _ALIGNMENT_BYTES))
            begin = self._data.tell()
            write_blocks(self._data, blocks)
            place = {"location": self._data_name, "offset": begin, "length": self._data.tell() - begin}
            tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
            tensor.external_data.extend(
                onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()
            )
            self._initializers[name] = tensor
        return name

    def save(self, path: Path, name: str) -> None:
        """Writes the model's file.

        Args:
            path: where.
            name: what the graph is called.
        """
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="ebbflow"
        )
        path.write_bytes(model.SerializeToString())
