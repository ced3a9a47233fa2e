"""Makes what is served be what the cloud wants served. The old release serves until the new one has proven itself."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from ebbflow.api.v1 import agent_pb2
from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.agent.installations import Installations
from ebbflow.edge.agent.profile import PRECISIONS
from ebbflow.edge.delivery.install import InstalledRelease, Installer
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.model import Model

log = structlog.get_logger(__name__)

LoadEngine = Callable[[Path], Engine]

# Not the release's fault: nothing is reported, the look is repeated soon.
NOT_THE_RELEASE = frozenset({
    Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.QUOTA_EXHAUSTED, Reason.INTERNAL,
    Reason.AUTHORITY_MISMATCH, Reason.CERTIFICATE_REQUIRED, Reason.CERTIFICATE_INVALID, Reason.CERTIFICATE_EXPIRED,
    Reason.CERTIFICATE_REVOKED, Reason.AGENT_QUARANTINED, Reason.AGENT_NOT_FOUND, Reason.ROLE_INSUFFICIENT,
    Reason.STATE_CONFLICT,
})  # fmt: skip
# May be over soon, by what the operator or the cloud does.
_MAY_PASS = frozenset({Reason.DISK_FULL, Reason.OUT_OF_MEMORY, Reason.METADATA_EXPIRED, Reason.EXTRA_MISSING})


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a release that was refused is tried again, in seconds."""

    passing_s: float = 300.0
    """After a lack of space, memory or fresh metadata."""
    refused_s: float = 3600.0
    """After anything else; a new rollout of the release is tried at once."""


class Reconciler:
    """Starts what is installed, and follows the desired state from then on."""

    def __init__(
        self,
        cloud: Cloud,
        installer: Installer,
        hub: Hub,
        load_engine: LoadEngine,
        profile: pb.DeviceProfile,
        installations: Installations,
        retry: Retry | None = None,
    ) -> None:
        """Takes the parts that it moves."""
        self._cloud, self._installer, self._hub = cloud, installer, hub
        self._load_engine, self._profile, self._installations = load_engine, profile, installations
        self._retry = retry or Retry()
        self._refused: dict[str, tuple[bytes, float]] = {}  # by student: what, and when to try it again

    def start(self) -> None:
        """Serves what is installed, without the network. Blocks while it loads.

        A student that cannot be loaded is left to the next installation.
        """
        for student_id in self._installer.students():
            try:
                started = self._installer.start(student_id, self._load_engine)
                if started:
                    self._serve(*started)
            except EbbflowError as error:
                log.error("release_not_started", student=student_id, reason=error.reason.name, cure=error.cure)

    async def look(self) -> float:
        """Asks for the desired state and brings it about; returns the seconds until the next look.

        Raises:
            EbbflowError: why the cloud could not be asked, or could not deliver.
        """
        request = agent_pb2.GetDesiredStateRequest(profile=self._profile)
        state = await self._cloud.agent.GetDesiredState(request)
        await self._remove_others({desired.student for desired in state.releases})
        try:
            for desired in state.releases:
                await self._follow(desired)
        finally:
            await self._installations.send(self._cloud)
        return float(state.poll_interval_s)

    async def _follow(self, desired: agent_pb2.DesiredRelease) -> None:
        if not desired.release:  # the cloud has nothing for this device that it did not refuse: serving goes on
            return
        if self._serves(desired):
            self._installations.note(desired, pb.INSTALLATION_STATE_SERVING)
            return
        wish = desired.SerializeToString(deterministic=True)
        refused, again_s = self._refused.get(desired.student, (b"", 0.0))
        if refused == wish and time.monotonic() < again_s:
            return
        if refused != wish:  # a second try is news only by its end
            self._installations.note(desired, pb.INSTALLATION_STATE_FETCHING)
            await self._installations.send(self._cloud)
        try:
            await asyncio.to_thread(self._install, desired)
        except EbbflowError as error:
            if error.reason in NOT_THE_RELEASE:
                raise
            self._refuse(desired, error, wish)

    def _serves(self, desired: agent_pb2.DesiredRelease) -> bool:
        return any(
            model.release == desired.release and PRECISIONS.get(model.engine.precision) == desired.precision
            for model in self._hub.models()
        )

    def _install(self, desired: agent_pb2.DesiredRelease) -> None:
        installed, engine = self._installer.install(desired, self._load_engine)
        try:
            model = _model(installed, engine)
            self._installer.commit(installed)
        except EbbflowError:
            self._installer.discard(installed)
            raise
        self._hub.swap(model)
        self._refused.pop(desired.student, None)
        log.info(
            "release_serves",
            release=model.release,
            precision=installed.precision,
            engine=engine.name,
            fetched_bytes=installed.fetched_bytes,
        )
        self._installations.note(
            desired,
            pb.INSTALLATION_STATE_SERVING,
            probe_loss=installed.probe_loss,
            fetched_bytes=installed.fetched_bytes,
        )

    def _serve(self, installed: InstalledRelease, engine: Engine) -> None:
        model = _model(installed, engine)
        self._hub.swap(model)
        log.info("release_serves", release=model.release, precision=installed.precision, engine=engine.name)

    def _refuse(self, desired: agent_pb2.DesiredRelease, error: EbbflowError, wish: bytes) -> None:
        wait_s = self._retry.passing_s if error.reason in _MAY_PASS else self._retry.refused_s
        self._refused[desired.student] = (wish, time.monotonic() + wait_s)
        log.warning("release_refused", release=desired.release, reason=error.reason.name, why=str(error))
        self._installations.note(
            desired,
            pb.INSTALLATION_STATE_FAILED,
            reason=error.reason.name,
            probe_loss=float(error.metadata.get("probe_loss", 0.0)),
            fetched_bytes=int(error.metadata.get("fetched_bytes", 0)),
        )

    async def _remove_others(self, wanted: set[str]) -> None:
        for model in self._hub.models():
            if model.student not in wanted:
                self._hub.remove(model.student)
                self._installations.forget(model.student)
                log.info("student_removed", student=model.student)
        ids = [names.parse(student, "students") for student in wanted]
        await asyncio.to_thread(self._installer.retain, ids)


def _model(installed: InstalledRelease, engine: Engine) -> Model:
    """Makes a release ready to answer.

    Raises:
        EbbflowError: PROBE_FAILED if the tokenizer knows tokens that the weights do not; CHECKPOINT_UNREADABLE.
    """
    tokenizer = Tokenizer.from_bytes(installed.tokenizer_path.read_bytes())
    if tokenizer.size > engine.config.vocab_size:
        message = f"the tokenizer has {tokenizer.size} tokens, the weights know {engine.config.vocab_size}"
        raise EbbflowError(Reason.PROBE_FAILED, message)
    student = names.make("students", installed.student)
    return Model(student, names.release(installed.student, installed.number), engine, tokenizer)
