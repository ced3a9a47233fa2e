"""Makes what is served be what the cloud wants served. The old release serves until the new one has proven itself."""

import asyncio
import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from ebbflow.api.v1 import agent_pb2
from ebbflow.api.v1 import resources_pb2 as pb
from ebbflow.common import names
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.agent.installations import Installations
from ebbflow.edge.agent.precedence import Precedence, said_of, wish_of
from ebbflow.edge.agent.swapping import Swapper
from ebbflow.edge.agent.tally import Tally
from ebbflow.edge.delivery.install import Installer
from ebbflow.edge.delivery.traffic import Brake, Traffic, TransferPausedError
from ebbflow.edge.delivery.trust import METADATA
from ebbflow.edge.serving.hub import Hub

log = structlog.get_logger(__name__)

# Not the release's fault: nothing is reported, the look is repeated soon.
NOT_THE_RELEASE = frozenset({
    Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED, Reason.QUOTA_EXHAUSTED, Reason.INTERNAL,
    Reason.AUTHORITY_MISMATCH, Reason.CERTIFICATE_REQUIRED, Reason.CERTIFICATE_INVALID, Reason.CERTIFICATE_EXPIRED,
    Reason.CERTIFICATE_REVOKED, Reason.AGENT_QUARANTINED, Reason.AGENT_NOT_FOUND, Reason.ROLE_INSUFFICIENT,
    Reason.STATE_CONFLICT,
})  # fmt: skip
# May be over soon, by what the operator or the cloud does.
_MAY_PASS = frozenset({Reason.DISK_FULL, Reason.OUT_OF_MEMORY, Reason.METADATA_EXPIRED, Reason.EXTRA_MISSING})


# Bytes came too slowly, or not at all; the cloud hears of it, so that somebody can find out why.
_HELD_UP = frozenset({Reason.SERVER_UNAVAILABLE, Reason.DEADLINE_EXCEEDED})
ALIVE_S = 60.0
"""Seconds between reports of a transfer that goes on: a rollout must not take slow for silent."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """When a release that was refused is tried again, in seconds."""

    passing_s: float = 300.0
    """After a lack of space, memory or fresh metadata, or metadata that does not verify: keys may be changing."""
    refused_s: float = 3600.0
    """After anything else; a new rollout of the release, or its retry, is tried at once."""


class Reconciler:
    """Starts what is installed, and follows the desired state from then on.

    One release is installed at a time. What is desired anew for another student is not kept waiting by a long transfer:
    the transfer is put off, the other student has its turn, and then the transfer goes on from where it was.

    Attributes:
        wake: called with the seconds after which to look again, if a release waits for its time.
        removed: called with the name of a student that no longer serves.
    """

    def __init__(
        self,
        cloud: Cloud,
        installer: Installer,
        hub: Hub,
        swapper: Swapper,
        profile: pb.DeviceProfile,
        installations: Installations,
        traffic: Traffic,
        now: Callable[[], dt.datetime],
        retry: Retry | None = None,
    ) -> None:
        """Takes the parts that it moves, what the device allows, and the time, which is aware."""
        self._cloud, self._installer, self._hub = cloud, installer, hub
        self._swapper, self._profile, self._installations = swapper, profile, installations
        self._traffic, self._now = traffic, now
        self._retry = retry or Retry()
        self._hinted = asyncio.Event()
        self._fetched = Tally()
        self._deferred: dict[str, bytes] = {}  # by student: what waits for a window
        self._precedence = Precedence()
        self.wake: Callable[[float], None] = lambda _: None
        self.removed: Callable[[str], None] = lambda _: None
        self._refused: dict[str, tuple[bytes, float]] = {}  # by student: what was said, and when to try it again

    def start(self) -> None:
        """Serves what is installed, without the network. Blocks while it loads.

        A student that cannot be loaded is left to the next installation.
        """
        for student_id in self._installer.students():
            try:
                self._swapper.start(student_id)
            except EbbflowError as error:
                log.error("release_not_started", student=student_id, reason=error.reason.name, cure=error.cure)

    def hint(self) -> None:
        """The desired state may have changed: an installation that runs is held against it again."""
        self._hinted.set()

    async def look(self) -> float:
        """Asks for the desired state and brings it about; returns the seconds until the next look.

        Raises:
            EbbflowError: why the cloud could not be asked, or could not deliver.
        """
        state = await self._desired_state()
        await self._remove_others({desired.student for desired in state.releases})
        self._precedence.begin([desired for desired in state.releases if not self._waits(desired)])
        due = [desired for desired in state.releases if self._is_due(desired)]
        try:
            for desired in self._precedence.order(due):
                if await self._follow(desired, float(state.poll_interval_s)):
                    self.wake(0.0)  # what is desired may be something else by now
                    break
        finally:
            await self._installations.send(self._cloud)
        return float(state.poll_interval_s)

    async def _desired_state(self) -> agent_pb2.GetDesiredStateResponse:
        self._hinted.clear()  # hints from here on may say more than the answer
        request = agent_pb2.GetDesiredStateRequest(profile=self._profile)
        return await self._cloud.agent.GetDesiredState(request)

    def _is_due(self, desired: agent_pb2.DesiredRelease) -> bool:
        """Whether there is something to install now; notes what serves already."""
        if not desired.release:  # the cloud has nothing for this device that it did not refuse: serving goes on
            return False
        if self._swapper.serves(desired):
            self._installations.note(desired, pb.INSTALLATION_STATE_SERVING)
            return False
        refused, again_s = self._refused.get(desired.student, (b"", 0.0))
        return not (refused == said_of(desired) and time.monotonic() < again_s) and not self._waits(desired)

    async def _follow(self, desired: agent_pb2.DesiredRelease, poll_s: float) -> bool:
        """Installs a release; returns False if that waits for a window."""
        wish, said = wish_of(desired), said_of(desired)
        self._precedence.take(desired)
        news = self._refused.get(desired.student, (b"", 0.0))[0] != said  # a second try is news only by its end
        if news and self._traffic.next_window_time() is None:
            self._installations.note(desired, pb.INSTALLATION_STATE_FETCHING)
            await self._installations.send(self._cloud)
        try:
            await self._carry_out(desired, wish, poll_s)
        except TransferPausedError as pause:
            self._pause(desired, wish, pause)
            return pause.braked
        except EbbflowError as error:
            fetched_bytes = self._fetched.add(desired.student, wish, *_fetched_of(error))
            if error.reason in NOT_THE_RELEASE:
                if error.reason in _HELD_UP:
                    self._installations.note(
                        desired,
                        pb.INSTALLATION_STATE_FETCHING,
                        reason=error.reason.name,
                        fetched_bytes=fetched_bytes,
                    )
                raise
            self._refuse(desired, error, said, fetched_bytes)
        return True

    def _waits(self, desired: agent_pb2.DesiredRelease) -> bool:
        """Whether it is too early; asks to be woken in time."""
        now = self._now()
        due = now
        if desired.HasField("not_before_time"):
            due = max(due, desired.not_before_time.ToDatetime(dt.UTC))
        if self._deferred.get(desired.student) == wish_of(desired):
            due = max(due, self._traffic.next_window_time() or due)
        if due > now:
            self.wake((due - now).total_seconds())
        return due > now

    async def _carry_out(self, desired: agent_pb2.DesiredRelease, wish: bytes, poll_s: float) -> None:
        """Installs in a thread, and pulls the brake as soon as something else goes before it or the agent ends."""
        brake = Brake()
        running = asyncio.get_running_loop().run_in_executor(None, self._install, desired, wish, brake)
        running.add_done_callback(lambda done: done.cancelled() or done.exception())
        done_bytes = 0
        try:
            while not running.done():
                hinted = asyncio.ensure_future(self._hinted.wait())
                both: set[asyncio.Future[Any]] = {running, hinted}
                await asyncio.wait(both, timeout=min(poll_s, ALIVE_S), return_when=asyncio.FIRST_COMPLETED)
                hinted.cancel()
                if running.done():
                    break
                if await self._is_to_stop(desired):
                    brake.pull()
                    break
                done_bytes = await self._say_alive(desired, done_bytes)
            await running
        finally:
            brake.pull()

    async def _say_alive(self, desired: agent_pb2.DesiredRelease, before_bytes: int) -> int:
        """Reports a transfer that has moved on; returns how far it is."""
        done_bytes = self._installer.progress.done_bytes
        if done_bytes > before_bytes:
            self._installations.note(desired, pb.INSTALLATION_STATE_FETCHING, fetched_bytes=done_bytes, again=True)
            try:
                await self._installations.send(self._cloud)
            except EbbflowError as error:  # it is told later; the transfer does not end for it
                log.info("progress_not_told", reason=error.reason.name)
        return done_bytes

    async def _is_to_stop(self, running: agent_pb2.DesiredRelease) -> bool:
        """Whether the cloud no longer wants what is being installed, or something else first.

        Nothing changes as long as the cloud does not say so.
        """
        try:
            state = await self._desired_state()
        except EbbflowError:
            return False
        if wish_of(running) not in map(wish_of, state.releases):
            log.info("transfer_given_up", release=running.release)
            return True
        students = {desired.student for desired in state.releases}
        others = [desired for desired in state.releases if desired.student != running.student]
        due = [desired for desired in others if self._is_due(desired) and self._precedence.is_new(desired)]
        if due or any(model.student not in students for model in self._hub.models()):
            log.info("transfer_put_off", release=running.release)
            return True
        return False

    def _pause(self, desired: agent_pb2.DesiredRelease, wish: bytes, pause: TransferPausedError) -> None:
        fetched_bytes = self._fetched.add(desired.student, wish, pause.fetched_bytes, pause.resumed_bytes)
        if pause.braked:
            log.info("transfer_stopped", release=desired.release, fetched_bytes=fetched_bytes)
            return
        self._deferred[desired.student] = wish
        log.info("transfer_deferred", release=desired.release, resume_time=str(pause.resume_time))
        self._installations.note(
            desired,
            pb.INSTALLATION_STATE_DEFERRED,
            fetched_bytes=fetched_bytes,
            resume_time=pause.resume_time,
        )
        self._waits(desired)

    def _install(self, desired: agent_pb2.DesiredRelease, wish: bytes, brake: Brake) -> None:
        installed, engine = self._swapper.install(desired, brake)
        self._refused.pop(desired.student, None)
        self._deferred.pop(desired.student, None)
        fetched_bytes = self._fetched.add(desired.student, wish, installed.fetched_bytes, installed.resumed_bytes)
        log.info(
            "release_serves",
            release=desired.release,
            precision=installed.precision,
            engine=engine.name,
            fetched_bytes=fetched_bytes,
        )
        self._installations.note(
            desired,
            pb.INSTALLATION_STATE_SERVING,
            probe_loss=installed.probe_loss,
            fetched_bytes=fetched_bytes,
        )

    def _refuse(self, desired: agent_pb2.DesiredRelease, error: EbbflowError, said: bytes, fetched_bytes: int) -> None:
        passing = error.reason in _MAY_PASS or error.metadata.get("of") == METADATA
        wait_s = self._retry.passing_s if passing else self._retry.refused_s
        self._refused[desired.student] = (said, time.monotonic() + wait_s)
        log.warning("release_refused", release=desired.release, reason=error.reason.name, why=str(error))
        self._installations.note(
            desired,
            pb.INSTALLATION_STATE_FAILED,
            reason=error.reason.name,
            probe_loss=float(error.metadata.get("probe_loss", 0.0)),
            fetched_bytes=fetched_bytes,
        )

    async def _remove_others(self, wanted: set[str]) -> None:
        for model in self._hub.models():
            if model.student not in wanted:
                self._hub.remove(model.student)
                self._installations.forget(model.student)
                self.removed(model.student)
                log.info("student_removed", student=model.student)
        ids = [names.parse(student, "students") for student in wanted]
        await asyncio.to_thread(self._installer.retain, ids)


def _fetched_of(error: EbbflowError) -> tuple[int, int]:
    return int(error.metadata.get("fetched_bytes", 0)), int(error.metadata.get("resumed_bytes", 0))
