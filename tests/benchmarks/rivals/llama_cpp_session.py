"""llama.cpp on a GGUF file, through its C interface; run in its own environment by `speed.session`."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as api
import numpy as np
from speed.session import main
from speed.shapes import CONTEXT_TOKENS, STREAMS, Shape

_BATCH_TOKENS = 1024


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, data: object) -> None:
    pass


class LlamaCpp:
    """One context over one model, its defaults but for sizes: mapped file, repacked weights, flash attention."""

    def __init__(self, shape: Shape, path: Path, threads: int) -> None:
        api.llama_log_set(_say_nothing, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._vocab_size = shape.vocab_size
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.kv_unified = CONTEXT_TOKENS, STREAMS, True
        settings.n_batch = _BATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, settings)
        self._batch = api.llama_batch_init(_BATCH_TOKENS, 0, STREAMS)
        self._tokens: list[int] = []
        self._position = 0

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Computes the prompts in one call."""
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch, length = self._batch, len(prompts[0])
        for sequence, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(sequence * length + position, token, position, sequence, last=position == length - 1)
        batch.n_tokens, self._position = len(prompts) * length, length
        self._run([(sequence + 1) * length - 1 for sequence in range(len(prompts))])

    def next(self) -> None:
        """One call for all sequences."""
        for sequence, token in enumerate(self._tokens):
            self._put(sequence, token, self._position, sequence, last=True)
        self._batch.n_tokens = len(self._tokens)
        self._position += 1
        self._run(range(len(self._tokens)))

    def close(self) -> None:
        """Frees it all."""
        api.llama_batch_free(self._batch)
        api.llama_free(self._context)
        api.llama_model_free(self._model)

    def _put(self, index: int, token: int, position: int, sequence: int, *, last: bool) -> None:
        batch = self._batch
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, last
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence

    def _run(self, outputs: Sequence[int]) -> None:
        if api.llama_decode(self._context, self._batch):
            raise RuntimeError("llama_decode failed")
        shape = (self._vocab_size,)
        rows = (api.llama_get_logits_ith(self._context, index) for index in outputs)
        self._tokens = [int(np.ctypeslib.as_array(row, shape=shape).argmax()) for row in rows]


if __name__ == "__main__":
    main(LlamaCpp)
