"""The command line of a device: `ebbflow-edge`."""

import os
import sys
from typing import Annotated

import typer

from ebbflow.common.errors import EbbflowError
from ebbflow.edge.options import Config, Output, State, example
from ebbflow.edge.privacy import privacy

app = typer.Typer(
    name="ebbflow-edge",
    help="Serves a student on this device and keeps it up to date.",
    epilog=example("ebbflow-edge enrol --token ebb1.… --cloud cloud.example:8444", "ebbflow-edge run"),
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(privacy, name="privacy")


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


@app.command(epilog=example("ebbflow-edge enrol --token ebb1.… --cloud cloud.example:8444 --label site=berlin"))
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
    new_device: Annotated[
        bool,
        typer.Option(
            "--new-device",
            help="Nobody used this device under another identity: its users need not wait before they report.",
            envvar="EBBFLOW_EDGE_NEW_DEVICE",
        ),
    ] = False,
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
    wish = Wish(cloud, secret, agent_id, labels_of(label or []), new_device)
    typer.echo(do_enrol(settings.folder, wish, device_profile(settings), force=force))


@app.command(epilog=example("ebbflow-edge run --config /etc/ebbflow/agent.toml"))
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


@app.command(epilog=example("ebbflow-edge status -o json"))
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
