"""How a plan likens texts to its bins: by shared words, or by the states of the student that this device serves.

Either measure looks at one text at a time and knows public texts alone besides it. Nor does it know how busy the device
is: an engine of its own computes the states, on one thread, from the weights as they were delivered, whatever the
governor has chosen for answers and however many requests wait. So nobody's requests move another user's vote.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import structlog

from ebbflow.api.v1 import feedback_pb2 as pb
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.privacy.lexical import Lexicon
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.background import Halt
from ebbflow.edge.agent.swapping import Room
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.load import Preference, load_engine
from ebbflow.edge.feedback.votes import Embed
from ebbflow.edge.serving.faults import place_of
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

log = structlog.get_logger(__name__)

MOST_TOKENS = 512
"""That are looked at of one text: no user's long text may be what there is no memory or time for."""


class Likeness:
    """Makes the measure that a plan asks for."""

    def __init__(self, hub: Hub, room: Callable[[], Room]) -> None:
        """Takes who serves, and what memory there is."""
        self._hub, self._room = hub, room

    @contextmanager
    def of(self, plan: pb.RoundPlan, halt: Halt | None = None) -> Iterator[Embed | None]:
        """Lends the plan's measure; None without the student: then nobody was served, and the report has no votes.

        Enter, use and leave it in one thread. A text that the tokenizer cannot read has no tokens, and so no vote. All
        else that fails is no text's fault: the measure raises, and the report must not be made without the text.

        Args:
            plan: what it asks for.
            halt: asked before each text.

        Raises:
            EbbflowError: OUT_OF_MEMORY if there is no room for a second engine; FILE_CORRUPT.
        """
        halt = halt or Halt()
        model = self._find(plan.student)
        if model is None:
            yield None
        elif plan.measure == pb.RoundPlan.MEASURE_STUDENT:
            with self._opened(model) as engine:
                yield partial(self._states, model, engine, halt)
        else:
            texts = [text for bin_ in plan.bins for text in bin_.texts]
            yield Lexicon(texts, partial(_tokens, model.tokenizer, halt), model.tokenizer.size)

    def _find(self, student: str) -> Model | None:
        return next((model for model in self._hub.models() if model.student == student), None)

    @contextmanager
    def _opened(self, model: Model) -> Iterator[Engine]:
        """Opens an engine of the precision that was installed."""
        serving = model.engine
        weights_path = serving.weights_path
        try:
            fits = self._room().fits(serving, weights_path.stat().st_size)
        except OSError as error:
            raise EbbflowError(Reason.FILE_CORRUPT, f"{weights_path} cannot be read", path=weights_path) from error
        if not fits:
            message = "there is no memory for a second engine, which texts are likened with"
            raise EbbflowError(Reason.OUT_OF_MEMORY, message)
        kind: Preference = "torch" if serving.name == "torch" else "native"
        engine = load_engine(weights_path, kind, context_tokens=MOST_TOKENS)
        # Torch keeps it for each thread, and gives the last one set to threads that begin later.
        threads, engine.threads = engine.threads, 1
        try:
            yield engine
        finally:
            engine.threads = min(threads, engine.max_threads)
            engine.shutdown()

    def _states(self, model: Model, engine: Engine, halt: Halt, texts: Sequence[str]) -> npt.NDArray[np.floating]:
        if self._find(model.student) is None:
            raise EbbflowError(Reason.AGENT_STOPPING, f"{model.student} is not served any more")
        encode = partial(_tokens, model.tokenizer, halt, bos=model.tokenizer.bos_id is not None)
        tokens = (encode(text)[: engine.context_tokens] for text in texts)
        nothing = np.zeros(engine.config.hidden_size, np.float32)
        try:
            return np.stack([engine.embed(token_ids) if token_ids else nothing for token_ids in tokens])
        except EbbflowError:
            raise
        except MemoryError as error:
            raise EbbflowError(Reason.OUT_OF_MEMORY, "the device ran out of memory") from error
        except Exception as error:
            log.error("engine_failed", **place_of(error))
            raise EbbflowError(Reason.INTERNAL, "the engine failed") from error


def _tokens(tokenizer: Tokenizer, halt: Halt, text: str, *, bos: bool = False) -> list[int]:
    halt.check()
    try:
        return tokenizer.encode(text, bos=bos)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - it is the text's, and one user's text must not decide whether the device reports
        return []
