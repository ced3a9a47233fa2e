"""Chooses and loads the engine for an artefact."""

import importlib.util
from pathlib import Path
from typing import Literal

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Engine

Preference = Literal["auto", "torch"]


def load_engine(
    weights_path: Path,
    prefer: Preference = "auto",
    *,
    threads: int | None = None,
    context_tokens: int | None = None,
    memory_limit_bytes: int | None = None,
) -> Engine:
    """Loads an artefact into the fastest engine that this machine has.

    Args:
        weights_path: an artefact of any precision.
        prefer: "auto", or the name of an engine to insist on.
        threads: threads to compute with; None leaves it to the engine.
        context_tokens: most tokens of a sequence; None or more than the student's own means the student's own.
        memory_limit_bytes: most bytes of weights and KV cache together; None for no limit.

    Raises:
        EbbflowError: EXTRA_MISSING if no engine is installed, FILE_CORRUPT if the artefact is not whole, OUT_OF_MEMORY
            if its weights are above the limit, CONFIG_INVALID if there is no such engine.
    """
    if prefer not in {"auto", "torch"}:
        raise EbbflowError(Reason.CONFIG_INVALID, f"there is no engine {prefer!r}; there are 'auto' and 'torch'")
    if importlib.util.find_spec("torch") is None:
        message = "the torch engine needs the extra 'edge-torch': pip install 'ebbflow[edge-torch]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message, extra="edge-torch")
    from ebbflow.edge.engine.torch_engine import TorchEngine

    return TorchEngine(
        weights_path, threads=threads, context_tokens=context_tokens, memory_limit_bytes=memory_limit_bytes
    )
