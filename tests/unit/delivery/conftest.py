"""A cloud on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from delivery_world import World

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.registry.engine import Registry


@pytest.fixture
def world(tmp_path: Path, sqlite_registry: Registry, blobs: LocalBlobStore) -> Iterator[World]:
    """A cloud whose keys are all at hand, over real TLS."""
    made = World(tmp_path / "world", sqlite_registry, blobs)
    yield made
    made.close()
