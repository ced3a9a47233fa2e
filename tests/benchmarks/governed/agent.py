"""An agent's serving, without a cloud, with or without the governor.

python -m governed.agent FOLDER ARTEFACT TOKENIZER '{"precision": "bf16", ...}'

Prints its address once it answers, then a line of JSON whenever precision or threads change, and the tokens that were
answered in each precision when its input ends.
"""

import asyncio
import datetime as dt
import json
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ebbflow.common import allocator
from ebbflow.common.student.tokens import Tokenizer
from ebbflow.edge.agent.governing import Governing
from ebbflow.edge.agent.logs import configure
from ebbflow.edge.agent.settings import AgentSettings
from ebbflow.edge.agent.watcher import Watcher
from ebbflow.edge.engine.base import Engine
from ebbflow.edge.engine.load import load_engine
from ebbflow.edge.feedback.store import FeedbackStore
from ebbflow.edge.serving.answering import Answering
from ebbflow.edge.serving.http import create_app
from ebbflow.edge.serving.hub import Hub
from ebbflow.edge.serving.lane import Limits
from ebbflow.edge.serving.meters import Meters, NoMeters
from ebbflow.edge.serving.model import Model
from ebbflow.edge.serving.server import HttpServer

STUDENT = "students/bench"
_LOOK_S = 0.05
_MIB = 2**20


@dataclass(frozen=True)
class Options:
    """How to serve."""

    precision: Literal["bf16", "int8", "int4"]
    """At the start, and for good without the governor."""
    threads: int
    governed: bool
    context_tokens: int
    running: int
    queued: int
    latency_goal_ms: int
    dwell_s: float
    memory_mib: int

    def encode(self) -> str:
        """As an argument."""
        return json.dumps(asdict(self))


class ByPrecision(NoMeters):
    """Counts tokens by the precision that gave them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.count: Counter[str] = Counter()

    def tokens(self, count: int) -> None:
        """A step gave so many tokens of answers."""
        self.count[self._engine.precision] += count


async def main(folder: Path, artefact: Path, tokenizer: Tokenizer, options: Options) -> None:
    """Serves one student of the artefact until the input ends."""
    engine = load_engine(
        artefact,
        "native",
        threads=options.threads,
        context_tokens=options.context_tokens,
        memory_limit_bytes=options.memory_mib * _MIB,
        precision=options.precision,
    )
    served = ByPrecision(engine)
    meters: Meters = served
    hub = Hub(Limits(running=options.running, queued=options.queued), lambda _: meters)
    hub.swap(Model(STUDENT, f"{STUDENT}/releases/1", engine, tokenizer, frozenset(engine.offered)))
    with closing(FeedbackStore(folder / "feedback.db")) as store:
        server = HttpServer(create_app(hub, Answering(hub, store), store), "127.0.0.1:0", grace_s=1.0)
        await server.start()
        print(server.address, flush=True)
        looks = [asyncio.create_task(_watch(engine))]
        if options.governed:
            looks.append(asyncio.create_task(_govern(hub, options)))
        await asyncio.to_thread(sys.stdin.read)
        for look in looks:
            look.cancel()
            with suppress(asyncio.CancelledError):
                await look
        await server.stop()
    hub.stop()
    print(json.dumps({"tokens": served.count}), flush=True)


async def _govern(hub: Hub, options: Options) -> None:
    settings = AgentSettings(
        precisions=("bf16", "int8", "int4"),
        cores=options.threads,
        running=options.running,
        latency_goal_ms=options.latency_goal_ms,
        governor_dwell_s=options.dwell_s,
    )
    governing = Governing(hub, settings, options.memory_mib * _MIB, lambda: dt.datetime.now(dt.UTC))
    watcher = Watcher("governor", governing.look)
    watcher.hint()
    try:
        await watcher.run()
    finally:
        governing.close()


async def _watch(engine: Engine) -> None:
    """Tells of every change, by the clock of all processes."""
    before = None
    while True:
        now = (engine.precision, engine.threads)
        if now != before:
            print(json.dumps({"at_s": time.perf_counter(), "precision": now[0], "threads": now[1]}), flush=True)
        before = now
        await asyncio.sleep(_LOOK_S)


if __name__ == "__main__":
    configure("console")
    allocator.keep_chunks()
    words = Tokenizer.from_bytes(Path(sys.argv[3]).read_bytes())
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), words, Options(**json.loads(sys.argv[4]))))
