"""Kills agents and cloud while a release is rolled out."""

import random
import signal
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from faults import invariants
from faults.machine import Machine, until
from faults.report import Report, place_of
from faults.world import PROCESSES, Device, World

INSTALL_S, START_S = 2.0, 0.35
STEPS_S = 60.0
"""Longest wait for operations that bring the next kill; an agent or a rollout that is stuck makes none."""
SPEEDS = (0, 4 << 20, 12 << 20)
"""Bytes per second of the wire; 0 for no limit."""


@dataclass(frozen=True)
class Blow:
    """One kill."""

    style: str
    """"time" or "start" (seconds after it is armed, the latter during a start), or "step" (file operations)."""
    after: float
    power: bool
    """Whether what was not synced is lost too."""
    offline: bool
    """Whether the restart has no network."""


def draw(chance: random.Random, operations: int, most: int) -> list[Blow]:
    """Draws kills of one machine."""
    drawn = []
    for number in range(chance.randint(1, most)):
        style = chance.choice(("time", "step", "step", "start")[: 4 if number else 3])
        after = {
            "time": chance.uniform(0, INSTALL_S),
            "step": float(chance.randint(1, operations)),
            "start": chance.uniform(0, START_S),
        }[style]
        drawn.append(Blow(style, after, chance.random() < 1 / 3, chance.random() < 1 / 4))
    return drawn


class Victim(ABC):
    """A machine, and the kills that wait for it."""

    processes: tuple[str, ...]

    def __init__(self, machine: Machine, plan: list[Blow], report: Report, chance: random.Random) -> None:
        self.machine, self.plan, self.report, self.chance = machine, plan, report, chance
        self._due_s = 0.0

    def arm(self) -> None:
        """Prepares the next kill."""
        self.machine["kill_at"] = 0
        if self.plan:
            blow = self.plan[0]
            self._due_s = time.monotonic() + blow.after
            if blow.style == "step":
                self.machine["kill_at"] = self.machine["operations"] + int(blow.after)

    def disarm(self) -> None:
        """Forgets what has not happened."""
        self.report.missed += len(self.plan)
        self.plan.clear()
        self.machine["kill_at"] = 0

    @property
    def waits_for_steps(self) -> bool:
        """Whether only an operation, and not time, brings its next kill."""
        return bool(self.plan) and self.plan[0].style == "step"

    def poll(self) -> None:
        """Kills if it is time, and sees to what follows."""
        if not self.plan or not (dead := self._killed(self.plan[0])):
            return
        blow = self.plan.pop(0)
        self.machine["kill_at"] = 0
        operation = "start" if blow.style == "start" else self._place()
        self.report.kills[f"{self.title(dead)}: {operation}"] += 1
        if blow.power:
            self.report.power_cuts += 1
            self.report.lost += len(self.machine.cut_power(self.chance))
        self.recover(blow)
        self.arm()

    def _killed(self, blow: Blow) -> str:
        """Name of the process that was killed just now, or nothing."""
        if blow.style == "step":
            for process in [name for name in self.processes if name in self.machine.pids]:
                status = self.machine.ended(process)
                if status is not None:
                    assert status == -signal.SIGKILL, f"{process}: {status}\n{self.machine.tail(process)}"
                    return process
            return ""
        if time.monotonic() < self._due_s:
            return ""
        self.machine.kill(self.processes[0])
        return self.processes[0]

    def _place(self) -> str:
        last = None
        for last in self.machine.operations():  # noqa: B007 - only the last one is wanted
            pass
        return place_of(last, self.machine.disk)

    @abstractmethod
    def title(self, process: str) -> str:
        """What died, for people."""

    @abstractmethod
    def recover(self, blow: Blow) -> None:
        """Checks what is left, and starts again."""


class AgentVictim(Victim):
    """An agent on its way from one release to the next."""

    processes = ("agent",)

    def __init__(self, world: World, device: Device, target: int, plan: list[Blow], report: Report) -> None:
        super().__init__(device.machine, plan, report, world.chance)
        self.world, self.device = world, device
        self.allowed = {invariants.slots_of(device)["current"]["release"], target}
        self._target = target

    def title(self, process: str) -> str:
        return process

    def recover(self, blow: Blow) -> None:
        invariants.files_are_whole(self.world, self.device)
        if invariants.told(self.world, self.device) == self._target:
            self.allowed = {self._target}
        if blow.offline:
            self.world.wire.cut()
        try:
            self.device.start()
            if not self.plan or self.plan[0].style != "start":
                until(f"the start of {self.device.name}", self.device.alive)
                invariants.serves(self.world, self.device, self.allowed)
        finally:
            self.world.wire.join()


class CloudVictim(Victim):
    """The cloud while it hands out a release."""

    processes = PROCESSES

    def __init__(self, world: World, plan: list[Blow], report: Report, watched: AgentVictim) -> None:
        super().__init__(world.cloud, plan, report, world.chance)
        self.world, self._watched = world, watched

    def title(self, process: str) -> str:
        return f"cloud {process}"

    def recover(self, blow: Blow) -> None:
        device = self._watched.device
        if blow.offline and "agent" in device.machine.pids and device.address and not self._watched.plan:
            invariants.serves(self.world, device, self._watched.allowed)
        waits = not self.plan or self.plan[0].style != "start"
        self.world.start_cloud(wait=waits)
        if waits:
            invariants.cloud_is_sound(self.world)


def roll_out(world: World, chance: random.Random, report: Report) -> None:
    """Rolls another release out while agents and, now and then, the cloud are killed; in the end all serve it."""
    world.chance = chance
    serving = invariants.slots_of(world.devices[0])["current"]["release"]
    target = chance.choice([number for number in world.files if number != serving])
    world.wire.bytes_per_second = chance.choice(SPEEDS)
    agents = [
        AgentVictim(world, device, target, draw(chance, world.install_operations, 2), report)
        for device in world.devices
    ]
    victims: list[Victim] = [*agents]
    if chance.random() < 1 / 2:
        victims.append(CloudVictim(world, draw(chance, world.rollout_operations, 2), report, agents[0]))
    for agent in agents:
        agent.arm()
    world.roll_out(target)
    for victim in victims[len(agents) :]:
        victim.arm()
    _strike(world, victims, target)
    world.wire.bytes_per_second = 0
    invariants.converged(world, target)
    invariants.cloud_is_sound(world)
    for device in world.devices:
        device.machine.settle()
    report.episodes["rollout"] += 1


def _strike(world: World, victims: list[Victim], target: int) -> None:
    """Goes on until every kill has happened, or can happen no more; what then hangs, `converged` says."""
    begin_s = last_s = time.monotonic()
    while waiting := [victim for victim in victims if victim.plan]:
        left = sum(len(victim.plan) for victim in waiting)
        for victim in waiting:
            victim.poll()
        now_s = time.monotonic()
        if sum(len(victim.plan) for victim in waiting) < left:
            last_s = now_s
        if now_s - begin_s > INSTALL_S and all(victim.waits_for_steps for victim in waiting):
            arrived = all(invariants.told(world, device) == target for device in world.devices)
            if arrived or now_s - last_s > STEPS_S:
                break
            time.sleep(0.05)
        time.sleep(0.005)
    for victim in victims:
        victim.disarm()
