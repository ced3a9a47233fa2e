"""`ebbflow privacy`: privacy budgets, and what the agents have spent of them."""

from typing import Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.commands import privacy_audit, privacy_plan, privacy_policy
from ebbflow.cli.options import Limit, Output, connect, example, group
from ebbflow.cli.output import Column, Format, print_list

app = group("Privacy budgets: what is allowed, and what was spent.", "ebbflow privacy show --agent kiosk-7")
app.add_typer(privacy_policy.app, name="policy")
app.command(epilog=privacy_plan.EPILOG)(privacy_plan.plan)
app.command(epilog=privacy_audit.EPILOG)(privacy_audit.audit)

COLUMNS: list[Column] = [
    ("AGENT", lambda account: account.agent),
    ("STUDENT", lambda account: account.student),
    ("WINDOW", lambda account: account.window),
    ("EPSILON SPENT", lambda account: f"{account.epsilon_spent:.4g}"),
    ("EPSILON LEFT", lambda account: f"{account.epsilon_left:.4g}"),
    ("ALL WINDOWS", lambda account: f"{account.epsilon_lifetime:.4g}"),
    ("DELTA", lambda account: f"{account.delta:g}"),
    ("BATCHES", lambda account: account.entries),
]


@app.command(epilog=example("ebbflow privacy show", "ebbflow privacy show --agent kiosk-7 -o json"))
def show(
    context: typer.Context,
    agent: Annotated[str, typer.Option(help="Only this agent.")] = "",
    limit: Limit = 0,
    output: Output = Format.TABLE,
) -> None:
    """Shows epsilon spent and left, for each user on an agent and each window: the cloud's mirror of their accounts.

    Told is the larger of two laws that fit the mechanism; -o json holds them all.
    """
    from ebbflow.api.v1.ledger_pb2 import ListPrivacyAccountsRequest
    from ebbflow.client.admin import listed

    request = ListPrivacyAccountsRequest(agent=values.full_name("agents", agent) if agent else "")
    with connect(context) as client:
        items = listed(client.ledger.ListPrivacyAccounts, request, "privacy_accounts", limit)
        print_list(output, items, COLUMNS)
