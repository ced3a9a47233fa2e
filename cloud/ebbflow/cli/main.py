"""Entry point of `ebbflow`."""

from pathlib import Path
from typing import Annotated

import typer

from ebbflow.cli import errors
from ebbflow.cli.commands import (
    admins,
    agents,
    audit,
    cloud,
    distillations,
    populations,
    privacy,
    releases,
    rollouts,
    rounds,
    students,
    tokens,
    trust,
)
from ebbflow.cli.options import example

API = "ebbflow.api.v1"

app = typer.Typer(
    help="Keeps a small language model good on every device of a fleet.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=example("ebbflow cloud init", "ebbflow cloud serve", "ebbflow token create --uses 10 --label site=berlin"),
)
app.add_typer(cloud.app, name="cloud")
app.add_typer(admins.app, name="admin")
app.add_typer(tokens.app, name="token")
app.add_typer(agents.app, name="agent")
app.add_typer(students.app, name="student")
app.add_typer(distillations.app, name="distillation")
app.add_typer(releases.app, name="release")
app.add_typer(rollouts.app, name="rollout")
app.add_typer(rounds.app, name="round")
app.add_typer(populations.app, name="population")
app.add_typer(trust.app, name="trust")
app.add_typer(privacy.app, name="privacy")
app.add_typer(audit.app, name="audit")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            software = version("ebbflow")
        except PackageNotFoundError:
            software = "(not installed)"
        print(f"ebbflow {software}, API {API}")
        raise typer.Exit


@app.callback()
def root(
    context: Annotated[
        Path | None,
        typer.Option(
            envvar="EBBFLOW_CONTEXT",
            show_envvar=True,
            help="File that says which cloud to speak with, and as whom [default: ~/.config/ebbflow/context.toml]",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and stop.")
    ] = False,
) -> None:
    """Keeps a small language model good on every device of a fleet."""


def main() -> None:
    """Runs the command line and exits with its code."""
    errors.run(app)


if __name__ == "__main__":
    main()
