"""The agent's one long line to the cloud: signs of life up, hints down. Hints are never truth."""

import asyncio
import datetime as dt
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog

from ebbflow.api.v1 import agent_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.agent.waiting import SHUT_OUT, Backoff, Pace, jittered
from ebbflow.edge.serving.faults import place_of

log = structlog.get_logger(__name__)

_WELCOME_S = 30.0
_LEAST_HEARTBEAT_S = 1.0


@dataclass
class LineState:
    """What the agent tells of its line to the cloud."""

    connected: bool = False
    disconnected_reason: str = ""
    """A word of the error catalogue; empty while connected and before the first attempt."""


@dataclass(frozen=True)
class Ears:
    """Who wants to know what the line says."""

    desired_state: Callable[[float], None]
    """Called with seconds of spread when the desired state may have changed."""
    plan: Callable[[float], None]
    """Likewise for plans of rounds."""


class Link:
    """Keeps the line open for ever."""

    def __init__(
        self,
        cloud: Cloud,
        profile: resources_pb2.DeviceProfile,
        telemetry: Callable[[], pb.Telemetry],
        ears: Ears,
        hear: Callable[[dt.datetime], None],
        pace: Pace | None = None,
    ) -> None:
        """Takes what the line carries, and who hears what time it is; nothing is opened before `run`."""
        self._cloud, self._profile, self._telemetry, self._ears = cloud, profile, telemetry, ears
        self._hear_time = hear
        self._pace = pace or Pace()
        self._instance_id = str(uuid.uuid4())
        self.state = LineState()

    async def run(self) -> None:
        """Connects, listens, and connects again after every end, with jittered and growing waits."""
        backoff = Backoff(self._pace)
        while True:
            begin_s = time.monotonic()
            error = await self._attempt()
            backoff.lasted(time.monotonic() - begin_s)
            if self._cloud.renewed.is_set():
                continue
            self._tell(error)
            await asyncio.sleep(backoff.failed(error))

    def _tell(self, error: EbbflowError | None) -> None:
        word = (error.reason if error else Reason.SERVER_UNAVAILABLE).name
        if word == self.state.disconnected_reason:
            return
        self.state.disconnected_reason = word
        if error and error.reason in SHUT_OUT:
            log.warning("shut_out", reason=word, cure=error.cure, still_serving=True)
        else:
            log.info("disconnected", reason=word)

    async def _attempt(self) -> EbbflowError | None:
        """One life of the line; returns why it ended, None if the cloud just closed it or the certificate changed."""
        self._cloud.renewed.clear()
        session = asyncio.create_task(self._session())
        renewed = asyncio.create_task(self._cloud.renewed.wait())
        try:
            await asyncio.wait({session, renewed}, return_when=asyncio.FIRST_COMPLETED)
            return _end_of(session) if session.done() else None
        finally:
            self.state.connected = False
            for task in (session, renewed):
                task.cancel()
            await asyncio.gather(session, renewed, return_exceptions=True)

    async def _session(self) -> EbbflowError | None:
        welcomed: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        call = self._cloud.agent.Connect(self._requests(welcomed))
        try:
            async with asyncio.timeout(_WELCOME_S) as limit:
                async for response in call:
                    limit.reschedule(None)
                    self._hear(response, welcomed)
        except EbbflowError as error:
            return error
        except TimeoutError:
            return EbbflowError(Reason.DEADLINE_EXCEEDED, "the cloud did not say welcome")
        except Exception as error:  # noqa: BLE001 - whatever the line trips over, the agent serves on and tries again
            log.error("line_failed", **place_of(error))
            return EbbflowError(Reason.INTERNAL, "the line to the cloud failed")
        finally:
            call.cancel()
            welcomed.cancel()
        return None

    async def _requests(self, welcomed: "asyncio.Future[float]") -> AsyncIterator[pb.ConnectRequest]:
        yield pb.ConnectRequest(hello=pb.Hello(instance_id=self._instance_id, profile=self._profile))
        interval_s = await welcomed
        while True:
            yield pb.ConnectRequest(heartbeat=await self._heartbeat())
            await asyncio.sleep(jittered(interval_s))

    async def _heartbeat(self) -> pb.Heartbeat:
        """A sign of life, without telemetry if a sensor or the disk fails."""
        try:
            return pb.Heartbeat(telemetry=await asyncio.to_thread(self._telemetry))
        except Exception as error:  # noqa: BLE001 - gRPC ends a line whose requests fail, and the device lives
            log.error("telemetry_failed", **place_of(error))
            return pb.Heartbeat()

    def _hear(self, response: pb.ConnectResponse, welcomed: "asyncio.Future[float]") -> None:
        if response.HasField("welcome") and not welcomed.done():
            self._hear_time(response.welcome.server_time.ToDatetime(dt.UTC))
            self.state.connected, self.state.disconnected_reason = True, ""
            log.info("connected", cloud=self._cloud.credentials.endpoint)
            welcomed.set_result(max(_LEAST_HEARTBEAT_S, response.welcome.heartbeat_interval_s))
            self._ears.desired_state(0.0)
            self._ears.plan(0.0)
        elif response.HasField("hint"):
            spread_s = response.hint.spread_ms / 1000
            if response.hint.subject != pb.Hint.SUBJECT_PLAN:
                self._ears.desired_state(spread_s)
            if response.hint.subject != pb.Hint.SUBJECT_DESIRED_STATE:
                self._ears.plan(spread_s)


def _end_of(session: "asyncio.Task[EbbflowError | None]") -> EbbflowError | None:
    """Why a session ended; gRPC cancels one whose requests fail."""
    if session.cancelled():
        log.error("line_failed", kind="CancelledError")
        return EbbflowError(Reason.INTERNAL, "the line to the cloud failed")
    return session.result()
