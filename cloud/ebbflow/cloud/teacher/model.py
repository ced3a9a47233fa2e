"""The teacher as a model in this process: any causal LM that transformers loads, from a folder or by hub name.

Shapes: B sequences, T positions, N = B * T flat positions, C chosen rows, D width, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers.utils.hub import cached_file

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer

Dtype = Literal["auto", "float32", "bfloat16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PROBE_TOKENS = 8


class Teacher:
    """A causal LM that only ever reads. Not thread-safe: one thread computes.

    Attributes:
        source: folder or hub name that it was loaded from.
        architecture: such as "Ernie4_5_MoeForCausalLM".
        vocabulary_size: width of its logits.
        context_tokens: longest sequence.
        tokenizer: how it cuts text.
        model: the transformers model, in evaluation mode.
    """

    def __init__(self, source: str, model: Any, tokenizer: Tokenizer) -> None:
        self.source = source
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.architecture = type(model).__name__
        self.vocabulary_size = int(model.config.get_text_config().vocab_size)
        self.context_tokens = int(getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 20))
        self._head_VD = self._plain_head()

    @classmethod
    def load(cls, source: str, dtype: Dtype = "auto") -> "Teacher":
        """Loads a checkpoint of any architecture that transformers knows; never runs code from it.

        Args:
            source: folder with config.json, weights and tokenizer.json, or hub name.
            dtype: precision in memory; "auto" takes `native_dtype`.

        Raises:
            EbbflowError: CHECKPOINT_UNREADABLE saying what is missing or broken.
        """
        tokenizer = load_tokenizer(source)
        wanted = native_dtype() if dtype == "auto" else _DTYPES[dtype]
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            auto: Any = transformers.AutoModelForCausalLM
            model, report = auto.from_pretrained(
                source, dtype=wanted, output_loading_info=True, trust_remote_code=False
            )
        except MemoryError:
            raise
        except Exception as error:  # a broken checkpoint raises anything here, from KeyError to RuntimeError
            raise _unreadable(source, "cannot be loaded by transformers") from error
        # transformers fills what a checkpoint lacks with random numbers and only warns.
        if lacking := sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])]):
            raise _unreadable(source, f"lacks {len(lacking)} tensors, such as {lacking[0][:120]!r}")
        if tokenizer.size > model.config.get_text_config().vocab_size:
            raise _unreadable(source, "has a tokenizer with more tokens than the model")
        return cls(source, model, tokenizer)

    @torch.inference_mode()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Returns all logits [B, T, V], in the model's precision; for short inputs only."""
        result: Tensor = self.model(input_ids=tokens_BT, use_cache=False).logits
        return result

    def rows(self, tokens_BT: Tensor) -> Callable[[Tensor], Tensor]:
        """Reads sequences once and returns a function from flat positions [C] to their logits [C, V].

        The product with the output head happens in that function, so that no more logits exist than are asked for.
        """
        with torch.inference_mode():
            if self._head_VD is None:
                logits_NV = self.logits(tokens_BT).flatten(0, 1)
                return lambda rows_C: logits_NV[rows_C]
            hidden_ND = self._hidden(tokens_BT).flatten(0, 1)
        return lambda rows_C: self._apply_head(hidden_ND[rows_C])

    @torch.inference_mode()
    def _apply_head(self, hidden_CD: Tensor) -> Tensor:
        assert self._head_VD is not None  # noqa: S101 - rows() has looked
        return hidden_CD @ self._head_VD.T

    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        result: Tensor = self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return result

    @torch.inference_mode()
    def _plain_head(self) -> Tensor | None:
        """Returns the output embedding if the logits are just its product with the last hidden state.

        Some architectures scale or cap their logits; a short probe tells.
        """
        embedding = self.model.get_output_embeddings()
        if embedding is None or getattr(embedding, "bias", None) is not None:
            return None
        probe_BT = torch.arange(min(_PROBE_TOKENS, self.vocabulary_size)).unsqueeze(0)
        head_VD: Tensor = embedding.weight
        product = (self._hidden(probe_BT) @ head_VD.T).float()
        return head_VD if torch.allclose(product, self.logits(probe_BT).float(), rtol=1e-2, atol=1e-2) else None


def load_tokenizer(source: str) -> Tokenizer:
    """Loads a teacher's tokenizer alone.

    Raises:
        EbbflowError: CHECKPOINT_UNREADABLE saying what is missing or broken.
    """
    return Tokenizer.from_file(_hub_file(source, "tokenizer.json"))


def native_dtype() -> torch.dtype:
    """Returns bfloat16 where the processor multiplies it itself, else float32.

    Chosen by what the processor can do and not by a timing, so that a resumed run computes the same.
    """
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def _hub_file(source: str, name: str) -> Path:
    """Path of one file of a checkpoint, local or from the hub's cache.

    The tokenizer's configuration is brought beside it, where there is one: it names the special tokens.
    """
    if not Path(source).is_dir() and source.startswith(("/", ".", "~")):
        raise _unreadable(source, "is no folder on this machine")
    try:
        cached_file(source, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False)
        found = cached_file(source, name)
    except (OSError, ValueError) as error:
        raise _unreadable(source, f"has no {name}, or the hub cannot be reached") from error
    if found is None:
        raise _unreadable(source, f"has no {name}")
    return Path(found)


def _unreadable(source: str, fault: str) -> EbbflowError:
    return EbbflowError(Reason.CHECKPOINT_UNREADABLE, f"teacher {source[:200]!r} {fault}", source=source[:200])
