"""`ebbflow cloud gate`: evaluates what the distiller proposes, and co-signs what passes."""

import logging
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

from securesystemslib.signer import Signer
from sqlalchemy.orm import Session

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.distillation import corpus
from ebbflow.cloud.processes import logs
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.processes.work import repeat, stop_on_signals, use_threads
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.registry.tables import Distillation, Json, Release, Student
from ebbflow.cloud.release import gate, publish, repository
from ebbflow.cloud.release.anchor import Anchor
from ebbflow.cloud.release.lineage import Costs, costs
from ebbflow.cloud.release.publish import Proposal
from ebbflow.cloud.release.repository import Trust
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason

_log = logging.getLogger(__name__)

# What the files of a proposal, and not this machine, are to blame for.
_REFUSED = frozenset({Reason.FILE_CORRUPT, Reason.BLOB_NOT_FOUND, Reason.CHECKPOINT_UNREADABLE, Reason.INVALID_REQUEST})


def run(settings: CloudSettings) -> None:
    """Runs until SIGTERM or SIGINT.

    Raises:
        EbbflowError: NOT_INITIALISED, KEY_UNUSABLE, SCHEMA_OUTDATED, DATABASE_UNAVAILABLE and what else keeps it from
            starting.
    """
    logs.configure(settings.log_level)
    stop = stop_on_signals()
    use_threads(settings.threads)
    signer = settings.signer("gate")
    anchor = Anchor(settings.paths.anchor("gate"), settings.paths.trust_root)
    registry = Registry.open(settings.database_url)
    limits = gate.Limits(settings.gate_max_regression, settings.gate_max_precision_loss)
    keeper = Gate(registry, settings.blob_store(), signer, limits, settings.paths.work / "gate", anchor.trusted)
    try:
        repeat(stop, settings.tick_interval_s, lambda: keeper.drain(stop))
    finally:
        registry.close()


class Gate:
    """Answers proposals, one after the other."""

    def __init__(
        self,
        registry: Registry,
        blobs: BlobStore,
        signer: Signer,
        limits: gate.Limits,
        scratch: Path,
        trust: Trust = repository.trusted,
    ) -> None:
        self._registry = registry
        self._blobs = blobs
        self._signer = signer
        self._limits = limits
        self._scratch = scratch
        self._trust = trust

    def drain(self, stop: threading.Event) -> None:
        """Answers until no proposal waits."""
        while not stop.is_set() and self.run_once():
            pass

    def run_once(self) -> bool:
        """Answers the open proposal.

        Returns:
            False if none waits.

        Raises:
            EbbflowError: METADATA_STALE if it was overtaken meanwhile, DISK_FULL, DATABASE_UNAVAILABLE.
        """
        try:
            with self._registry.reading() as session:
                proposal = publish.open_proposal(session, trust=self._trust)
        except EbbflowError as error:
            if error.reason is not Reason.ARTEFACT_UNTRUSTED:
                raise
            self._answer(None, {}, str(error))
            return True
        if proposal is None:
            return False
        card, reason = self._judge(proposal)
        self._answer(proposal, card, reason)
        return True

    def _judge(self, proposal: Proposal) -> tuple[Json, str]:
        """Returns card and objection; files that cannot even be measured are objected to, whatever they break."""
        try:
            return self._evaluate(proposal)
        except EbbflowError as error:
            if error.reason not in _REFUSED:
                raise
            return {}, str(error)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            _log.error("unhandled %s in an evaluation\n%s", type(error).__name__, frames)
            return {}, f"its evaluation failed with {type(error).__name__}; the gate's log says where"

    def _evaluate(self, proposal: Proposal) -> tuple[Json, str]:
        """Measures what is proposed; returns its card and why it may not be published."""
        change = proposal.change
        if change.student_id is None or change.number is None:
            return {}, ""  # nothing to measure: a later expiry, or releases that go
        with self._registry.reading() as session:
            facts = _facts(session, change.student_id, change.number)
        texts = gate.gate_texts(corpus.load(self._blobs, facts.corpus_sha256).split("gate"))
        found = gate.measure(change.files, change.student_id, change.number, self._blobs, texts, self._scratch)
        return found.card(facts.costs), gate.objection(found, facts.base_bits_per_byte, self._limits)

    def _answer(self, proposal: Proposal | None, card: Json, reason: str) -> None:
        with self._registry.transaction() as session:
            if proposal is None or reason:
                publish.reject(session, reason, proposal, card)
            else:
                publish.approve(session, self._signer, proposal, card, trust=self._trust)
        change = proposal.change if proposal else None
        what = names.release(change.student_id, change.number or 0) if change and change.student_id else "the list"
        _log.info("turned %s down: %s" if reason else "approved %s%s", what, reason)


@dataclass(frozen=True)
class _Facts:
    """What the registry says of a release under evaluation."""

    corpus_sha256: str
    costs: Costs
    base_bits_per_byte: float | None
    """As the gate measured it then, on the same corpus; None without a base."""


def _facts(session: Session, student_id: str, number: int) -> _Facts:
    student, release = session.get(Student, student_id), session.get(Release, (student_id, number))
    if student is None or release is None:
        message = f"the registry does not know {names.release(student_id, number)}"
        raise EbbflowError(Reason.FILE_CORRUPT, message)
    job = session.get(Distillation, release.distillation_id)
    base = session.get(Release, (student_id, job.base_release)) if job and job.base_release else None
    bits = base.card.get("bitsPerByte") if base else None
    return _Facts(student.corpus_sha256, costs(session, job) if job else Costs(), float(bits[0]) if bits else None)
