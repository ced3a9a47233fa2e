"""All live lines of this replica: hints go down, heartbeats come up and are written together.

Two processes that live under one identity are noticed by this: a process that takes a line over makes the one before
it history, so when that one beats again, or opens a line again, there are two. Both are shut out until an admin has
looked.
"""

import asyncio
import datetime as dt
import logging
from collections import deque
from collections.abc import Iterable

from ebbflow.api.v1 import agent_pb2 as pb
from ebbflow.api.v1 import resources_pb2
from ebbflow.cloud.registry import changes, clock
from ebbflow.cloud.registry.tables import AgentState
from ebbflow.cloud.services import installations, presence
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.cloud.services.faults import describe
from ebbflow.cloud.services.line import Line
from ebbflow.common.errors import EbbflowError, Reason

_log = logging.getLogger(__name__)

SPREAD_MS_PER_AGENT = 5
"""Few agents need not wait: a fleet of 10 spreads over 50 ms, up to the settings' most."""
OVERLAP = dt.timedelta(seconds=10)
"""How far the clocks of two replicas may differ before a hint is missed; the agents' own timer catches it then."""
REMEMBERED = 8
"""Former processes of an agent that are remembered."""


class Hub:
    """Lines by agent. Everything but SQL happens on the event loop."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud
        self._lines: dict[str, Line] = {}
        self._history: dict[str, list[Line]] = {}
        self._former: dict[str, deque[str]] = {}
        self._beats: dict[str, presence.Beat] = {}
        self._gone: dict[str, str] = {}
        self._news: deque[tuple[str, resources_pb2.Installation]] = deque()
        self._revisions: dict[str, int] = {}
        self._seen_time = clock.now()
        self._nudge = asyncio.Event()

    def __len__(self) -> int:
        return len(self._lines)

    async def open(self, agent_id: str, hello: pb.Hello) -> Line:
        """Gives an agent's process the line of its agent.

        Raises:
            EbbflowError: AGENT_QUARANTINED if another process has taken the identity over before.
        """
        line = Line(agent_id, hello.instance_id)
        profile = hello.profile if hello.HasField("profile") else None
        before = await self._cloud.write(
            lambda session: presence.take_line(session, agent_id, line.instance_id, profile, clock.now())
        )
        former = self._former.setdefault(agent_id, deque(maxlen=REMEMBERED))
        if before is None:
            former.clear()  # an admin has reinstated it
        if line.instance_id in former and before != line.instance_id:
            await self.quarantine(agent_id)
            raise _quarantined(agent_id)
        if before is not None and before != line.instance_id and before not in former:
            former.append(before)
        self._replace(line)
        if self._cloud.draining.is_set():
            line.end()
        return line

    def beat(self, line: Line, telemetry: pb.Telemetry) -> bool:
        """Takes a heartbeat. False means that its process is history, so that the identity is used twice."""
        if line.superseded:
            return False
        self._beats[line.agent_id] = presence.Beat(line.instance_id, clock.now(), telemetry)
        return True

    def close(self, line: Line) -> None:
        """Forgets a line that has ended."""
        history = self._history.get(line.agent_id, [])
        if line in history:
            history.remove(line)
            if not history:
                del self._history[line.agent_id]
        if self._lines.get(line.agent_id) is line:
            del self._lines[line.agent_id]
            self._gone[line.agent_id] = line.instance_id

    async def quarantine(self, agent_id: str) -> None:
        """Shuts out every process under an identity."""
        await self._cloud.write(lambda session: presence.quarantine(session, agent_id, clock.now()))
        _log.warning("quarantined agents/%s: %s", agent_id, presence.CLONED)
        self._end_all(agent_id, _quarantined(agent_id))

    def shut_out(self, agent_id: str, error: EbbflowError) -> None:
        """Ends every line of an agent that may no longer take part."""
        self._end_all(agent_id, error)

    def nudge(self) -> None:
        """Makes `run` look at once: this replica has changed something."""
        self._nudge.set()

    def drain(self) -> None:
        """Ends every line in good order; the agents connect to another replica."""
        self._cloud.draining.set()
        for line in [*self._lines.values(), *(line for lines in self._history.values() for line in lines)]:
            line.end()

    async def run(self, interval_s: float) -> None:
        """Writes heartbeats and looks for changes, every so often, until cancelled."""
        while True:
            try:
                await self.step()
            except EbbflowError as error:
                _log.warning("the hub waits for the registry: %s", error.reason.name)
            except Exception as error:  # noqa: BLE001 - whatever one agent sent, the lines of the others must live on
                _log.error("the hub dropped a round of heartbeats: %s", describe(error))
            try:
                async with asyncio.timeout(interval_s):  # Python 3.11's wait_for may swallow a cancellation
                    await self._nudge.wait()
            except TimeoutError:
                continue
            self._nudge.clear()

    async def step(self) -> None:
        """Writes what has come and sends the hints that are due."""
        await self._write()
        while self._news:
            await self._heal_next()
        revisions = await self._cloud.read(changes.revisions)
        changed = {subject for subject, revision in revisions.items() if self._revisions.get(subject) != revision}
        since, now = self._seen_time, clock.now()
        if "plan" in changed:
            self._hint(self._lines, pb.Hint.SUBJECT_PLAN)
        if "desired_state" in changed:
            agents = await self._cloud.read(lambda session: presence.reassigned(session, since - OVERLAP))
            self._hint(agents, pb.Hint.SUBJECT_DESIRED_STATE)
            await self._end_shut_out()
        # Only now: what failed on the way is looked at again.
        self._seen_time, self._revisions = now, revisions

    async def _write(self) -> None:
        beats, self._beats = self._beats, {}
        gone, self._gone = self._gone, {}
        if not beats and not gone:
            return
        try:
            written = await self._cloud.write(lambda session: presence.write_beats(session, beats))
            await self._cloud.write(lambda session: presence.drop_lines(session, gone))
        except EbbflowError:
            self._beats, self._gone = beats | self._beats, gone | self._gone
            raise
        for agent_id in written.cloned:
            await self.quarantine(agent_id)
        self._news += [
            (agent_id, each) for agent_id in written.news for each in beats[agent_id].telemetry.installations
        ]

    async def _heal_next(self) -> None:
        agent_id, installation = self._news.popleft()
        try:
            await self._cloud.write(lambda session: installations.heal(session, agent_id, installation, clock.now()))
        except EbbflowError as error:
            if error.reason is Reason.DATABASE_UNAVAILABLE:
                self._news.appendleft((agent_id, installation))
            raise

    def _hint(self, agents: Iterable[str], subject: "pb.Hint.Subject.ValueType") -> None:
        lines = [self._lines[agent_id] for agent_id in agents if agent_id in self._lines]
        spread_ms = min(self._cloud.settings.hint_spread_ms, SPREAD_MS_PER_AGENT * len(lines))
        for line in lines:
            line.hint(subject, spread_ms)

    async def _end_shut_out(self) -> None:
        for agent_id, state in (await self._cloud.read(presence.shut_out)).items():
            if agent_id in self._lines or agent_id in self._history:
                revoked = EbbflowError(Reason.CERTIFICATE_REVOKED, f"agents/{agent_id} was revoked")
                self._end_all(agent_id, revoked if state is AgentState.REVOKED else _quarantined(agent_id))

    def _replace(self, line: Line) -> None:
        old = self._lines.get(line.agent_id)
        self._lines[line.agent_id] = line
        self._gone.pop(line.agent_id, None)
        if old is None:
            return
        if old.instance_id == line.instance_id:
            old.end()
            return
        old.superseded = True
        if (beat := self._beats.get(line.agent_id)) and beat.instance_id == old.instance_id:
            del self._beats[line.agent_id]
        self._history.setdefault(line.agent_id, []).append(old)

    def _end_all(self, agent_id: str, error: EbbflowError) -> None:
        current = self._lines.get(agent_id)
        for line in [*self._history.get(agent_id, []), *([current] if current else [])]:
            line.end(error)


def _quarantined(agent_id: str) -> EbbflowError:
    return EbbflowError(Reason.AGENT_QUARANTINED, f"{presence.CLONED}: agents/{agent_id} is quarantined")
