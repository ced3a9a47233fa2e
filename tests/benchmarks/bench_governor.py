"""The governor under a load that rises and falls, beside the same agent in fixed precisions; and beside a neighbour.

Run by `make bench NAME=governor`. A student of random weights (ERNIE-4.5-0.3B's shape, installed in bf16) serves over
HTTP: an agent's serving stack with the native engine, with the governor, or held in bf16 or in int4. Requests are
streamed completions, greedy, with different prompts and answers of one length. They come as a Poisson process with the
same arrivals for all: first few, then more than bf16 can carry (a multiple of what a closed loop of eight clients has
in bf16), then few again. The time to the first token counts from when a request was due.

Throughput is that of the peak. What int4 and int8 cost in quality is measured on a small student that is trained on the
spot (the large one's weights are random): the loss on text that it has not read, in each precision of one bf16 file,
weighted by the tokens that the governor let each precision answer.

At last all cores but none are left free: a neighbour keeps one busy while a closed loop asks an agent with as many
threads as there are cores, with the governor and without.

Takes 15 minutes on two cores once the student is written.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/deploy_world.py

from governed.agent import STUDENT, Options
from governed.quality import losses
from governed.serving import Phase, Run, agent, measured
from speed import models
from speed.open_loop import Asked, capacity
from speed.shapes import CONTEXT_TOKENS, SHAPES, STREAMS

from ebbflow.common.student.tokens import Tokenizer

BF16 = "bf16.safetensors"
PERCENT = 95
TITLES = {"bf16": "bf16, fixed", "governed": "governed", "int4": "int4, fixed"}


def serving(options: argparse.Namespace, name: str, threads: int) -> Options:
    """How an agent of the comparison serves."""
    return Options(
        precision="int4" if name == "int4" else "bf16",
        threads=threads,
        governed=name == "governed",
        context_tokens=CONTEXT_TOKENS,
        running=STREAMS,
        queued=64,
        latency_goal_ms=options.goal_ms,
        dwell_s=options.dwell_s,
        memory_mib=8192,
    )


def prompts_of(tokenizer: Path, tokens: int) -> list[str]:
    """Prompts of so many tokens, all different: pieces of Python's standard library."""
    words = Tokenizer.from_bytes(tokenizer.read_bytes())
    sources = sorted(Path(argparse.__file__).parent.glob("*.py"))[:80]
    ids = words.encode("".join(path.read_text(errors="ignore") for path in sources))
    own = tokens - 1  # the token that begins a text comes before it
    return [words.decode(ids[own * number :][:own]) for number in range(len(ids) // own)]


def phases_of(options: argparse.Namespace, closed: float) -> list[Phase]:
    """Few, many, few again."""
    few, many = 0.25 * closed, options.peak * closed
    return [
        Phase("before", options.calm_s, few),
        Phase("rise", options.rise_s, many),
        Phase("peak", options.peak_s, many),
        Phase("after", options.after_s, few),
    ]


def rise_and_fall(options: argparse.Namespace, home: Path) -> tuple[dict[str, Run], list[Phase]]:
    """The load on each of the three agents."""
    files = home / BF16, home / models.TOKENIZER
    prompts = prompts_of(files[1], options.prompt_tokens)
    asked = asked_of(options, "")
    closed = closed_loop(options, home, prompts, "bf16", options.threads)
    say(f"bf16: a closed loop of {STREAMS} clients has {closed:.2f} requests/s")
    phases = phases_of(options, closed)
    runs = {}
    for name in TITLES:
        runs[name] = run = measured(name, files, serving(options, name, options.threads), phases, prompts, asked)
        say(f"{name}: {run.tokens_s(phases, 'peak'):.0f} tokens/s in the peak, {run.tokens} tokens in all")
    return runs, phases


def asked_of(options: argparse.Namespace, address: str) -> Asked:
    """What every request asks for."""
    eos_id = models.config(SHAPES[options.shape]).eos_token_id
    banned = () if eos_id is None else (eos_id,)
    return Asked(address, STUDENT, options.answer_tokens, banned)


def closed_loop(
    options: argparse.Namespace, home: Path, prompts: Sequence[str], name: str, threads: int, settle_rounds: int = 0
) -> float:
    """Requests per second of clients that ask one after the other, after some rounds that do not count."""
    asked = asked_of(options, "")
    with agent(home / BF16, home / models.TOKENIZER, serving(options, name, threads)) as running:
        to = replace(asked, address=running.address)
        different = iter(prompts)
        if settle_rounds:
            asyncio.run(capacity(to, different, STREAMS, settle_rounds))
        return asyncio.run(capacity(to, different, STREAMS, options.closed_rounds))


@contextmanager
def neighbour() -> Iterator[None]:
    """Another program that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_a_neighbour(options: argparse.Namespace, home: Path) -> dict[str, float]:
    """Requests per second in int8 with all threads and with the governor, turn by turn; the better of each."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        return {}
    prompts = prompts_of(home / models.TOKENIZER, options.prompt_tokens)
    found: dict[str, float] = {}
    with neighbour():
        for _ in range(options.turns):
            for name in ("bf16", "governed"):
                rate = closed_loop(options, home, prompts, name, cores, settle_rounds=1)
                found[name] = max(found.get(name, 0.0), rate)
                say(f"beside a neighbour, {name}, {cores} threads at most: {rate:.2f} requests/s")
    return found


def cost(run: Run, of: dict[str, float]) -> float:
    """Nats per token over bf16, by the tokens that each precision answered."""
    total = sum(run.tokens.values())
    return sum(count * (of[name] - of["bf16"]) for name, count in run.tokens.items()) / total


def show(runs: dict[str, Run], phases: list[Phase], quality: dict[str, float], options: argparse.Namespace) -> None:
    """Prints the tables."""
    rates = ", ".join(f"{phase.name} {phase.rate:.2f}/s for {phase.seconds:.0f} s" for phase in phases)
    caption = f"{rates}; prompts of {options.prompt_tokens} tokens, answers of {options.answer_tokens}"
    table = Table(title=f"Load that rises and falls; goal: {PERCENT} % begin in {options.goal_ms} ms", caption=caption)
    table.add_column("agent")
    for heading in ("peak, tokens/s", "answered", f"p{PERCENT} before", "rise", "peak", "after", "loss over bf16"):
        table.add_column(heading, justify="right")
    for name, run in runs.items():
        waits = [f"{run.wait_ms(phase.name, PERCENT):.0f} ms" for phase in phases]
        answered = f"{100 * run.answered('peak'):.0f} %"
        table.add_row(
            TITLES[name], f"{run.tokens_s(phases, 'peak'):.0f}", answered, *waits, f"{cost(run, quality):+.4f}"
        )
    console = Console(width=130)
    console.print(table)
    governed = runs["governed"]
    for change in governed.changes:
        console.print(f"{change.at_s - governed.begin_s:7.1f} s  {change.precision}, {change.threads} threads")
    total = sum(governed.tokens.values())
    shares = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in sorted(governed.tokens.items()))
    console.print(f"tokens of the governed agent: {shares}")
    console.print(f"loss in nats per token: {', '.join(f'{name} {loss:.4f}' for name, loss in quality.items())}")


def summary(
    runs: dict[str, Run], phases: list[Phase], quality: dict[str, float], beside: dict[str, float], goal_ms: int
) -> dict[str, Any]:
    """The last line."""
    governed, carried = runs["governed"], {name: run.tokens_s(phases, "peak") for name, run in runs.items()}
    metrics: dict[str, Any] = {
        "goal_ms": goal_ms,
        "goal_met_in_peak": governed.wait_ms("peak", PERCENT) <= goal_ms,
        "changes": len(governed.changes) - 1,
        "back_in_bf16": governed.changes[-1].precision == "bf16",
        "loss_over_bf16": cost(governed, quality),
        "int4_loss_over_bf16": quality["int4"] - quality["bf16"],
        "peak_tokens_s": carried,
        "peak_answered": {name: run.answered("peak") for name, run in runs.items()},
        "peak_first_token_p95_ms": {name: run.wait_ms("peak", PERCENT) for name, run in runs.items()},
        "beside_a_neighbour_per_s": beside,
    }
    ratios = {f"throughput_vs_{name}": carried["governed"] / carried[name] for name in ("bf16", "int4")}
    if beside:
        ratios["beside_a_neighbour_vs_all_threads"] = beside["governed"] / beside["bf16"]
    return {"metrics": _rounded(metrics), "ratios": _rounded(ratios)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, float):
        return round(value, 4) if abs(value) < float("inf") else None
    return value


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the clients need a core, too")
    parser.add_argument("--goal-ms", type=int, default=1500, help="within which 95 %% of the answers should begin")
    parser.add_argument("--dwell-s", type=float, default=5.0, help="the governor's dwell time")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--peak", type=float, default=1.4, help="times what bf16 can carry")
    parser.add_argument("--calm-s", type=float, default=20.0)
    parser.add_argument("--rise-s", type=float, default=15.0, help="of the peak's rate, before the peak is measured")
    parser.add_argument("--peak-s", type=float, default=45.0)
    parser.add_argument("--after-s", type=float, default=120.0)
    parser.add_argument("--closed-rounds", type=int, default=4, help="requests of each client of a closed loop")
    parser.add_argument("--turns", type=int, default=2, help="of each agent beside the neighbour")
    parser.add_argument("--steps", type=int, default=400, help="of the small student's training")
    options = parser.parse_args(arguments)
    home = models.folder(SHAPES[options.shape])
    runs, phases = rise_and_fall(options, home)
    beside = beside_a_neighbour(options, home)
    with tempfile.TemporaryDirectory() as folder:
        quality = losses(Path(folder), options.steps)
    show(runs, phases, quality, options)
    print(json.dumps(summary(runs, phases, quality, beside, options.goal_ms)))


if __name__ == "__main__":
    main()
