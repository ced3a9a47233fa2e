"""A campaign of kills and disturbances over one world. Run it by hand with

python -m faults.campaign --count 300 --seed 7        (from tests/, with cloud, edge and common on PYTHONPATH)
"""

import argparse
import random
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from faults import disturbing, invariants, rolling, upstream
from faults.machine import until
from faults.report import Report
from faults.world import STUDENT, World

from ebbflow.api.v1 import round_pb2

RELEASES = 4
_WEIGHTS = {"rollout": 12, "publish": 3, "distil": 1, "disturb": 4, "round": 1}
"""How often each kind of episode is drawn."""
_MOST_ROUNDS = 3
"""A window of the privacy policy has four rounds."""


class Campaign:
    """Episodes drawn from a seed: the same seed draws the same plans; the processes' timing is their own."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed, self.report = world, seed, Report()
        self._reference: upstream.Reference | None = None

    def run(self, count: int, limit_s: float) -> Report:
        """Goes on until `count` kills or for `limit_s` seconds, and looks at everything once more.

        Raises:
            AssertionError: an invariant was broken; says in which episode.
        """
        begin_s, index = time.monotonic(), 0
        while self.report.total < count and time.monotonic() - begin_s < limit_s:
            chance = random.Random(f"{self.seed}/{index}")
            kind, before, since_s = self._draw(chance), self.report.total, time.monotonic()
            try:
                self._episode(kind, chance)
            except BaseException as error:
                error.add_note(f"in episode {index} ({kind}) of seed {self.seed}\n{self.report}\n{self._tails()}")
                raise
            print(f"{index} {kind}: {self.report.total - before} kills, {time.monotonic() - since_s:.1f} s", flush=True)
            index += 1
        self._finish()
        return self.report

    def _draw(self, chance: random.Random) -> str:
        kinds = dict(_WEIGHTS)
        if self.report.episodes["round"] >= _MOST_ROUNDS:
            del kinds["round"]
        return chance.choices(list(kinds), list(kinds.values()))[0]

    def _episode(self, kind: str, chance: random.Random) -> None:
        world, report = self.world, self.report
        if kind == "distil" and self._reference is None:
            self._reference = upstream.learn(world)
        acts: dict[str, Callable[[], None]] = {
            "rollout": lambda: rolling.roll_out(world, chance, report),
            "publish": lambda: upstream.publish(world, chance, report),
            "distil": lambda: upstream.distil(world, chance, report, self._reference),  # type: ignore[arg-type]
            "disturb": lambda: disturbing.disturb(world, chance, report),
            "round": lambda: self._round(chance),
        }
        acts[kind]()

    def _round(self, chance: random.Random) -> None:
        """Collects a round while agents and cloud are killed: every agent charges itself and is counted once."""
        with self.world.client() as client:
            request = round_pb2.OpenRoundRequest(student=f"students/{STUDENT}", request_id=str(uuid.uuid4()))
            name = client.rounds.OpenRound(request).round.name
        rolling.roll_out(self.world, chance, self.report)

        def complete() -> bool:
            with self.world.client() as client:
                found = client.rounds.GetRound(round_pb2.GetRoundRequest(name=name)).round
            assert found.batches_refused == 0, found
            return bool(found.batches_accepted == len(self.world.devices))

        until("every batch", complete, 120)
        with self.world.client() as client:
            client.rounds.CloseRound(round_pb2.CloseRoundRequest(name=name))
        invariants.ledgers_agree(self.world)
        self.report.episodes["round"] += 1

    def _finish(self) -> None:
        """In the end everything is where it belongs."""
        serving = invariants.slots_of(self.world.devices[0])["current"]["release"]
        invariants.converged(self.world, serving)
        invariants.cloud_is_sound(self.world)
        invariants.ledgers_agree(self.world)

    def _tails(self) -> str:
        parts = []
        for machine in self.world.machines:
            parts += [f"--- {machine.name}: {process}\n{machine.tail(process, 8)}" for process in machine.processes]
        return "\n".join(parts)


def run(folder: Path, seed: int, count: int, limit_s: float) -> Report:
    """Makes a world in a folder and runs a campaign over it."""
    world = World(folder, seed)
    try:
        world.open(RELEASES)
        return Campaign(world, seed).run(count, limit_s)
    finally:
        world.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--count", type=int, default=300, help="kills")
    parser.add_argument("--limit-s", type=float, default=900, help="most seconds")
    parser.add_argument("--folder", type=Path, help="where everything is left; else a temporary folder")
    given = parser.parse_args()
    folder: Path = given.folder or Path(tempfile.mkdtemp(prefix="ebbflow-faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {given.seed}, folder {folder}", flush=True)
    begin_s = time.monotonic()
    try:
        print(run(folder, given.seed, given.count, given.limit_s))
    finally:
        print(f"{time.monotonic() - begin_s:.0f} s with seed {given.seed}")


if __name__ == "__main__":
    main()
