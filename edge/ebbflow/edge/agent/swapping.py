"""How a release takes over from the one before: beside it, or in its place where memory is short.

Beside: the new weights are loaded while the old ones serve; what runs finishes on the release it began with.
In place: what runs finishes first, what comes meanwhile waits; then the new weights take the memory of the old ones,
and what waited is answered by them. A release that does not prove itself is undone the same way.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import structlog

from ebbflow.api.v1 import agent_pb2
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.profile import PRECISIONS
from ebbflow.edge.delivery.install import InstalledRelease, Installer
from ebbflow.edge.delivery.probe import LoadEngine
from ebbflow.edge.delivery.traffic import Brake
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.serving.batcher import Batcher
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

log = structlog.get_logger(__name__)

Wish = Literal["auto", "beside", "in_place"]
RESERVE_BYTES = 100 << 20
"""What loading takes beside the weights themselves."""


@dataclass(frozen=True)
class Room:
    """Memory for weights, in bytes."""

    limit_bytes: int
    """That a student may take, by the operator's word."""
    available_bytes: int
    """That the device has left."""

    def fits(self, engine: Engine, file_bytes: int) -> bool:
        """Whether there is room for a file of weights beside an engine that serves.

        Weights take at least their file's size, and as much as the old ones where an engine unpacks them; the old ones
        may be smaller than the new, where the governor computes in a smaller precision.
        """
        memory = engine.memory()
        new_bytes = max(memory.weights_bytes, file_bytes)
        both_bytes = memory.weights_bytes + memory.cache_bytes + new_bytes
        return both_bytes <= self.limit_bytes and new_bytes + RESERVE_BYTES <= self.available_bytes


def in_place(wish: Wish, room: Room, engine: Engine, file_bytes: int) -> bool:
    """Whether new weights should take the memory of an engine that serves."""
    return wish == "in_place" or (wish == "auto" and not room.fits(engine, file_bytes))


def model_of(installed: InstalledRelease, engine: Engine) -> Model:
    """Makes a release ready to answer.

    Raises:
        EbbflowError: PROBE_FAILED if the tokenizer knows tokens that the weights do not; CHECKPOINT_UNREADABLE.
    """
    tokenizer = Tokenizer.from_bytes(installed.tokenizer_path.read_bytes())
    if tokenizer.size > engine.config.vocab_size:
        message = f"the tokenizer has {tokenizer.size} tokens, the weights know {engine.config.vocab_size}"
        raise EbbflowError(Reason.PROBE_FAILED, message)
    student = names.make("students", installed.student)
    release = names.release(installed.student, installed.number)
    return Model(student, release, engine, tokenizer, frozenset(installed.manifest.variants))


class Swapper:
    """Starts releases, and lets a new one take over. One thread at a time, but for `serves`."""

    def __init__(
        self, hub: Hub, installer: Installer, load_engine: LoadEngine, wish: Wish, room: Callable[[], Room]
    ) -> None:
        """Takes who serves, who installs, how weights are loaded, and what memory there is."""
        self._hub, self._installer, self._load_engine = hub, installer, load_engine
        self._wish, self._room = wish, room
        self._installed: dict[str, InstalledRelease] = {}  # by student: what serves

    def serves(self, desired: agent_pb2.DesiredRelease) -> bool:
        """Whether a release serves already, in the precision that was installed; the governor may compute in another.

        Any thread may ask.
        """
        found = self._installed.get(desired.student)
        if found is None or PRECISIONS[found.precision] != desired.precision:
            return False
        return desired.release in {model.release for model in self._hub.models()}

    def start(self, student_id: str) -> None:
        """Serves what is installed, if anything is, without the network.

        Raises:
            EbbflowError: as `Installer.start`, and as `model_of`.
        """
        self._start(student_id, self._load_engine)

    def install(self, desired: agent_pb2.DesiredRelease, brake: Brake) -> tuple[InstalledRelease, Engine]:
        """Fetches a release, lets it prove itself, and lets it take over; else the old one serves on.

        Raises:
            EbbflowError: as `Installer.install`, `Installer.commit` and `model_of`.
            TransferPausedError: as `Installer.install`.
        """
        with ExitStack() as stack:
            takeover = _Takeover(desired, self._hub, self._load_engine, self._in_place, stack)
            try:
                installed, engine = self._installer.install(desired, takeover.load, brake)
                self._commit(installed, engine, instead=takeover.load_back is not None)
            except BaseException:
                takeover.give_up()
                if takeover.load_back:
                    self._put_back(desired.student, takeover.load_back)
                raise
        return installed, engine

    def _in_place(self, engine: Engine, weights_path: Path) -> bool:
        return in_place(self._wish, self._room(), engine, weights_path.stat().st_size)

    def _commit(self, installed: InstalledRelease, engine: Engine, *, instead: bool) -> None:
        try:
            model = model_of(installed, engine)
            self._installer.commit(installed)
        except EbbflowError:
            self._installer.discard(installed)
            raise
        self._serve(model, installed, instead=instead)

    def _start(self, student_id: str, load_engine: LoadEngine, *, instead: bool = False) -> None:
        if started := self._installer.start(student_id, load_engine):
            installed, engine = started
            model = model_of(installed, engine)
            self._serve(model, installed, instead=instead)
            log.info("release_serves", release=model.release, precision=installed.precision, engine=engine.name)

    def _serve(self, model: Model, installed: InstalledRelease, *, instead: bool) -> None:
        self._installed[model.student] = installed
        self._hub.swap(model, instead=instead)

    def _put_back(self, student: str, load_engine: LoadEngine) -> None:
        """Lets the old release serve again whose weights were given up; hashes its files first."""
        student_id = names.parse(student, "students")
        try:
            self._start(student_id, load_engine, instead=True)
        except EbbflowError as error:
            log.error("release_not_put_back", student=student_id, reason=error.reason.name, cure=error.cure)
            self._hub.abandon(student)


class _Takeover:
    """Loads one release beside the one that serves, or in its place.

    Attributes:
        load_back: how to load the old release again, once its weights are given up.
    """

    def __init__(
        self,
        desired: agent_pb2.DesiredRelease,
        hub: Hub,
        load_engine: LoadEngine,
        in_place: Callable[[Engine, Path], bool],
        stack: ExitStack,
    ) -> None:
        """Takes what says whether weights should take the place of those of an engine; holds requests in `stack`."""
        self._student, self._precision = desired.student, desired.precision
        self._hub, self._load_engine, self._in_place, self._stack = hub, load_engine, in_place, stack
        self.load_back: LoadEngine | None = None
        self._loaded: Engine | None = None

    def load(self, weights_path: Path) -> Engine:
        """Loads weights.

        Raises:
            EbbflowError: as the engine says.
        """
        serving = next((model.engine for model in self._hub.models() if model.student == self._student), None)
        if serving is None or not self._in_place(serving, weights_path):
            return self._load(weights_path)
        batcher = self._stack.enter_context(self._hub.hold(self._student))
        self._stack.callback(_tell_held, self._student, time.monotonic())
        engine = self._stack.enter_context(_lent(batcher))
        # The probe needs the release's own precision, whatever the governor has switched to.
        if PRECISIONS.get(engine.precision) == self._precision:
            self.load_back = partial(_replaced, engine)
            try:
                return self.load_back(weights_path)
            except EbbflowError as error:
                if error.reason is not Reason.INVALID_REQUEST:  # the release has another shape
                    raise
        self.load_back = self._load_engine
        engine.shutdown()
        return self._load(weights_path)

    def give_up(self) -> None:
        """Gives the memory of a new engine back at once; the error that tells of it would hold it."""
        if self._loaded:
            self._loaded.shutdown()

    def _load(self, weights_path: Path) -> Engine:
        self._loaded = self._load_engine(weights_path)
        return self._loaded


@contextmanager
def _lent(batcher: Batcher) -> Iterator[Engine]:
    """Lends the engine to this thread; its own waits, so that nothing else reaches the engine within the block.

    Raises:
        EbbflowError: AGENT_STOPPING.
    """
    lent: Future[Engine] = Future()
    back = threading.Event()

    def lend(engine: Engine) -> None:
        lent.set_result(engine)
        back.wait()

    job = batcher.between_steps(lend)
    try:
        both: set[Future[Any]] = {lent, job}
        wait(both, return_when=FIRST_COMPLETED)
        if not lent.done():
            job.result()  # says why
        yield lent.result()
    finally:
        back.set()


def _tell_held(student: str, began_s: float) -> None:
    log.info("requests_held", student=student, held_s=round(time.monotonic() - began_s, 3))


def _replaced(engine: Engine, weights_path: Path) -> Engine:
    engine.replace(weights_path)
    return engine
