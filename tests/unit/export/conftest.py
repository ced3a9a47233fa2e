"""Releases of several shapes, made once."""

from collections.abc import Callable
from pathlib import Path

import export_world as world
import pytest


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a release by the name of its shape."""
    made: dict[str, Path] = {}

    def folder(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp(shape)
            world.write(world.make(shape), made[shape], world.KEEP.get(shape, ()))
        return made[shape]

    return folder
