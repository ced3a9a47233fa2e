"""The command line of a device: `ebbflow-edge`."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ebbflow.common.errors import EbbflowError


def _example(*lines: str) -> str:
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


app = typer.Typer(
    name="ebbflow-edge",
    help="Serves a student on this device and keeps it up to date.",
    epilog=_example("ebbflow-edge enrol --token ebb1.… --cloud cloud.example:8444", "ebbflow-edge run"),
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
privacy = typer.Typer(
    help="What leaves this device.",
    epilog=_example("ebbflow-edge privacy show"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(privacy, name="privacy")


class Output(StrEnum):
    """Forms of an answer."""

    table = "table"
    json = "json"


Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings in TOML; EBBFLOW_EDGE_* variables win over it.")
]
State = Annotated[
    Path | None, typer.Option("--state", help="State folder; wins over the settings. [default: /var/lib/ebbflow-edge]")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from ebbflow.edge.agent.version import agent_version

        typer.echo(f"ebbflow-edge {agent_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command(epilog=_example("ebbflow-edge enrol --token ebb1.… --cloud cloud.example:8444 --label site=berlin"))
def enrol(
    token: Annotated[
        str | None,
        typer.Option(help='From `ebbflow token create`; "" reads it from stdin.', envvar="EBBFLOW_EDGE_TOKEN"),
    ] = None,
    cloud: Annotated[
        str | None, typer.Option(help="host:port of the cloud's enrolment listener.", envvar="EBBFLOW_EDGE_CLOUD")
    ] = None,
    agent_id: Annotated[
        str,
        typer.Option(
            "--name", help="Name to ask for, such as kiosk-7; else the cloud chooses.", envvar="EBBFLOW_EDGE_NAME"
        ),
    ] = "",
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be repeated.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an identity that is there.")] = False,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Leave an identity that is there as it is.")] = False,
    config: Config = None,
    state: State = None,
) -> None:
    """Gives this device an identity, and prints its name."""
    from ebbflow.edge.agent.credentials import CredentialFiles
    from ebbflow.edge.agent.enrol import Wish, labels_of
    from ebbflow.edge.agent.enrol import enrol as do_enrol
    from ebbflow.edge.agent.profile import device_profile
    from ebbflow.edge.agent.settings import AgentSettings

    settings = AgentSettings.load(config, state)
    files = CredentialFiles(settings.folder)
    if if_missing and files.exist:
        typer.echo(files.load().agent)
        return
    if token is None:
        message = "give one, here or in EBBFLOW_EDGE_TOKEN; `ebbflow token create` makes it"
        raise typer.BadParameter(message, param_hint="--token")
    if cloud is None:
        raise typer.BadParameter("give host:port, here or in EBBFLOW_EDGE_CLOUD", param_hint="--cloud")
    secret = token.strip() or sys.stdin.readline().strip()
    wish = Wish(cloud=cloud, token=secret, agent_id=agent_id, labels=labels_of(label or []))
    typer.echo(do_enrol(settings.folder, wish, device_profile(settings), force=force))


@app.command(epilog=_example("ebbflow-edge run --config /etc/ebbflow/agent.toml"))
def run(config: Config = None, state: State = None) -> None:
    """Serves, and follows the cloud, until SIGTERM; also without the network."""
    import asyncio

    from ebbflow.common import allocator
    from ebbflow.edge.agent import runtime
    from ebbflow.edge.agent.endpoints import Endpoints
    from ebbflow.edge.agent.logs import configure
    from ebbflow.edge.agent.settings import AgentSettings

    settings = AgentSettings.load(config, state)
    configure(settings.log_format)
    allocator.keep_chunks()

    def ready(endpoints: Endpoints, agent: str) -> None:
        typer.echo(f"ready agent={agent} http={endpoints.http} grpc={endpoints.grpc}")
        sys.stdout.flush()

    asyncio.run(runtime.run(settings, ready))


@app.command(epilog=_example("ebbflow-edge status -o json"))
def status(
    output: Annotated[Output, typer.Option("-o", "--output", help="How to print.")] = Output.table,
    agent: Annotated[str, typer.Option(help="host:port of InferenceService; else the state folder's agent.")] = "",
    config: Config = None,
    state: State = None,
) -> None:
    """Asks the running agent what it serves."""
    from ebbflow.edge.agent import status as asking
    from ebbflow.edge.agent.settings import AgentSettings

    settings = AgentSettings.load(config, state)
    answer = asking.ask(settings, agent)
    typer.echo(asking.as_json(answer) if output is Output.json else asking.as_table(answer))


@privacy.command("show", epilog=_example("ebbflow-edge privacy show --state /var/lib/ebbflow-edge"))
def privacy_show(config: Config = None, state: State = None) -> None:
    """Says in plain words what leaves this device, what it has cost and what is left."""
    import datetime as dt
    from contextlib import closing

    from ebbflow.edge.agent.local import ceiling_of, open_store
    from ebbflow.edge.agent.settings import AgentSettings
    from ebbflow.edge.feedback.show import describe

    settings = AgentSettings.load(config, state)
    with closing(open_store(settings)) as store:
        typer.echo(describe(store, ceiling_of(settings), dt.datetime.now(dt.UTC)))


@app.command(epilog=_example("ebbflow-edge purge --user ada@example.org"))
def purge(
    user: Annotated[str, typer.Option(help='The user as the application names them; "" for requests without one.')],
    config: Config = None,
    state: State = None,
) -> None:
    """Deletes everything that is kept of one user."""
    from contextlib import closing

    from ebbflow.edge.agent.local import open_store
    from ebbflow.edge.agent.settings import AgentSettings

    with closing(open_store(AgentSettings.load(config, state))) as store:
        count = store.purge_user(user or None)
    typer.echo(f"{count} interactions deleted")


def main() -> None:
    """Runs the command line; what goes wrong ends with a sentence, its cure and the catalogue's exit code."""
    # gRPC's C core writes its own lines on the terminal unless told otherwise before it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.umask(0o077)  # nobody else reads what is written on this device, whichever library writes it
    try:
        app()
    except EbbflowError as error:
        typer.echo(f"error: {error}\ncure: {error.cure}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("EBBFLOW_DEBUG"):
            raise
        typer.echo(f"error: unexpected {type(error).__name__}: {error}", err=True)
        typer.echo("cure: Set EBBFLOW_DEBUG=1 to see where, and report it.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
