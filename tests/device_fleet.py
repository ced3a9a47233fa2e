"""A rollout over devices that exist in memory only, with a clock of its own."""

import datetime as dt
from typing import Any

from ebbflow.cloud.rollout import machine, phases
from ebbflow.cloud.rollout.phases import Member, Phase
from ebbflow.cloud.rollout.state import Device, Rollout, Step

NOW = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
SECOND = dt.timedelta(seconds=1)
OLD, NEW = 1, 2


class Fleet:
    """A rollout over devices, with a clock of its own."""

    def __init__(self, plan: tuple[Phase, ...], agents: int, previous: int | None = OLD, **fields: Any) -> None:
        self.now = NOW
        self.rollout = Rollout(release_number=NEW, phases=plan, rollout_id="r1", phase_begin_time=NOW, **fields)
        members = phases.freeze([Member(f"agent-{number:03d}") for number in range(agents)], plan)
        self.devices = {
            agent: Device(agent_id=agent, phase=phase, previous_number=previous) for agent, phase in members.items()
        }
        self.tick()

    def tick(self, later: dt.timedelta = dt.timedelta(0)) -> None:
        self.now += later
        self.keep(machine.tick(self.rollout, self.devices.values(), self.now))

    def keep(self, step: Step) -> None:
        self.rollout = step.rollout
        self.devices = {device.agent_id: device for device in step.devices}

    def desired(self) -> dict[str, int | None]:
        return {agent: machine.desired(self.rollout, device, self.now) for agent, device in self.devices.items()}

    def wanting(self, number: int) -> list[str]:
        return [agent for agent, wanted in self.desired().items() if wanted == number]

    def tell(self, agent: str) -> None:
        self.devices[agent] = machine.tell(self.rollout, self.devices[agent], self.now)

    def answer(self, agent: str, succeeded: bool = True) -> None:
        self.tell(agent)
        reason = "" if succeeded else "PROBE_LOSS"
        self.devices[agent] = machine.answer(self.devices[agent], succeeded, self.now, reason)


CANARY_THEN_ALL = (Phase(share=0.1, soak=10 * SECOND), Phase(failure_share=0.2, success_share=0.8, min_answers=3))
