"""Loads a release and holds its loss on the signed prompts against the signed loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.trust.manifest import Manifest
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.loss import sequence_loss

LoadEngine = Callable[[Path], Engine]


def load(weights_path: Path, load_engine: LoadEngine) -> Engine:
    """Loads weights.

    Raises:
        EbbflowError: what the engine says, OUT_OF_MEMORY, or PROBE_FAILED if it trips over anything else.
    """
    with _named_failures("load"):
        return load_engine(weights_path)


def probe(manifest: Manifest, precision: str, weights_path: Path, load_engine: LoadEngine) -> tuple[Engine, float]:
    """Loads one precision of a release and measures it.

    Returns:
        The engine and its loss in nats per token.

    Raises:
        EbbflowError: PROBE_FAILED if the loss differs from the signed one by more than the signed tolerance, with both
            in its metadata; ARTEFACT_UNTRUSTED if the weights keep other matrices in bf16 than the manifest says; or
            as `load` does.
    """
    engine = load(weights_path, load_engine)
    if engine.kept_bf16 != manifest.kept_bf16:
        message = "manifest and weights disagree on the matrices that are kept in bf16"
        raise EbbflowError(Reason.ARTEFACT_UNTRUSTED, message)
    with _named_failures("compute"):
        loss = manifest.probe.mean([sequence_loss(engine, token_ids) for token_ids in manifest.probe.token_ids])
    expected, tolerance = manifest.variants[precision].probe_loss, manifest.probe.tolerance
    if not abs(loss - expected) <= tolerance:  # a NaN fails too
        message = f"the probe's loss is {loss:.4f} here, {expected:.4f} ± {tolerance:g} was signed"
        raise EbbflowError(Reason.PROBE_FAILED, message, probe_loss=loss, expected_loss=expected, tolerance=tolerance)
    return engine, loss


@contextmanager
def _named_failures(what: str) -> Iterator[None]:
    try:
        yield
    except EbbflowError:
        raise
    except MemoryError as error:
        raise EbbflowError(Reason.OUT_OF_MEMORY, f"no memory left to {what} the release") from error
    except Exception as error:  # whatever an engine trips over, the old release goes on serving
        message = f"the engine could not {what} the release: {type(error).__name__}"
        raise EbbflowError(Reason.PROBE_FAILED, message) from error
