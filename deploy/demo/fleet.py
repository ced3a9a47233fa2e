"""The demo's devices: real agent processes, enrolled with a token, on free ports."""

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.cloud import Cloud
from demo.processes import Child, DemoError, Processes, program, run

START_S = 60.0


@dataclass(frozen=True)
class Device:
    """One running agent."""

    name: str
    state: Path
    child: Child

    @property
    def url(self) -> str:
        """Base URL of its OpenAI-compatible API."""
        return str(tomllib.loads((self.state / "endpoints.toml").read_text())["http"])

    @property
    def fetched_bytes(self) -> int:
        """Bytes of releases that it has fetched."""
        return sum(event.get("fetched_bytes", 0) for event in self.events() if event["event"] == "release_serves")

    def ready(self) -> bool | None:
        """True once it listens, else None."""
        return (self.state / "endpoints.toml").exists() or None

    def events(self) -> Iterator[dict[str, Any]]:
        """What its log tells, one event a line."""
        for line in self.child.log.read_text(errors="replace").splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    @property
    def batch_bytes(self) -> int:
        """Bytes of feedback that it has sent: all that ever left it of what its users did."""
        return sum(event["size_bytes"] for event in self.events() if event["event"] == "batch_sent")


def start(count: int, folder: Path, cloud: Cloud, processes: Processes) -> list[Device]:
    """Enrols and starts agents.

    Raises:
        DemoError: one did not enrol or start.
    """
    token = cloud.token(uses=count)
    names = [f"kiosk-{number}" for number in range(1, count + 1)]
    for name in names:
        enrol = program("ebbflow.edge.main", "enrol", "--state", str(folder / name), "--name", name, "--new-device")
        done = run([*enrol, "--cloud", cloud.enrolment_address], {"EBBFLOW_EDGE_TOKEN": token})
        if done.returncode:
            raise DemoError(f"{name} could not enrol: {done.stderr.strip()}")
    settings = {
        "EBBFLOW_EDGE_HTTP_LISTEN": "127.0.0.1:0",
        "EBBFLOW_EDGE_GRPC_LISTEN": "127.0.0.1:0",
        "EBBFLOW_EDGE_CORES": "1",
        "EBBFLOW_EDGE_LOG_FORMAT": "json",
    }
    devices = []
    for name in names:
        command = program("ebbflow.edge.main", "run", "--state", str(folder / name))
        devices.append(Device(name, folder / name, processes.start(name, command, settings)))
    for device in devices:
        processes.wait(f"{device.name}'s start", device.ready, START_S, device.child.log)
    return devices
