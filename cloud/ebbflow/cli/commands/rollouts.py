"""`ebbflow rollout`: staged assignments of releases to agents."""

from typing import Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.commands import rollout_start
from ebbflow.cli.options import Limit, Output, Yes, confirm, connect, example, group
from ebbflow.cli.output import Format, print_list, print_one
from ebbflow.cli.rollout_print import COLUMNS, print_report, print_row
from ebbflow.cli.rollout_watch import check, follow

app = group("Rollouts: staged assignments of releases.", "ebbflow rollout start faq/3 --phase 0.1 --phase 1 --wait")

Name = Annotated[str, typer.Argument(metavar="ROLLOUT", help='Such as "9f2c".')]


app.add_typer(rollout_start.app)


@app.command(epilog=example("ebbflow rollout watch 9f2c", "ebbflow rollout watch 9f2c -o json"))
def watch(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows a rollout live until it has ended or halted.

    On a terminal one view that renews itself, elsewhere one line for each change, on standard error; the last view goes
    to standard output. With -o json, one JSON object for each change, on standard output. Exit code 0 if the rollout
    succeeded, 5 if it halted, was aborted or superseded.
    """
    with connect(context) as client:
        last = follow(client, values.full_name("rollouts", name), each_as_json=output is Format.JSON)
    if output is Format.TABLE:
        print_report(last)
    check(last)


@app.command("list", epilog=example("ebbflow rollout list --student faq"))
def list_(
    context: typer.Context,
    student: Annotated[str, typer.Option(help="Only this student's.")] = "",
    limit: Limit = 0,
    output: Output = Format.TABLE,
) -> None:
    """Lists rollouts, newest first."""
    from ebbflow.api.v1.rollout_pb2 import ListRolloutsRequest
    from ebbflow.client.admin import listed

    request = ListRolloutsRequest(student=values.full_name("students", student) if student else "")
    with connect(context) as client:
        print_list(output, listed(client.rollouts.ListRollouts, request, "rollouts", limit), COLUMNS)


@app.command(epilog=example("ebbflow rollout show 9f2c", "ebbflow rollout show 9f2c -o json"))
def show(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows one rollout: phases, agents, bytes, failures with their agents, and the next decision."""
    from ebbflow.api.v1.rollout_pb2 import GetRolloutRequest

    request = GetRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        rollout = client.rollouts.GetRollout(request).rollout
    if output is Format.JSON:
        print_one(output, rollout)
    else:
        print_report(rollout)


@app.command(epilog=example("ebbflow rollout pause 9f2c"))
def pause(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Stops assigning further devices."""
    from ebbflow.api.v1.rollout_pb2 import PauseRolloutRequest

    request = PauseRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        print_row(output, client.rollouts.PauseRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout resume 9f2c"))
def resume(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Goes on after a pause or a halt; after a halt the failed agents try again."""
    from ebbflow.api.v1.rollout_pb2 import ResumeRolloutRequest

    request = ResumeRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        print_row(output, client.rollouts.ResumeRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout abort 9f2c --yes"))
def abort(context: typer.Context, name: Name, yes: Yes = False, output: Output = Format.TABLE) -> None:
    """Ends a rollout; its devices go back to what they had."""
    from ebbflow.api.v1.rollout_pb2 import AbortRolloutRequest

    request = AbortRolloutRequest(name=values.full_name("rollouts", name))
    confirm(f"End {request.name} and take its devices back?", yes)
    with connect(context) as client:
        print_row(output, client.rollouts.AbortRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout approve 9f2c"))
def approve(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Lets a rollout begin that waits for a second person, who must not be its creator."""
    from ebbflow.api.v1.rollout_pb2 import ApproveRolloutRequest

    request = ApproveRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        print_row(output, client.rollouts.ApproveRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout retry 9f2c", "ebbflow rollout retry 9f2c --agent kiosk-7"))
def retry(
    context: typer.Context,
    name: Name,
    agent: Annotated[list[str] | None, typer.Option(help="Only this one; repeatable; default all failed.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Gives failed agents another try, also after the rollout has succeeded."""
    from ebbflow.api.v1.rollout_pb2 import RetryRolloutRequest

    agents = [values.full_name("agents", one) for one in agent or []]
    request = RetryRolloutRequest(name=values.full_name("rollouts", name), agents=agents)
    with connect(context) as client:
        print_row(output, client.rollouts.RetryRollout(request).rollout)
