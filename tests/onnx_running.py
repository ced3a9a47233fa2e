"""Runs exported ONNX students in ONNX Runtime."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from ebbflow.common.student.config import StudentConfig

Array = npt.NDArray[Any]
EXACT, AS_DEVICES = "1", "4"
"""Activations in float32, or int8 in groups of 32, which is ONNX Runtime's default."""


class Running:
    """A student in ONNX Runtime with what it has seen."""

    def __init__(self, folder: Path, config: StudentConfig, activations: str = AS_DEVICES, batch: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", activations)
        self.optimised = folder.with_suffix(".optimised.onnx")
        options.optimized_model_filepath = str(self.optimised)
        options.log_severity_level = 3  # it warns that an optimised model is for this machine
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        empty = np.zeros((batch, config.num_key_value_heads, 0, config.head_dim), np.float32)
        names = [taken.name for taken in self.session.get_inputs() if taken.name.startswith("past_key_values.")]
        self.past: dict[str, Array] = dict.fromkeys(names, empty)
        self.mask = np.zeros((batch, 0), np.int64)

    def step(self, token_ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]] | None = None) -> Array:
        """Takes new tokens of every sequence; returns logits [B, T, V]."""
        ids_BT = np.array(token_ids, np.int64)
        new = np.ones_like(ids_BT) if mask is None else np.array(mask, np.int64)
        self.mask = np.concatenate([self.mask, new], axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids_BT.shape[1] :]
        feeds = {"input_ids": ids_BT, "attention_mask": self.mask, "position_ids": positions, **self.past}
        names = ["logits", *(name.replace("past_key_values", "present") for name in self.past)]
        logits_BTV, *present = self.session.run(names, feeds)
        self.past = dict(zip(self.past, present, strict=True))
        found: Array = logits_BTV
        return found

    def greedy(self, token_ids: list[int], count: int) -> list[int]:
        """The most likely continuation, step by step."""
        logits_BTV = self.step([token_ids])
        said: list[int] = []
        while len(said) < count:
            said.append(int(logits_BTV[0, -1].argmax()))
            logits_BTV = self.step([said[-1:]])
        return said
