"""Chooses and loads the engine for an artefact."""

import importlib.util
from pathlib import Path
from typing import Literal, TypedDict, get_args

from ebbflow.common.codes.artefact import KVKind, Precision, read_variant
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.library import find_library
from ebbflow.edge.engine.native_engine import NativeEngine, unsupported

Preference = Literal["auto", "native", "torch"]

_NO_LIBRARY = "the kernels are not compiled for this machine"


class _Options(TypedDict):
    threads: int | None
    context_tokens: int | None
    memory_limit_bytes: int | None
    kv_cache: KVKind
    precision: Precision | None


def load_engine(
    weights_path: Path,
    prefer: Preference = "auto",
    *,
    threads: int | None = None,
    context_tokens: int | None = None,
    memory_limit_bytes: int | None = None,
    kv_cache: KVKind = "bf16",
    precision: Precision | None = None,
) -> Engine:
    """Loads an artefact into the fastest engine that this machine has.

    Args:
        weights_path: an artefact of any precision.
        prefer: "auto" takes the native engine where it can run the student, else torch; or an engine to insist on.
        threads: threads to compute with; None leaves it to the engine.
        context_tokens: most tokens of a sequence; None or more than the student's own means the student's own.
        memory_limit_bytes: most bytes of weights and KV cache together; None for no limit.
        kv_cache: how keys and values are kept: "bf16", or "int8" at half the memory.
        precision: to compute with: the artefact's own, which None means, or a smaller one that derives from it.

    Raises:
        EbbflowError: EXTRA_MISSING if no engine is installed, FILE_CORRUPT if the artefact is not whole, OUT_OF_MEMORY
            if its weights are above the limit, INVALID_REQUEST if it does not give the precision, CONFIG_INVALID if
            there is no such engine or it cannot run this student.
    """
    if prefer not in get_args(Preference):
        known = ", ".join(repr(name) for name in get_args(Preference))
        raise EbbflowError(Reason.CONFIG_INVALID, f"there is no engine {prefer!r}; there are {known}")
    options: _Options = {
        "threads": threads,
        "context_tokens": context_tokens,
        "memory_limit_bytes": memory_limit_bytes,
        "kv_cache": kv_cache,
        "precision": precision,
    }
    if prefer == "torch":
        return _load_torch(weights_path, "the configuration asks for torch", options)
    library = find_library()
    reason = _NO_LIBRARY if library is None else unsupported(read_variant(weights_path).config)
    if library is not None and not reason:
        return NativeEngine(library, weights_path, **options)
    if prefer == "native":
        raise _no_native(reason)
    return _load_torch(weights_path, reason, options)


def _load_torch(weights_path: Path, reason: str, options: _Options) -> Engine:
    if importlib.util.find_spec("torch") is None:
        message = f"{reason}, and the torch engine needs the extra 'edge-torch': pip install 'ebbflow[edge-torch]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message, extra="edge-torch")
    from ebbflow.edge.engine.torch_engine import TorchEngine

    return TorchEngine(weights_path, reason=reason, **options)


def _no_native(reason: str) -> EbbflowError:
    cure = "install a wheel for this machine, or a C compiler, and install again" if reason == _NO_LIBRARY else ""
    return EbbflowError(Reason.CONFIG_INVALID, f"the native engine cannot run: {reason}{cure and '; ' + cure}")
