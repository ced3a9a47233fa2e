"""`ebbflow audit`: who did what."""

from typing import Annotated

import typer

from ebbflow.cli.options import Output, connect, example, group
from ebbflow.cli.output import Column, Format, print_list, when

app = group("The audit log.", "ebbflow audit list --actor admins/ada --limit 20")

COLUMNS: list[Column] = [
    ("TIME (UTC)", lambda entry: when(entry.create_time)),
    ("ACTOR", lambda entry: entry.actor),
    ("METHOD", lambda entry: entry.method),
    ("RESOURCE", lambda entry: entry.resource),
    ("CODE", lambda entry: entry.code),
]


@app.command("list", epilog=example("ebbflow audit list --actor admins/ada --limit 20"))
def list_(
    context: typer.Context,
    actor: Annotated[str, typer.Option(help='Only what this one did, such as "admins/ada".')] = "",
    limit: Annotated[int, typer.Option(min=0, help="Most to list; 0 lists all.")] = 100,
    output: Output = Format.TABLE,
) -> None:
    """Lists what was done and tried, newest first."""
    from ebbflow.api.v1.ledger_pb2 import ListAuditEntriesRequest
    from ebbflow.client.admin import listed

    with connect(context) as client:
        items = listed(client.ledger.ListAuditEntries, ListAuditEntriesRequest(actor=actor), "audit_entries", limit)
        print_list(output, items, COLUMNS)
