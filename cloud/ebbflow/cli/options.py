"""Options that many commands share, and how a command reaches the cloud."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebbflow.cli.output import Format

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient

Output = Annotated[Format, typer.Option("--output", "-o", help="How to print.")]
Limit = Annotated[int, typer.Option("--limit", min=0, help="Most to list; 0 lists all.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def example(*lines: str) -> str:
    """Returns the end of a command's help."""
    return "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])


def group(help_: str, *examples: str) -> typer.Typer:
    """Makes a group of commands."""
    return typer.Typer(help=help_, no_args_is_help=True, rich_markup_mode=None, epilog=example(*examples))


@contextmanager
def connect(context: typer.Context) -> "Iterator[AdminClient]":
    """Opens the cloud that --context, EBBFLOW_CONTEXT or the user's configuration names."""
    # gRPC's C core writes its own log lines on the terminal unless told otherwise before it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from ebbflow.client.admin import AdminClient

    with AdminClient.from_context(context_file(context)) as client:
        yield client


def context_file(context: typer.Context) -> Path:
    """Returns the file that --context, EBBFLOW_CONTEXT or the user's configuration names."""
    from ebbflow.client.context import find_context

    explicit: Path | None = context.find_root().params.get("context")
    return find_context(explicit)


def request_id() -> str:
    """Makes the UUID by which the cloud knows a retry."""
    import uuid

    return str(uuid.uuid4())


def confirm(question: str, yes: bool) -> None:
    """Asks before something that cannot be undone; on "no" the command ends with exit code 1."""
    if not yes:
        typer.confirm(question, abort=True, err=True)
