"""The delivery side of a device, with the smallest real engine. For tests; imports nothing of the cloud."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import numpy as np
from numpy.typing import NDArray

from ebbflow.api.v1 import agent_pb2, resources_pb2
from ebbflow.client.channels import sync_channel
from ebbflow.client.endpoint import Endpoint
from ebbflow.common.student.config import StudentConfig
from ebbflow.edge.delivery.clock import TrustClock
from ebbflow.edge.delivery.download import Patience
from ebbflow.edge.delivery.fetcher import ArtefactSource
from ebbflow.edge.delivery.install import InstalledRelease, Installer
from ebbflow.edge.delivery.trust import TrustClient
from ebbflow.edge.engine.base import Engine, Logits, StepEntry

VOCABULARY = 16
PRECISION = resources_pb2.PRECISION_INT8


class BigramEngine:
    """The smallest real engine: the next token depends on the last one only. Has what delivery asks of an engine."""

    name, precision, context_tokens = "bigram", "int8", 1 << 20
    kept_bf16: tuple[str, ...] = ()
    config: StudentConfig

    def __init__(self, weights_path: Path) -> None:
        with np.load(weights_path, allow_pickle=False) as arrays:
            self.table_VV: NDArray[np.float32] = arrays["table"]
            self.number = int(arrays["number"])

    def open(self) -> int:
        return 0

    def close(self, slot: int) -> None:
        pass

    def step(self, entries: Sequence[StepEntry]) -> list[Logits]:
        logits = [self.table_VV[list(entry.token_ids)] for entry in entries]
        return [rows if entry.want == "all" else rows[-1] for rows, entry in zip(logits, entries, strict=True)]

    def embed(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = self.table_VV[list(token_ids)].mean(axis=0)
        return mean


def load_bigram(weights_path: Path) -> Engine:
    return cast("Engine", BigramEngine(weights_path))


@dataclass
class Device:
    """The delivery side of one agent."""

    folder: Path
    source: ArtefactSource
    trust: TrustClient
    installer: Installer
    channel: grpc.Channel

    def install(self, number: int, student_id: str = "faq", rollout: str = "rollouts/one") -> InstalledRelease:
        """Installs and commits, as the agent's reconciler does."""
        installed, engine = self.installer.install(desired(number, student_id, rollout), load_bigram)
        assert isinstance(engine, BigramEngine)
        assert engine.number == number
        self.installer.commit(installed)
        return installed

    def serving(self, student_id: str = "faq") -> int | None:
        """Number of the release that would serve after a restart of the agent."""
        started = self.installer.start(student_id, load_bigram)
        if started is None:
            return None
        installed, engine = started
        assert isinstance(engine, BigramEngine)
        assert engine.number == installed.number
        return installed.number


def start_device(
    folder: Path, endpoint: Endpoint, root: bytes, silence_s: float = 30.0, clock: TrustClock | None = None
) -> Device:
    """Starts (again) the device whose files are in a folder."""
    channel = sync_channel(endpoint)
    source = ArtefactSource(channel, silence_s)
    trust = TrustClient(folder / "trust", root, source, clock)
    installer = Installer(folder / "students", trust, source, Patience(attempts=3, first_wait_s=0.02))
    return Device(folder, source, trust, installer, channel)


def desired(number: int, student_id: str = "faq", rollout: str = "rollouts/one") -> agent_pb2.DesiredRelease:
    """What the cloud assigns."""
    return agent_pb2.DesiredRelease(
        student=f"students/{student_id}",
        release=f"students/{student_id}/releases/{number}",
        precision=PRECISION,
        rollout=rollout,
    )
