"""`ebbflow-edge privacy`: what leaves this device, and who takes part."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ebbflow.edge.options import Config, Output, State, example

if TYPE_CHECKING:
    from ebbflow.edge.agent.settings import AgentSettings
    from ebbflow.edge.feedback.store import FeedbackStore

privacy = typer.Typer(
    help="What leaves this device, and who takes part.",
    epilog=example("ebbflow-edge privacy show"),
    no_args_is_help=True,
    rich_markup_mode=None,
)
User = Annotated[
    str, typer.Option("--user", help='The user as the application names them; "" for requests without one.')
]


@contextmanager
def _opened(config: Path | None, state: Path | None) -> Iterator[tuple["FeedbackStore", "AgentSettings"]]:
    """Opens the store beside the agent, which may run."""
    from ebbflow.edge.agent.local import open_store
    from ebbflow.edge.agent.settings import AgentSettings

    settings = AgentSettings.load(config, state)
    store = open_store(settings)
    try:
        yield store, settings
    finally:
        store.close()


@privacy.command(epilog=example("ebbflow-edge privacy show --state /var/lib/ebbflow-edge"))
def show(config: Config = None, state: State = None) -> None:
    """Says in plain words what leaves this device, what it has cost and what is left."""
    import datetime as dt

    from ebbflow.edge.agent.local import ceiling_of, identity_of
    from ebbflow.edge.feedback.show import describe

    with _opened(config, state) as (store, settings):
        typer.echo(describe(store, ceiling_of(settings), identity_of(settings), dt.datetime.now(dt.UTC)))


@privacy.command(epilog=example("ebbflow-edge privacy plans", "ebbflow-edge privacy plans --limit 1 -o json"))
def plans(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 10,
    texts: Annotated[int, typer.Option(min=0, help="Texts of each bin to show.")] = 2,
    output: Annotated[Output, typer.Option("-o", "--output", help="How to print; json holds everything.")] = (
        Output.table
    ),
    config: Config = None,
    state: State = None,
) -> None:
    """Shows what the cloud has asked of this device: each plan, the texts of its bins, and what became of it."""
    from ebbflow.edge.feedback.show_plans import as_json, as_text

    with _opened(config, state) as (store, _):
        decisions = store.decisions(limit)
    typer.echo(as_json(decisions) if output is Output.json else as_text(decisions, texts))


@privacy.command(
    epilog=example(
        "ebbflow-edge privacy consent --user ada@example.org --no", "ebbflow-edge privacy consent --user ada --yes"
    )
)
def consent(
    user: User,
    allowed: Annotated[bool, typer.Option("--yes/--no", help="Whether the user takes part in feedback.")],
    config: Config = None,
    state: State = None,
) -> None:
    """Keeps a user's word on private feedback. While it is no, nothing of theirs is kept or voted with."""
    with _opened(config, state) as (store, _):
        store.set_consent(user or None, allowed=allowed)
    typer.echo("The user takes part." if allowed else "The user does not take part; `privacy purge` forgets the past.")


@privacy.command(epilog=example("ebbflow-edge privacy pause --user ada@example.org"))
def pause(user: User, config: Config = None, state: State = None) -> None:
    """Stops a user's votes without forgetting anything."""
    _set_paused(user, config, state, paused=True)
    typer.echo("The user is not voted for until `privacy resume`.")


@privacy.command(epilog=example("ebbflow-edge privacy resume --user ada@example.org"))
def resume(user: User, config: Config = None, state: State = None) -> None:
    """Lets a user's votes count again."""
    _set_paused(user, config, state, paused=False)
    typer.echo("The user is voted for again.")


def _set_paused(user: str, config: Path | None, state: Path | None, *, paused: bool) -> None:
    with _opened(config, state) as (store, _):
        store.set_paused(user or None, paused=paused)


@privacy.command(epilog=example("ebbflow-edge privacy purge --user ada@example.org"))
def purge(user: User, config: Config = None, state: State = None) -> None:
    """Deletes everything that is kept of one user's requests; their word on feedback stays.

    An agent that runs drops the beginnings of prompts that its engines have cached, those of all users, within seconds.
    """
    with _opened(config, state) as (store, settings):
        count = store.purge_user(user or None)
        settings.folder.purged.touch(mode=0o600)
    typer.echo(f"{count} interactions deleted")
