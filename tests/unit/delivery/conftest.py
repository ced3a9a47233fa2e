"""A cloud on loopback."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from delivery_world import World

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.registry.engine import Registry
from ebbflow.edge.delivery import watchdog


@pytest.fixture(scope="package", autouse=True)
def standing_still_is_not_silence() -> Iterator[None]:
    """Lets the watchdog go by a clock that stops while all of this machine does: nobody was silent then."""
    awake, over = SimpleNamespace(now_s=0.0), threading.Event()

    def tick() -> None:
        before_s = time.monotonic()
        while not over.wait(0.005):
            now_s = time.monotonic()
            awake.now_s += min(now_s - before_s, 0.05)
            before_s = now_s

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: awake.now_s))
        yield
    over.set()
    ticking.join()


@pytest.fixture
def world(tmp_path: Path, sqlite_registry: Registry, blobs: LocalBlobStore) -> Iterator[World]:
    """A cloud whose keys are all at hand, over real TLS."""
    made = World(tmp_path / "world", sqlite_registry, blobs)
    yield made
    made.close()
