"""transformers in bf16, as it comes: its model and cache, without the loop of `generate`. Run by `speed.session`."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from speed.session import main
from speed.shapes import Shape
from torch import Tensor

MODEL = transformers.Ernie4_5ForCausalLM
"""Found here, since the library imports it when it is first named, which is no part of loading."""


class TransformersCpu:
    """One model of the library."""

    def __init__(self, shape: Shape, path: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._model = MODEL.from_pretrained(path, dtype=torch.bfloat16)
        self._model.requires_grad_(False)
        if self._model.config.vocab_size != shape.vocab_size:
            raise ValueError(f"{path} is of another shape")
        self._cache, self._tokens = None, torch.empty(0, dtype=torch.int64)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """All prompts in one pass."""
        self._cache = None
        self._run(torch.tensor(prompts))

    def next(self) -> None:
        """One token of each."""
        self._run(self._tokens)

    def close(self) -> None:
        """Lets go of the weights."""
        del self._model, self._cache

    @torch.inference_mode()
    def _run(self, tokens_BT: Tensor) -> None:
        out = self._model(tokens_BT, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)


if __name__ == "__main__":
    main(TransformersCpu)
