"""The hub ends when it is told to, and loses no change, whatever happens at that moment."""

import asyncio
from typing import Any

import pytest

from ebbflow.api.v1 import agent_pb2
from ebbflow.api.v1 import resources_pb2 as rpb
from ebbflow.cloud.registry import changes
from ebbflow.cloud.registry.tables import Agent, AgentState, Assignment
from ebbflow.cloud.services.hub import Hub
from ebbflow.common.errors import EbbflowError, Reason

Plane = Any


async def test_a_hub_that_is_nudged_and_cancelled_at_once_ends(plane: Plane) -> None:
    hub = Hub(plane.cloud)
    running = asyncio.create_task(hub.run(60.0))
    await asyncio.sleep(0.5)
    hub.nudge()
    running.cancel()
    done, _ = await asyncio.wait({running}, timeout=60)
    assert done == {running}
    assert running.cancelled()


class Unreliable:
    """A cloud whose registry fails at chosen calls; the plane's own hub has the reliable one."""

    def __init__(self, cloud: Any) -> None:
        self._cloud = cloud
        self.failing: list[bool] = []
        """For each of the next calls."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cloud, name)

    async def read(self, work: Any) -> Any:
        self._fail()
        return await self._cloud.read(work)

    async def write(self, work: Any) -> Any:
        self._fail()
        return await self._cloud.write(work)

    def _fail(self) -> None:
        if self.failing and self.failing.pop(0):
            raise EbbflowError(Reason.DATABASE_UNAVAILABLE, "it fails over")


async def steps(hub: Hub, count: int) -> int:
    """Looks some times; returns how often that failed."""
    failures = 0
    for _ in range(count):
        try:
            await hub.step()
        except EbbflowError:
            failures += 1
    return failures


async def test_a_change_that_could_not_be_looked_at_is_looked_at_again(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.agent("kiosk-7")
    plane.student()
    plane.release()
    cloud: Any = Unreliable(plane.cloud)
    hub = Hub(cloud)
    line = await hub.open("kiosk-7", agent_pb2.Hello(instance_id="a"))
    await hub.step()
    hinted: list[list[str]] = []
    monkeypatch.setattr(hub, "_hint", lambda agents, _: hinted.append(list(agents)))
    plane.roll_out("faq", 1)
    cloud.failing = [False, True]  # it sees the change, and cannot read whom it concerns
    assert await steps(hub, 3) == 1
    assert hinted == [["kiosk-7"]]
    with plane.registry.transaction() as session:
        session.get_one(Agent, "kiosk-7").state = AgentState.REVOKED
        changes.bump(session, "desired_state")
    cloud.failing = [False, False, True]
    assert await steps(hub, 3) == 1
    with pytest.raises(EbbflowError) as caught:
        async for _ in line.hints():
            pass
    assert caught.value.reason is Reason.CERTIFICATE_REVOKED


async def test_what_a_heartbeat_tells_is_kept_until_it_is_written(plane: Plane) -> None:
    plane.agent("kiosk-7")
    plane.student()
    plane.release()
    plane.roll_out("faq", 1)
    cloud: Any = Unreliable(plane.cloud)
    hub = Hub(cloud)
    line = await hub.open("kiosk-7", agent_pb2.Hello(instance_id="a"))
    serving = rpb.Installation(
        student="students/faq", release="students/faq/releases/1", state=rpb.INSTALLATION_STATE_SERVING
    )
    cloud.failing = [False, False, True]  # the heartbeat is written, and what follows from it is not
    hub.beat(line, agent_pb2.Telemetry(installations=[serving]))
    assert await steps(hub, 3) == 1
    with plane.registry.reading() as session:
        assert session.get_one(Assignment, ("kiosk-7", "faq")).serving_number == 1
