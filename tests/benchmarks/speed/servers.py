"""The two servers of a GGUF file and an artefact with the same codes, each in a process of its own."""

import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from delivery.daemons import daemon
from delivery.measure import wait_until
from deploy_world import free_port
from rivals import llama_cpp
from speed import models
from speed.shapes import CONTEXT_TOKENS, STREAMS, Shape

READY_S = 120.0


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    address: str
    """host:port."""
    pid: int


def start_agent(shape: Shape, threads: int, folder: Path, running: ExitStack) -> Server:
    """Starts an agent's serving for as long as the stack is open.

    Raises:
        RuntimeError: It did not start; it has said why on the error output.
    """
    files = [models.folder(shape) / name for name in (models.ARTEFACT, models.TOKENIZER)]
    command = [sys.executable, "-m", "speed.agent", *map(str, files), str(threads), str(folder)]
    process = subprocess.Popen(
        command, env=_environment(threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    running.callback(process.communicate)  # its input ends, and so does it
    assert process.stdout is not None
    if not (address := process.stdout.readline().strip()):
        raise RuntimeError("the agent did not start")
    return Server(address, process.pid)


def start_llama_server(shape: Shape, threads: int, folder: Path, running: ExitStack) -> Server:
    """Starts llama-server for as long as the stack is open.

    Raises:
        OSError, subprocess.SubprocessError, TimeoutError: It could not be built or does not start.
    """
    address = f"127.0.0.1:{free_port()}"
    host, _, port = address.rpartition(":")
    model = models.folder(shape) / models.GGUF
    sizes = ("--ctx-size", CONTEXT_TOKENS, "--parallel", STREAMS, "--threads", threads, "--threads-batch", threads)
    options = ("--model", model, "--host", host, "--port", port, "--cache-ram", 0, *sizes)
    server = running.enter_context(daemon([llama_cpp.server(), *options], folder, _environment(threads)))
    wait_until("llama-server's start", lambda: _healthy(address), READY_S)
    return Server(address, server.pid)


def _healthy(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/health") as answer:
        return bool(answer.status == 200)
    return False


def _environment(threads: int) -> Mapping[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": str(threads)}
