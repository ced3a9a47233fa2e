"""Runs an agent under a load that rises and falls, and keeps what became of every request."""

import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from governed.agent import Options
from speed.open_loop import Asked, Served, arrivals_s, request

BENCHMARKS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Phase:
    """A stretch of one rate."""

    name: str
    seconds: float
    rate: float
    """Requests per second."""


@dataclass(frozen=True)
class Change:
    """What computes from a moment on."""

    at_s: float
    precision: str
    threads: int


@dataclass
class Run:
    """One agent under the whole load.

    Attributes:
        name: of the agent.
        begin_s: when the first phase began.
        served: by phase.
        changes: of precision and threads, since the start of the process.
        tokens: of answers, by precision.
    """

    name: str
    begin_s: float = 0.0
    served: dict[str, list[Served]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    def wait_ms(self, phase: str, percent: int) -> float:
        """A percentile of the time to the first token, by nearest rank; refused requests waited for ever."""
        waits = sorted(served.wait_s for served in self.served[phase])
        return 1e3 * waits[max(0, math.ceil(len(waits) * percent / 100) - 1)]

    def answered(self, phase: str) -> float:
        """Share of a phase's requests that were answered."""
        return sum(served.first_s < math.inf for served in self.served[phase]) / len(self.served[phase])

    def tokens_s(self, phases: Sequence[Phase], name: str) -> float:
        """Tokens per second in the time of a phase, whenever they were asked for."""
        index = [phase.name for phase in phases].index(name)
        begin_s = self.begin_s + sum(phase.seconds for phase in phases[:index])
        end_s = begin_s + phases[index].seconds
        every = [one for served in self.served.values() for one in served if one.answer_tokens]
        return sum(_within(one, begin_s, end_s) for one in every) / (end_s - begin_s)


def _within(one: Served, begin_s: float, end_s: float) -> float:
    """Tokens of an answer that came in a stretch of time, if they came evenly."""
    share = (min(one.end_s, end_s) - max(one.first_s, begin_s)) / max(one.end_s - one.first_s, 1e-9)
    return one.answer_tokens * max(0.0, min(1.0, share))


@dataclass
class Agent:
    """A process that answers.

    Attributes:
        address: host:port.
        told: what it has printed, complete once it has ended.
    """

    address: str
    told: list[str] = field(default_factory=list)


@contextmanager
def agent(artefact: Path, tokenizer: Path, options: Options) -> Iterator[Agent]:
    """An agent's serving for as long as the block lasts.

    Raises:
        RuntimeError: it did not start; it has said why on the error output.
    """
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "governed.agent", folder, str(artefact), str(tokenizer), options.encode()]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"the agent ended with {process.wait()}")
        found = Agent(address)
        try:
            yield found
        finally:
            assert process.stdin is not None
            process.stdin.close()
            found.told += process.stdout.read().splitlines()
            process.wait()


async def _send(asked: Asked, prompts: Sequence[str], phases: Sequence[Phase], run: Run) -> None:
    run.begin_s = begin_s = time.perf_counter()
    number = 0
    under_way: dict[str, list[asyncio.Task[Served]]] = {}
    for seed, phase in enumerate(phases):
        tasks = under_way.setdefault(phase.name, [])
        for after_s in arrivals_s(phase.rate, phase.seconds, seed):
            due_s = begin_s + after_s
            await asyncio.sleep(due_s - time.perf_counter())
            tasks.append(asyncio.create_task(request(asked, prompts[number % len(prompts)], due_s, set())))
            number += 1
        begin_s += phase.seconds
        await asyncio.sleep(begin_s - time.perf_counter())
    run.served = {name: list(await asyncio.gather(*tasks)) for name, tasks in under_way.items()}


def measured(
    name: str, files: tuple[Path, Path], options: Options, phases: Sequence[Phase], prompts: Sequence[str], asked: Asked
) -> Run:
    """Starts an agent, sends it the whole load and returns what became of it; `asked` without its address."""
    run = Run(name)
    with agent(*files, options) as serving:
        to = Asked(serving.address, asked.model, asked.answer_tokens, asked.banned)
        asyncio.run(_send(to, prompts, phases, run))
    for line in serving.told:
        said = json.loads(line)
        if "tokens" in said:
            run.tokens = said["tokens"]
        else:
            run.changes.append(Change(**said))
    return run
