"""An agent's HTTP API beside llama-server under open-loop load: what each carries while first tokens stay in time.

Run by `make bench NAME=serving`. Both serve the same student of random weights (ERNIE-4.5-0.3B's shape, INT4) with the
same codes, number of threads and places in the batch: an agent's serving stack with the native engine, and llama-server
of llama-cpp-python's sources with a GGUF file, its defaults, and without its store of old prompts, which could not help
here. Requests are streamed completions, greedy, with the same prompts, all different, and answers of the same length.
They come as a Poisson process with the same arrivals for both, whether or not earlier ones are answered, and the time
to the first token counts from when a request was due.

For each server the highest rate is sought at which 99 % of the first tokens come within the goal: a closed loop of
eight clients tells about where the end is, and bisection below 1.25 times its rate does the rest; the probes of both
servers take turns. Throughput is what was answered at the highest rate that met the goal, in tokens per second.

Takes 9 minutes on two cores once everything is installed; the first run builds llama-server, which takes half an hour
of CPU time. Without llama-server only the agent is measured.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/deploy_world.py

from delivery.measure import peak_rss_mb
from speed import models
from speed.open_loop import Asked, Load, capacity, load
from speed.servers import Server, start_agent, start_llama_server
from speed.shapes import CONTEXT_TOKENS, SHAPES, STREAMS, Shape

from ebbflow.common.student.tokens import Tokenizer

TITLES = {"ours": "Ebbflow agent", "llama_server": "llama-server"}
PERCENT = 99
ABOVE = 1.25
"""Of the closed loop's rate: where the search begins."""
HOPELESS = 4
"""Times the goal: a probe ends when a first token is waited for so long."""


@dataclass
class Search:
    """What is known of one server."""

    asked: Asked
    prompts: Iterator[str] = field(repr=False)
    pid: int
    goal_ms: float
    capacity: float = 0.0
    """Requests per second of a closed loop."""
    bounds: tuple[float, float] = (0.0, 0.0)
    """The highest rate that met the goal, and the lowest that did not."""
    best: Load | None = None

    def begin(self, capacity: float) -> None:
        """Takes the rate of a closed loop, which is about the most that can be."""
        self.capacity, self.bounds = capacity, (0.0, ABOVE * capacity)

    @property
    def rate(self) -> float:
        """Where to look next."""
        return sum(self.bounds) / 2

    def learn(self, found: Load) -> bool:
        """Takes what came of the rate; returns whether the goal was met."""
        met = not found.gave_up and not found.failed and found.wait_ms(PERCENT) <= self.goal_ms
        low, high = self.bounds
        self.bounds = (found.rate, high) if met else (low, found.rate)
        self.best = found if met else self.best
        return met


def texts(shape: Shape, tokens: int) -> list[str]:
    """Prompts of so many tokens, all different: pieces of Python's standard library."""
    tokenizer = Tokenizer.from_bytes((models.folder(shape) / models.TOKENIZER).read_bytes())
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))
    ids = tokenizer.encode("".join(path.read_text(errors="ignore") for path in sources))
    own = tokens - 1  # servers put the token that begins a text before it
    return [tokenizer.decode(ids[begin : begin + own]) for begin in range(0, len(ids) - own, own)]


async def run(servers: Mapping[str, Server], shape: Shape, options: argparse.Namespace) -> dict[str, Search]:
    """Searches both rates, turn by turn."""
    prompts = texts(shape, options.prompt_tokens)
    eos_id = models.config(shape).eos_token_id
    banned = () if eos_id is None else (eos_id,)
    searches = {
        name: Search(
            Asked(server.address, "bench", options.answer_tokens, banned), cycle(prompts), server.pid, options.goal_ms
        )
        for name, server in servers.items()
    }
    for name, search in list(searches.items()):
        try:
            search.begin(await capacity(search.asked, search.prompts, STREAMS, options.closed_rounds))
        except ValueError as error:
            if name == "ours":
                raise
            say(f"{name} is left out: {error}")
            del searches[name]
            continue
        say(f"{name}: a closed loop of {STREAMS} clients has {search.capacity:.2f} requests/s")
    for _ in range(options.probes):
        for name, search in searches.items():
            give_up_ms = HOPELESS * search.goal_ms
            found = await load(search.asked, search.prompts, search.rate, options.seconds, give_up_ms)
            met = search.learn(found)
            say(f"{name}: {told(found)}{'' if met else ', too late'}")
    check_lengths(searches, options)
    return searches


def told(found: Load) -> str:
    """One probe in words."""
    text = f"{found.rate:.2f} requests/s, {len(found.served)} sent"
    if found.failed:
        return f"{text}, {found.failed} without an answer"
    return f"{text}, first token {found.wait_ms(50):.0f} ms, p{PERCENT} {found.wait_ms(PERCENT):.0f} ms"


def check_lengths(searches: Mapping[str, Search], options: argparse.Namespace) -> None:
    """Says if a server had other prompts or gave other answers than were asked for."""
    for name, search in searches.items():
        served = search.best.served if search.best else []
        if any(one.answer_tokens != options.answer_tokens for one in served):
            say(f"{name}: not every answer has {options.answer_tokens} tokens")
        if served:
            say(f"{name}: {sum(one.prompt_tokens for one in served) / len(served):.1f} tokens in a prompt")


def show(searches: Mapping[str, Search], options: argparse.Namespace) -> None:
    """Prints the table."""
    title = f"Highest rate with 99 % of first tokens within {options.goal_ms:.0f} ms"
    caption = f"prompts of {options.prompt_tokens} tokens, answers of {options.answer_tokens}, shape {options.shape}"
    table = Table(title=title, caption=caption)
    table.add_column("server")
    for heading in ("closed loop", "rate", "throughput", "first token p50", f"p{PERCENT}", "requests", "peak resident"):
        table.add_column(heading, justify="right")
    for name, search in searches.items():
        cells = [f"{search.capacity:.2f}/s", *(["none"] * 5)]
        if best := search.best:
            waits = [f"{best.wait_ms(percent):.0f} ms" for percent in (50, PERCENT)]
            cells[1:] = [f"{best.rate:.2f}/s", f"{best.tokens_s:.0f} tokens/s", *waits, str(len(best.served))]
        table.add_row(TITLES[name], *cells, f"{peak_rss_mb(search.pid):.0f} MB")
    Console(width=120).print(table)


def summary(searches: Mapping[str, Search]) -> dict[str, dict[str, float]]:
    """The last line: our figures, llama-server's, and how many times more ours carries."""
    said: dict[str, dict[str, float]] = {name: _figures(search) for name, search in searches.items()}
    rivals = {f"llama_server_{key}": value for key, value in said.get("llama_server", {}).items()}
    ours, theirs = said["ours"], said.get("llama_server", {})
    ratios = {
        f"{ratio}_vs_llama_server": round(ours[key] / theirs[key], 3)
        for ratio, key in (("throughput", "throughput_tokens_s"), ("closed_loop", "closed_loop_per_s"))
        if key in ours and key in theirs
    }
    return {"metrics": ours, "rivals": rivals, "ratios": ratios}


def _figures(search: Search) -> dict[str, float]:
    figures = {"closed_loop_per_s": search.capacity, "peak_rss_mb": peak_rss_mb(search.pid)}
    if best := search.best:
        figures |= {
            "rate_per_s": best.rate,
            "throughput_tokens_s": best.tokens_s,
            "first_token_p50_ms": best.wait_ms(50),
            "first_token_p99_ms": best.wait_ms(PERCENT),
        }
    return {name: round(value, 3) for name, value in figures.items()}


def start(shape: Shape, options: argparse.Namespace, folder: Path, running: ExitStack) -> dict[str, Server]:
    """Starts both servers, or the agent alone where there can be no llama-server."""
    servers = {"ours": start_agent(shape, options.threads, folder, running)}
    try:
        servers["llama_server"] = start_llama_server(shape, options.threads, folder, running)
    except (OSError, subprocess.SubprocessError) as error:
        say(f"llama-server is left out: {error}")
    return servers


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--threads", type=int, default=1, help="of each engine; the clients need a core, too")
    parser.add_argument("--goal-ms", type=float, default=1000.0, help="within which 99 %% of the first tokens come")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=45.0, help="of one probe")
    parser.add_argument("--probes", type=int, default=5, help="for each server")
    parser.add_argument("--closed-rounds", type=int, default=4, help="requests of each client of the closed loop")
    options = parser.parse_args(arguments)
    if options.prompt_tokens + options.answer_tokens > CONTEXT_TOKENS // STREAMS:
        parser.error(f"a prompt and its answer have {CONTEXT_TOKENS // STREAMS} tokens at most")
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        servers = start(shape, options, Path(folder), running)
        searches = asyncio.run(run(servers, shape, options))
        show(searches, options)
        line = json.dumps(summary(searches))
    print(line)


if __name__ == "__main__":
    main()
