"""The demo's cloud: `ebbflow cloud serve` with its worker, gate and teacher, and what an admin asks of it."""

import json
import tomllib
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from google.protobuf.duration_pb2 import Duration

from demo import sizes
from demo.processes import Child, DemoError, Processes, program
from ebbflow.api.v1 import distillation_pb2 as dpb
from ebbflow.api.v1 import feedback_pb2, fleet_pb2, ledger_pb2, release_pb2, round_pb2, student_pb2
from ebbflow.api.v1 import rollout_pb2 as rpb
from ebbflow.client.admin import AdminClient, listed
from ebbflow.client.context import FILE_NAME
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.processes import init
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.common import names

START_S = 60.0
RUN_S = 900.0
"""Longest that a distillation, a rollout or a round may take."""
PARENT = names.make("students", sizes.STUDENT)


class Cloud:
    """A running cloud, and its owner's client.

    Attributes:
        home: Its folder.
        context: The owner's context file.
    """

    def __init__(self, home: Path, processes: Processes) -> None:
        """Takes a folder to be made."""
        self.home = home
        self.context = home / "admin" / FILE_NAME
        self._processes = processes
        self._server: Child | None = None
        self._client: AdminClient | None = None

    def start(self, teacher: Path) -> None:
        """Makes the cloud's folder and starts it on free ports.

        Raises:
            DemoError: It ended, or is not ready in time.
        """
        self.home.mkdir(parents=True)
        config = {
            "listen": "127.0.0.1:0",
            "enrol_listen": "127.0.0.1:0",
            "teacher_listen": "127.0.0.1:0",
            "teacher": str(teacher),
            "tick_interval_s": 0.25,
            "hint_spread_ms": 100,
            "heartbeat_interval_s": 2,
        }
        lines = [f"{name} = {json.dumps(value)}\n" for name, value in config.items()]
        (self.home / "config.toml").write_text("".join(lines))
        init.initialise(CloudSettings.load(self.home))
        command = program("ebbflow.cli.main", "cloud", "serve", "--home", str(self.home))
        self._server = self._processes.start("cloud", command, {})
        self._processes.wait("the cloud's start", self._bound, START_S, self._server.log)
        self._client = AdminClient.from_context(self.context)

    def close(self) -> None:
        """Closes the client; the processes end the server."""
        if self._client is not None:
            self._client.close()

    @property
    def admin(self) -> AdminClient:
        """The owner's client."""
        if self._client is None:
            raise DemoError("the cloud has not been started")
        return self._client

    @property
    def enrolment_address(self) -> str:
        """host:port of the listener for devices without a certificate."""
        return str(self._bound()["enrolment"])

    def _bound(self) -> dict[str, str]:
        """Where the listeners are; empty until they are."""
        path = self.home / "endpoints.toml"
        return tomllib.loads(path.read_text()) if path.exists() else {}
