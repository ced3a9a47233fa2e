"""The memory of a real control plane stays as it is, however large the model and however many agents fetch it."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from delivery.measure import Meter
from delivery.world import RELEASE, STUDENT, Serving, serving

from ebbflow.client.channels import sync_channel
from ebbflow.common.trust.targets import variant_path
from ebbflow.edge.agent.credentials import CredentialFiles
from ebbflow.edge.agent.state import StateFolder
from ebbflow.edge.delivery.fetcher import ArtefactSource

MOST_MB = 200.0
"""What the project promises of a control plane, in 10^6 bytes."""
MANY = 24

pytestmark = pytest.mark.slow


def fetch(device: Path, sha256: str, stall: threading.Event | None = None) -> int:
    """Reads a blob as a device does; one that stalls takes a single chunk until it is told to go on."""
    with sync_channel(CredentialFiles(StateFolder(device)).load().cloud) as channel:
        size_bytes = 0
        for chunk in ArtefactSource(channel, silence_s=120).blob(sha256):
            size_bytes += len(chunk)
            if stall:
                stall.wait(60)
        return size_bytes


def peak_mb(running: Serving, devices: Sequence[Path], *, stalling: bool = False) -> float:
    """Peak of the server's memory while all devices fetch at once."""
    release = running.world.release_files()[variant_path(STUDENT, RELEASE, "int8")]
    stall = threading.Event() if stalling else None
    meter = Meter(running.pid)
    with ThreadPoolExecutor(len(devices)) as pool:
        fetching = [pool.submit(fetch, device, release["sha256"], stall) for device in devices]
        if stall:
            time.sleep(5)  # long enough for a server that does not wait for its readers to fill its memory
            stall.set()
        assert {future.result() for future in fetching} == {release["size_bytes"]}
    return meter.peak_rss_mb


def test_memory_grows_neither_with_the_model_nor_with_the_agents(tmp_path: Path) -> None:
    peaks = {}
    for size_mb in (32, 128):
        folder = tmp_path / str(size_mb)
        folder.mkdir()
        with serving(folder, size_mb) as running:
            devices = running.enrol(MANY)
            for count in (2, MANY):
                peaks[size_mb, count] = peak_mb(running, devices[:count])
            peaks[size_mb, -MANY] = peak_mb(running, devices, stalling=True)
    assert max(peaks.values()) < MOST_MB, peaks
    assert peaks[128, MANY] - peaks[32, MANY] < 15, peaks
    assert peaks[128, MANY] - peaks[128, 2] < 40, peaks
