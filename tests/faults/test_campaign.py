"""Kills by the hundred over one living world: see the modules beside this one for what is killed, and what must hold.

`make test-faults` runs the long campaign; COUNT and SEED choose how many kills and which.
"""

import os
import random
from pathlib import Path

import pytest
from faults import campaign

SHORT_KILLS, SHORT_LIMIT_S = 25, 300.0
LONG_KILLS, LONG_LIMIT_S = 300, 1800.0


def seed() -> int:
    """The seed to reproduce, or a new one."""
    return int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))


def run(folder: Path, count: int, limit_s: float) -> None:
    chosen = seed()
    print(f"seed {chosen}: SEED={chosen} reproduces the plan of this campaign")
    report = campaign.run(folder, chosen, count, limit_s)
    print(report)
    assert report.total >= count, f"only {report.total} of {count} kills within {limit_s:.0f} s"


@pytest.mark.slow
def test_a_world_survives_some_kills(tmp_path: Path) -> None:
    run(tmp_path, SHORT_KILLS, SHORT_LIMIT_S)


@pytest.mark.faults
def test_a_world_survives_hundreds_of_kills(tmp_path: Path) -> None:
    run(tmp_path, int(os.environ.get("COUNT") or LONG_KILLS), LONG_LIMIT_S)
