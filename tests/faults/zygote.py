"""Forks the real command lines out of an interpreter that has imported them, so that a restart takes milliseconds.

Reads one JSON object per line and answers each with one:

    {"run": [argv...], "environment": {...}, "log": path, "arm": [control, journal, folder, shadows]} -> {"pid": n}
    {"poll": pid} -> {"status": null | exit status}

It ends, and with it every child, when its input ends.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

MODULES = (
    "ebbflow.cli.main",
    "ebbflow.cli.commands.cloud",
    "ebbflow.cloud.processes.serve",
    "ebbflow.cloud.processes.work",
    "ebbflow.cloud.processes.gate",
    "ebbflow.cloud.processes.init",
    "ebbflow.edge.main",
    "ebbflow.edge.agent.runtime",
    "ebbflow.edge.agent.enrol",
    "ebbflow.edge.engine.torch_engine",
)
MAINS = {"ebbflow": "ebbflow.cli.main", "ebbflow-edge": "ebbflow.edge.main"}
_PR_SET_PDEATHSIG = 1


def warm_up() -> None:
    """Has torch import what it imports at its first product; no thread is left behind."""
    import tiny_students
    import torch

    from ebbflow.edge.engine.load import load_engine
    from ebbflow.edge.engine.loss import sequence_loss

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student"
        tiny_students.write_student(path, tiny_students.train_tokenizer(), seed=0)
        sequence_loss(load_engine(path, threads=1), [1, 2, 3])
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()


def become(order: dict[str, Any]) -> None:
    """Turns the forked child into the command."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order["environment"])
    libc.faults_arm(*(ctypes.c_char_p(path.encode()) for path in order["arm"]))
    sys.argv = order["run"]
    importlib.import_module(MAINS[sys.argv[0]]).main()


def start(order: dict[str, Any]) -> int:
    """Forks; the child never comes back."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        become(order)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException as error:  # noqa: BLE001 - the log is the only place left to say it
        print(f"zygote: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def status_of(pid: int) -> int | None:
    """Returns the exit status of a child that has ended."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def main() -> None:
    """Serves the lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in MODULES:
        importlib.import_module(module)
    warm_up()
    print(json.dumps({"ready": os.getpid()}), file=answers, flush=True)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        answer = {"pid": start(order)} if "run" in order else {"status": status_of(order["poll"])}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
