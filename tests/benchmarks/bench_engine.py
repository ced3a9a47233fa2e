"""Engines on a processor: ours beside llama.cpp, ONNX Runtime GenAI, torch and transformers, random weights.

Run by `make bench NAME=engine`. Every engine runs in a process of its own with the same shapes: ERNIE-4.5-0.3B's
(361 million parameters, vocabulary 103,424) and one of 26 million. Ours, llama.cpp (Q4_0) and torch compute with the
very same INT4 codes; ONNX Runtime GenAI's builder quantises the same weights to INT4 in blocks of 32; transformers
computes in bf16. Measured are, greedily:

    first token    of prompts of 16, 128 and 1,024 tokens, that no cache has seen
    decode         tokens per second of one stream behind a prompt of 128 tokens
    8 streams      tokens per second of eight together, behind prompts of 32 tokens
    resident       memory behind the eight streams; peak: the most that it was, with the prompt of 1,024 tokens.
                   Mapped files count while they are resident
    load           from nothing to the first token of a prompt of 16, the file being in the page cache
    swap           while another file of the same shape takes this one's place in the same process, until the first
                   token: ours in place, tensor by tensor; the others close and load. (Beside running requests ours
                   switches between two steps.)

The rounds are interleaved, and every figure is the median of the rounds. The bandwidth is measured in each round by a
C program that reads memory (`speed/read.c`); a decoder that reads all weights for a token can do no more tokens than
bandwidth over weights. Takes 10 minutes on two cores once everything is installed; the first run builds llama.cpp,
which takes a quarter of an hour of CPU time. A rival that cannot be installed or fails is left out, and said so.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rivals import llama_cpp, onnx_genai
from speed import models
from speed.bandwidth import read_gb_s
from speed.report import Figures, show, summary
from speed.session import Measured, Task
from speed.shapes import SHAPES, Shape

LIMIT_S = 300.0
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contender:
    """One engine."""

    module: str
    """Run as a program."""
    file: Callable[[Shape], Path]
    """What it loads; made the first time."""
    interpreter: Callable[[], Path]


def _project() -> Path:
    return Path(sys.executable)


def _kept(name: str) -> Callable[[Shape], Path]:
    return lambda shape: models.folder(shape) / name


def _onnx(shape: Shape) -> Path:
    return onnx_genai.model(models.folder(shape) / models.HF)


CONTENDERS: Mapping[str, Contender] = {
    "ours": Contender("speed.ours", _kept(models.ARTEFACT), _project),
    "llamacpp": Contender("rivals.llama_cpp_session", _kept(models.GGUF), llama_cpp.interpreter),
    "onnx": Contender("rivals.onnx_genai", _onnx, onnx_genai.interpreter),
    "torch": Contender("rivals.torch_cpu", _kept(models.TORCH), _project),
    "transformers": Contender("rivals.transformers_cpu", _kept(models.HF), _project),
}


def prepare(names: Sequence[str], shapes: Sequence[str]) -> list[str]:
    """Installs and writes what is missing; returns those that are ready.

    Raises:
        subprocess.CalledProcessError: Ours could not be prepared.
    """
    ready = []
    for name in names:
        try:
            CONTENDERS[name].interpreter()
            for shape in shapes:
                CONTENDERS[name].file(SHAPES[shape])
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            _leave_out(name, error)
        else:
            ready.append(name)
    return ready


def run(names: Sequence[str], options: argparse.Namespace) -> Figures:
    """Measures in interleaved rounds; whoever fails once is left out from then on."""
    found, ready = Figures({}, {}), list(names)
    for number, threads in itertools.product(range(options.rounds), options.threads):
        if bandwidth := read_gb_s(threads):
            found.bandwidths.setdefault(threads, []).append(bandwidth)
        first = number % len(ready)
        for shape, name in itertools.product(options.shapes, ready[first:] + ready[:first]):
            if name not in ready:
                continue
            say(f"round {number + 1}: {name}, {shape}, {threads} thread{'s' * (threads > 1)}")
            try:
                measured = measure(CONTENDERS[name], shape, threads, quick=options.quick)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                _leave_out(name, error)
                ready.remove(name)
            else:
                found.runs.setdefault((shape, threads, name), []).append(measured)
    return found


def measure(contender: Contender, shape: str, threads: int, *, quick: bool) -> Measured:
    """Runs one engine in a process of its own.

    Raises:
        subprocess.SubprocessError: It failed or took too long.
    """
    task = Task(shape, str(contender.file(SHAPES[shape])), threads, quick)
    command = [str(contender.interpreter()), "-m", contender.module, json.dumps(vars(task))]
    given = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, cwd=folder, env=given, check=True, timeout=LIMIT_S, stdout=subprocess.PIPE, text=True
        )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _leave_out(name: str, error: Exception) -> None:
    if name == "ours":
        raise error
    say(f"{name} is left out: {error}")


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = ",".join(CONTENDERS)
    parser.add_argument("--only", type=_names(CONTENDERS), default=everyone, help=f"some of {everyone}")
    parser.add_argument("--shapes", type=_names(SHAPES), default=",".join(SHAPES), help="0.3b, 26m or both")
    parser.add_argument("--threads", type=_numbers, default="1,2", help="such as 1 or 1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, to see whether everything works")
    options = parser.parse_args(arguments)
    found = run(prepare(options.only, options.shapes), options)
    show(found)
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
