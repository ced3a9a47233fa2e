"""`ebbflow cloud`: the processes of the cloud itself, on the machine where they run."""

import importlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ebbflow.cli.options import example, group
from ebbflow.cli.output import say
from ebbflow.common.errors import EbbflowError, Reason

app = group("The cloud's own processes.", "ebbflow cloud init --home ./cloud", "ebbflow cloud serve --home ./cloud")
db = group("The registry's schema.", "ebbflow cloud db upgrade --home ./cloud")
app.add_typer(db, name="db")

Home = Annotated[
    Path, typer.Option(envvar="EBBFLOW_HOME", show_envvar=True, help="The cloud's folder, with its config.toml.")
]
DEFAULT_HOME = Path("ebbflow-cloud")
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="Name or address in the server certificate; repeatable.")
]


@app.command(epilog=example("ebbflow cloud init --home ./cloud --host cloud.example.org"))
def init(
    home: Home = DEFAULT_HOME,
    host: Hosts = None,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Leave an existing cloud as it is.")] = False,
) -> None:
    """Makes a cloud's folder: registry, certificate authority, signing keys, and the first owner's context."""
    try:
        _run("init", home, hosts=host)
    except EbbflowError as error:
        if error.reason is not Reason.ALREADY_EXISTS or not if_missing:
            raise
        say(str(error))


@app.command(epilog=example("ebbflow cloud serve --home ./cloud --listen 0.0.0.0:8443 --enrol-listen 0.0.0.0:8444"))
def serve(
    home: Home = DEFAULT_HOME,
    listen: Annotated[str | None, typer.Option(help="host:port of the mutually authenticated listener.")] = None,
    enrol_listen: Annotated[str | None, typer.Option(help="host:port of the listener for enrolment.")] = None,
    advertise: Annotated[str | None, typer.Option(help="host:port that agents are told.")] = None,
    host: Hosts = None,
    alone: Annotated[bool, typer.Option("--alone", help="Start neither teacher nor worker nor gate.")] = False,
) -> None:
    """Runs the cloud until it is told to stop (SIGTERM, Ctrl-C): the control plane, and with it teacher, worker, gate.

    A cluster runs them elsewhere: `serve --alone`, `teach`, `work` and `gate`.
    """
    settings = _settings(home, listen=listen, enrol_listen=enrol_listen, advertise=advertise, hosts=host)
    _module("serve").run(settings, embedded=not alone)


@app.command(epilog=example("ebbflow cloud teach --home ./cloud --teacher baidu/ERNIE-4.5-21B-A3B-PT"))
def teach(
    home: Home = DEFAULT_HOME,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub name of the teacher.")] = None,
    listen: Annotated[str | None, typer.Option(help="host:port of the teacher service.")] = None,
) -> None:
    """Hosts the teacher: generates and scores over gRPC."""
    _run("teach", home, teacher=teacher, teacher_listen=listen)


@app.command(epilog=example("ebbflow cloud work --home ./cloud --threads 8"))
def work(
    home: Home = DEFAULT_HOME,
    threads: Annotated[int | None, typer.Option(min=0, help="Threads of torch; 0 takes every core.")] = None,
) -> None:
    """Distils: claims queued distillations, one after the other."""
    _run("work", home, threads=threads)


@app.command(epilog=example("ebbflow cloud gate --home ./cloud"))
def gate(
    home: Home = DEFAULT_HOME,
    threads: Annotated[int | None, typer.Option(min=0, help="Threads of torch; 0 takes every core.")] = None,
) -> None:
    """Evaluates proposed releases and co-signs the good ones."""
    _run("gate", home, threads=threads)


@app.command(epilog=example("ebbflow cloud renew-owner --home ./cloud"))
def renew_owner(home: Home = DEFAULT_HOME) -> None:
    """Gives the first owner a new certificate, when the old one has expired or was lost; the old one is revoked."""
    say(f"the new owner's context is {_module('init').renew_owner(_settings(home))}")


@db.command(epilog=example("ebbflow cloud db upgrade --home ./cloud"))
def upgrade(home: Home = DEFAULT_HOME) -> None:
    """Brings the registry to this software's schema; stop the servers first."""
    say(f"schema: {_module('database').upgrade(_settings(home))}")


@db.command(epilog=example("ebbflow cloud db check --home ./cloud"))
def check(home: Home = DEFAULT_HOME) -> None:
    """Ends with exit code 5 if the registry's schema is not this software's."""
    say(f"schema: {_module('database').check(_settings(home))}")


def _run(process: str, home: Path, **overrides: object) -> None:
    # OpenMP reads this when torch loads it. By default its threads spin while they wait, which, with more processes
    # than cores, makes all of them ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module = _module(process)
    module.run(_settings(home, **overrides))


def _settings(home: Path, **overrides: object) -> Any:
    given = {name: value for name, value in overrides.items() if value is not None}
    return _module("settings").CloudSettings.load(home, **given)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"ebbflow.cloud.processes.{name}")
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing.startswith("ebbflow."):
            raise
        message = f"{missing} is not installed; the extra is 'cloud': pip install 'ebbflow[cloud]'"
        raise EbbflowError(Reason.EXTRA_MISSING, message, extra="cloud") from error
