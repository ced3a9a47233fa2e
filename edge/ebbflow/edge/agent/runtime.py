"""The agent as a process: puts the parts together, runs them, and takes them apart in order."""

import asyncio
import datetime as dt
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import structlog

from ebbflow.api.v1 import agent_pb2, inference_pb2, inference_pb2_grpc, resources_pb2
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.rpc.server import add_health_and_reflection, bind, make_server, stop_on_signals
from ebbflow.edge.agent.cloud import Cloud
from ebbflow.edge.agent.credentials import CredentialFiles
from ebbflow.edge.agent.device_figures import DeviceCollector
from ebbflow.edge.agent.endpoints import Endpoints
from ebbflow.edge.agent.governing import Governing
from ebbflow.edge.agent.installations import Installations
from ebbflow.edge.agent.likeness import Likeness
from ebbflow.edge.agent.link import Ears, Link
from ebbflow.edge.agent.local import ceiling_of, identity_of, open_store
from ebbflow.edge.agent.machine import Machine
from ebbflow.edge.agent.profile import device_profile
from ebbflow.edge.agent.reconcile import Reconciler
from ebbflow.edge.agent.renewal import Renewal
from ebbflow.edge.agent.retention import Purges, retain
from ebbflow.edge.agent.rounds import Rounds
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.swapping import Room, Swapper
from ebbflow.edge.agent.teacher import Teacher, escalation_of
from ebbflow.edge.agent.telemetry import telemetry
from ebbflow.edge.agent.transfers import transfers
from ebbflow.edge.agent.updates import Updates
from ebbflow.edge.agent.version import agent_version
from ebbflow.edge.agent.waiting import Pace, uniform
from ebbflow.edge.agent.watcher import Watcher
from ebbflow.edge.delivery.clock import TrustClock
from ebbflow.edge.delivery.install import Installer
from ebbflow.edge.delivery.limit import chunk_bytes
from ebbflow.edge.delivery.slots import SlotStore
from ebbflow.edge.delivery.traffic import Traffic
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.clock import FeedbackClock
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.escalation_figures import EscalationCollector
from ebbflow.edge.serving.figures import StudentCollector
from ebbflow.edge.serving.health import Health, add_health
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.metrics import Metrics
from ebbflow.edge.serving.rpc import SERVICE, InferenceServicer
from ebbflow.edge.serving.server import HttpServer, is_loopback

log = structlog.get_logger(__name__)

_MIB = 2**20


class Agent:
    """All parts of one agent. Made on the running event loop, with the state folder locked.

    Attributes:
        traffic: when and how fast weights may be fetched.
        metrics: what the device does, for whoever runs it.
        health: whether requests are answered.
        swapper: starts releases, and lets a new one take over.
        governing: fits threads and precision to the load.
    """

    def __init__(self, settings: AgentSettings, pace: Pace | None = None) -> None:
        """Opens files, channels and ports; nothing is sent or answered yet.

        Raises:
            EbbflowError: NOT_ENROLLED, FILE_CORRUPT, DISK_FULL, PORT_IN_USE, CONFIG_INVALID.
        """
        self._settings, folder = settings, settings.folder
        ceiling = ceiling_of(settings)
        rate = settings.bandwidth_limit
        self.cloud = Cloud(CredentialFiles(folder), chunk_bytes(rate) if rate else 0)
        self.store = open_store(settings, identity_of(settings))
        self.metrics = Metrics()
        self.hub = Hub(Limits(running=settings.running, queued=settings.queued), self.metrics.meters)
        self.metrics.add(StudentCollector(self.hub))
        self.metrics.add(DeviceCollector(lambda: self.connected))
        self.health = Health(self.hub)
        trust = TrustClient(folder.trust, self.cloud.credentials.trust_root, self.cloud.source)
        self._clock = FeedbackClock(self.store.last_charge_time())
        self.traffic = Traffic(rate, settings.windows, trust.clock.now)
        self._installer = Installer(folder.releases, trust, self.cloud.source, traffic=self.traffic)
        profile = device_profile(settings)
        self.installations = Installations(trust.clock.now)
        load = partial(_load, settings, profile)
        self.swapper = Swapper(self.hub, self._installer, load, settings.swap, partial(_room, profile, Machine()))
        self._reconciler = Reconciler(
            self.cloud,
            self._installer,
            self.hub,
            self.swapper,
            profile,
            self.installations,
            self.traffic,
            trust.clock.now,
        )
        self.governing = Governing(self.hub, settings, profile.memory_mib * _MIB, trust.clock.now)
        updates = Updates(SlotStore(folder.releases), self.store)
        likeness = Likeness(self.hub, partial(_room, profile, Machine()))
        rounds = Rounds(self.cloud, trust, self.store, likeness, ceiling, updates, self._clock, pace)
        self._look = Watcher("desired_state", self._reconciler.look, pace)
        self._reconciler.wake = self._look.wake_in
        self._reconciler.removed = self.metrics.forget
        self._rounds = Watcher("plan", rounds.look, pace)
        self._others = [
            Watcher("certificate", Renewal(self.cloud, trust.clock).look, pace),
            Watcher("retention", partial(retain, self.store, self._clock), pace),
            Watcher("purges", Purges(folder.purged, self.hub.forget_prompts).look, pace),
            Watcher("governor", self.governing.look, pace),
        ]
        ears = Ears(desired_state=self._hint, plan=self._rounds.hint)
        self.link = Link(self.cloud, profile, self._telemetry, ears, partial(_hear, trust.clock, self._clock), pace)
        self._teacher = Teacher(settings.teacher, lambda: self.cloud.credentials)
        escalation = escalation_of(settings, self._teacher, self._installer)
        if escalation:
            self.metrics.add(EscalationCollector(escalation))
        self._answering = Answering(self.hub, self.store, self._clock.now, escalation)
        self._open_ports()

    def _open_ports(self) -> None:
        settings = self._settings
        key = settings.api_key.get_secret_value() if settings.api_key else None
        loopback = is_loopback(settings.http_listen)
        if not loopback and key is None:
            log.warning("http_open_to_the_network", listen=settings.http_listen, cure="set api_key")
        app = create_app(self.hub, self._answering, self.store, key, loopback=loopback)
        add_health(app, self.health, self.metrics, key)
        self._http = HttpServer(app, settings.http_listen, settings.grace_s)
        self._grpc = make_server()
        servicer = InferenceServicer(self.hub, self._answering, self.store, self, self.governing.status)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, self._grpc)
        self._grpc_health = add_health_and_reflection(self._grpc, [SERVICE])
        host, tls = settings.grpc_listen.rpartition(":")[0], settings.grpc_certificate is not None
        if not tls and not is_loopback(settings.grpc_listen):
            log.warning("grpc_open_to_the_network", listen=settings.grpc_listen, cure="set grpc_certificate")
        port = bind(self._grpc, settings.grpc_listen, _server_credentials(settings))
        self.endpoints = Endpoints(f"http://{self._http.address}/v1", f"{host}:{port}", grpc_tls=tls)

    @property
    def connected(self) -> bool:
        """Whether there is a live line to the cloud."""
        return self.link.state.connected

    @property
    def disconnected_reason(self) -> str:
        """Why there is none, as a word of the error catalogue."""
        return self.link.state.disconnected_reason

    def last_installations(self) -> dict[str, resources_pb2.Installation]:
        """The last installation of each student, by its name."""
        return self.installations.last()

    def transfers(self) -> inference_pb2.GetModelStatusResponse:
        """What is being fetched, and when and how fast that is allowed."""
        return transfers(self._installer.progress, self.traffic)

    def _hint(self, spread_s: float) -> None:
        """Looks within the spread, also while an installation runs."""
        self._look.hint(spread_s)
        asyncio.get_running_loop().call_later(uniform(0.0, spread_s), self._reconciler.hint)

    async def run(self, stop: asyncio.Event, ready: Callable[[Endpoints], None]) -> None:
        """Serves what is installed at once, then looks for the cloud; drains when `stop` is set.

        Args:
            stop: ends the agent; running requests may take the configured grace to finish.
            ready: called once requests are answered.

        Raises:
            EbbflowError: INTERNAL if a part of the agent ended by itself: its supervisor is to start it anew.
        """
        await asyncio.to_thread(self._reconciler.start)
        await asyncio.gather(self._http.start(), self._grpc.start())
        with self.endpoints.published(self._settings.folder):
            ready(self.endpoints)
            for watcher in self._others:
                watcher.hint()
            loops = [self.link.run(), *(watcher.run() for watcher in (self._look, self._rounds, *self._others))]
            tasks = [asyncio.create_task(loop) for loop in loops]
            self._look.hint()
            self._rounds.hint()
            ended = await _first_ended(stop, tasks)
        log.info("draining", grace_s=self._settings.grace_s)
        await self._drain(tasks)
        for task in ended:
            cause = None if task.cancelled() else task.exception()
            raise EbbflowError(Reason.INTERNAL, "a part of the agent ended by itself") from cause

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        self.health.drain()
        await self._grpc_health.enter_graceful_shutdown()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(self._stop_http(), self._grpc.stop(self._settings.grace_s))
        await self.close()

    async def _stop_http(self) -> None:
        """Tells how the agent is as long as requests run, but no longer than the grace."""
        try:
            async with asyncio.timeout(self._settings.grace_s):
                await self.health.idle()
        except TimeoutError:
            log.warning("requests_cut_off", grace_s=self._settings.grace_s)
        await self._http.stop(grace_s=1)

    async def close(self) -> None:
        """Closes what `__init__` opened."""
        self.governing.close()
        await asyncio.to_thread(self.hub.stop)
        await asyncio.gather(self.cloud.close(), self._teacher.close())
        self.store.close()

    def _telemetry(self) -> agent_pb2.Telemetry:
        return telemetry(self._settings.state, self.installations.last().values())


async def run(settings: AgentSettings, ready: Callable[[Endpoints, str], None]) -> None:
    """Runs an agent until SIGTERM or SIGINT.

    Args:
        settings: the agent's settings.
        ready: called with the endpoints and the agent's name once requests are answered.

    Raises:
        EbbflowError: why it could not start: AGENT_RUNNING, or as `Agent`.
    """
    with settings.folder.locked():
        stop = stop_on_signals()
        agent = Agent(settings)
        log.info("starting", agent=agent.cloud.credentials.agent, version=agent_version())
        await agent.run(stop, lambda endpoints: ready(endpoints, agent.cloud.credentials.agent))


async def _first_ended(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Waits until the agent is to stop, or a task ends that never should; returns such tasks."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return {task for task in tasks if task.done()}


def _hear(trust: TrustClock, feedback: FeedbackClock, server_time: dt.datetime) -> None:
    trust.hear(server_time)
    feedback.hear(server_time)


def _load(settings: AgentSettings, profile: resources_pb2.DeviceProfile, weights_path: Path) -> Engine:
    return load_engine(
        weights_path,
        settings.engine,
        threads=settings.cores or None,
        context_tokens=settings.context_tokens or None,
        memory_limit_bytes=profile.memory_mib * _MIB,
    )


def _room(profile: resources_pb2.DeviceProfile, machine: Machine) -> Room:
    return Room(profile.memory_mib * _MIB, machine.read(time.monotonic()).memory_available_bytes)


def _server_credentials(settings: AgentSettings) -> Any:
    if settings.grpc_certificate is None or settings.grpc_key is None:
        return None
    try:
        chain = (settings.grpc_key.read_bytes(), settings.grpc_certificate.read_bytes())
    except OSError as error:
        message = f"{error.filename} cannot be read: {error.strerror}"
        raise EbbflowError(Reason.CONFIG_INVALID, message, path=error.filename) from error
    return grpc.ssl_server_credentials([chain])
