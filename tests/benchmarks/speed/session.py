"""What is measured of an engine, in the process that holds it, whatever the engine.

Imported in every engine's own environment: nothing but the standard library. An engine is called as

    python -m rivals.NAME '{"shape": "0.3b", "path": "...", "threads": 1, "quick": false}'

and its last line is the measurement.
"""

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from speed.shapes import SHAPES, STREAMS, Shape

SHORT_PROMPTS, LONG_PROMPT = (16, 128), 1024
_REPEATS = {16: 7, 128: 5, 1024: 1}
_BEFORE_DECODE_TOKENS = 128
_BEFORE_STREAMS_TOKENS = 32
_WARM_STEPS = 4


class Session(Protocol):
    """An engine that continues some sequences greedily."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Forgets what ran before, takes new prompts, equally long, and chooses the first token of each."""

    def next(self) -> None:
        """Takes the tokens that were chosen last, and chooses the next of each sequence."""

    def close(self) -> None:
        """Gives the memory back."""


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    shape: str
    path: str
    threads: int
    quick: bool = False


@dataclass(frozen=True)
class Measured:
    """What one process found."""

    load_s: float
    """Until the first token of a short prompt: some map their file and read it only then."""
    first_token_ms: dict[str, float]
    """By tokens of the prompt."""
    decode: float
    """Tokens per second of one stream behind a prompt of 128 tokens."""
    streams: float
    """Tokens per second of eight streams together."""
    swap_s: float
    """While nothing is answered, as another file of the same shape takes this one's place: until the first token."""
    rss_mb: float
    """Resident behind the eight streams, in 10^6 bytes."""
    peak_mb: float
    """The most that was ever resident, with the prompt of 1,024 tokens."""
    weights_bytes: int = 0
    """That one token reads, where the engine tells."""


Load = Callable[[Shape, Path, int], Session]
"""Loads a file for some threads."""


def main(load: Load, swap: Callable[[Session, Path], None] | None = None, argument: str | None = None) -> None:
    """Measures what the command line asks for and prints it as the last line.

    Args:
        load: makes the engine.
        swap: puts another file in place; without it, the engine is closed and loaded anew.
        argument: the task; None takes it from the command line.
    """
    task = Task(**json.loads(argument or sys.argv[1]))
    print(json.dumps(dataclasses.asdict(measure(task, load, swap))))


def measure(task: Task, load: Load, swap: Callable[[Session, Path], None] | None = None) -> Measured:
    """Loads, runs and swaps one engine."""
    shape, path = SHAPES[task.shape], Path(task.path)
    prompts = _Prompts(shape)
    short = prompts.some(2, SHORT_PROMPTS[0])
    begin = time.perf_counter()
    session = load(shape, path, task.threads)
    session.begin(short[:1])
    load_s = time.perf_counter() - begin
    first_ms = {str(length): _first_token_ms(session, prompts, length, task) for length in SHORT_PROMPTS}
    steps = (8 if task.quick else 64) * (4 if shape.vocab_size < SHAPES["0.3b"].vocab_size else 1)
    decode_s = _decode(session, prompts.some(1, _BEFORE_DECODE_TOKENS), steps)
    streams_s = _decode(session, prompts.some(STREAMS, _BEFORE_STREAMS_TOKENS), steps // 2)
    rss_mb = _resident_mb("VmRSS")
    first_ms[str(LONG_PROMPT)] = _first_token_ms(session, prompts, LONG_PROMPT, task)
    peak_mb = _resident_mb("VmHWM")
    weights_bytes = getattr(session, "weights_bytes", 0)
    begin = time.perf_counter()
    if swap:
        swap(session, path)
    else:
        session.close()
        del session
        session = load(shape, path, task.threads)
    session.begin(short[1:])
    swap_s = time.perf_counter() - begin
    session.close()
    streams = STREAMS * (steps // 2) / streams_s
    return Measured(load_s, first_ms, steps / decode_s, streams, swap_s, rss_mb, peak_mb, weights_bytes)


def _first_token_ms(session: Session, prompts: "_Prompts", length: int, task: Task) -> float:
    found = []
    for _ in range(1 if task.quick else _REPEATS[length]):
        prompt = prompts.some(1, length)
        begin = time.perf_counter()
        session.begin(prompt)
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found)


def _decode(session: Session, prompts: Sequence[Sequence[int]], steps: int) -> float:
    """Seconds of some steps, behind prompts and a few steps that do not count."""
    session.begin(prompts)
    for _ in range(_WARM_STEPS):
        session.next()
    begin = time.perf_counter()
    for _ in range(steps):
        session.next()
    return time.perf_counter() - begin


class _Prompts:
    """Random tokens, never the same prompt twice: no engine's cache of prompts can help."""

    def __init__(self, shape: Shape) -> None:
        self._random, self._size = random.Random(0), shape.vocab_size

    def some(self, count: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(5, self._size) for _ in range(length)] for _ in range(count)]


def _resident_mb(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024 / 1e6
