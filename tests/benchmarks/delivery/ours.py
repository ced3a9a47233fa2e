"""Ebbflow's own transfer: a real control plane, real agents' delivery code, each in a process of its own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from delivery.measure import Cost
from delivery.receivers import transfer
from delivery.world import Serving, serving

AGENT = Path(__file__).with_name("agent.py")


@contextmanager
def cloud(size_mb: int, most_agents: int) -> Iterator[tuple[Serving, list[Path]]]:
    """A control plane with one release, and devices that are enrolled with it."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder), size_mb) as running:
        yield running, running.enrol(most_agents)


def fetch(running: Serving, devices: list[Path]) -> Cost:
    """Moves the release to some devices at once."""
    return transfer(running.pid, [(AGENT, device) for device in devices], running.world.size_mb)
