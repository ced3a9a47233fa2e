"""A real cloud in this process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_world import CloudWorld


@pytest.fixture
def world(tmp_path: Path) -> CloudWorld:
    return CloudWorld(tmp_path)


@pytest.fixture
async def cloud(world: CloudWorld) -> AsyncIterator[CloudWorld]:
    """A cloud that runs."""
    async with world.running():
        yield world
