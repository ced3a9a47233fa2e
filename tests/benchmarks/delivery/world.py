"""A real `ebbflow cloud serve` with a published release of the wanted size, and agents enrolled with it."""

import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deploy_world
from agent_world import CloudWorld
from delivery_world import a_manifest, weights_of

from ebbflow.cloud.registry.tables import Release
from ebbflow.cloud.services.cloud import Cloud
from ebbflow.common.codes.artefact import Precision
from ebbflow.common.trust.targets import path_of
from ebbflow.edge.agent.enrol import Wish, enrol
from ebbflow.edge.agent.profile import device_profile

STUDENT, RELEASE = "faq", 1
_MIB = 1 << 20


class BigRelease(CloudWorld):
    """A cloud whose one release holds random codes: nothing about it compresses."""

    def __init__(self, folder: Path, size_mb: int) -> None:
        super().__init__(folder, hint_spread_ms=0)
        self.size_mb = size_mb
        self.cloud = Cloud.open(self.settings)
        self.student(STUDENT)
        self.publish(RELEASE, STUDENT)

    def release_files(self) -> dict[str, Any]:
        """The release's files by target path, with "sha256" and "size_bytes"."""
        with self.cloud.registry.reading() as session:
            return dict(session.get_one(Release, (STUDENT, RELEASE)).targets)

    def _pack(
        self, number: int, student_id: str, probe_loss: float | None, layers: int, precisions: Sequence[Precision]
    ) -> dict[str, Any]:
        weights = weights_of(number, self.size_mb * _MIB)
        files = {
            "int8": weights,
            "tokenizer": self.tokenizer.to_bytes(),
            "manifest": a_manifest(number, student_id, len(weights)).to_json(),
        }
        blobs = {kind: self.cloud.blobs.put([data]) for kind, data in files.items()}
        return {
            path_of(student_id, number, kind): {"sha256": blob.sha256, "size_bytes": blob.size_bytes, "kind": kind}
            for kind, blob in blobs.items()
        }


@dataclass
class Serving:
    """A cloud that runs in a process of its own."""

    pid: int
    enrolment: str
    world: BigRelease

    def enrol(self, count: int) -> list[Path]:
        """Enrols devices over the network and assigns the release to them; returns their folders."""
        folders = []
        for _ in range(count):
            settings = self.world.device(f"device-{len(list(self.world.folder.glob('device-*')))}")
            wish = Wish(cloud=self.enrolment, token=self.world.token())
            self.world.assign(enrol(settings.folder, wish, device_profile(settings)), RELEASE, STUDENT)
            folders.append(settings.state)
        return folders


@contextmanager
def serving(folder: Path, size_mb: int) -> Iterator[Serving]:
    """Publishes a release and runs `ebbflow cloud serve --alone` over it."""
    world = BigRelease(folder, size_mb)
    bin_, home, log = deploy_world.command_lines(folder / "bin"), world.settings.home, folder / "cloud.log"
    given = {"EBBFLOW_LISTEN": "127.0.0.1:0", "EBBFLOW_ENROL_LISTEN": "127.0.0.1:0"}
    command = [bin_ / "ebbflow", "cloud", "serve", "--home", home, "--alone"]
    with deploy_world.process(command, given, log) as running:
        endpoints = home / "endpoints.toml"
        deploy_world.wait_for("binding", lambda: deploy_world.alive(running, log) and endpoints.exists())
        try:
            yield Serving(running.pid, tomllib.loads(endpoints.read_text())["enrolment"], world)
        finally:
            world.cloud.close()
