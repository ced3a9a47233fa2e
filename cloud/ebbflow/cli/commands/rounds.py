"""`ebbflow round`: collections of feedback."""

from typing import Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, print_list, print_one, when, word

app = group("Rounds: collections of private feedback.", "ebbflow round open faq --duration 1d")


def _state(round_: Any) -> str:
    from ebbflow.api.v1.round_pb2 import Round

    return word(Round.State, round_.state)


COLUMNS: list[Column] = [
    ("NAME", lambda round_: round_.name),
    ("STUDENT", lambda round_: round_.plan.student),
    ("STATE", _state),
    ("ASKED", lambda round_: round_.cohort_size),
    ("ACCEPTED", lambda round_: round_.batches_accepted),
    ("REFUSED", lambda round_: round_.batches_refused),
    ("WINDOW", lambda round_: round_.plan.window),
    ("ENDS (UTC)", lambda round_: when(round_.plan.end_time)),
]


@app.command("open", epilog=example("ebbflow round open faq --duration 1d --lookback 7d"))
def open_(
    context: typer.Context,
    student: str,
    duration: Annotated[str, typer.Option(help="How long batches are taken.")] = "1d",
    lookback: Annotated[str, typer.Option(help="How old the interactions may be.")] = "7d",
    output: Output = Format.TABLE,
) -> None:
    """Signs a plan and asks every agent of a student for a batch."""
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.round_pb2 import OpenRoundRequest

    request = OpenRoundRequest(
        student=values.full_name("students", student),
        duration=Duration(seconds=int(values.seconds(duration))),
        lookback=Duration(seconds=int(values.seconds(lookback))),
        request_id=request_id(),
    )
    with connect(context) as client:
        _print(output, client.rounds.OpenRound(request).round)


@app.command(epilog=example("ebbflow round close 5c1e"))
def close(context: typer.Context, name: str, output: Output = Format.TABLE) -> None:
    """Refuses further batches and aggregates those that came."""
    from ebbflow.api.v1.round_pb2 import CloseRoundRequest

    request = CloseRoundRequest(name=values.full_name("rounds", name))
    with connect(context) as client:
        _print(output, client.rounds.CloseRound(request).round)


@app.command("list", epilog=example("ebbflow round list --student faq"))
def list_(
    context: typer.Context,
    student: Annotated[str, typer.Option(help="Only this student's.")] = "",
    limit: Limit = 0,
    output: Output = Format.TABLE,
) -> None:
    """Lists rounds, newest first."""
    from ebbflow.api.v1.round_pb2 import ListRoundsRequest
    from ebbflow.client.admin import listed

    request = ListRoundsRequest(student=values.full_name("students", student) if student else "")
    with connect(context) as client:
        print_list(output, listed(client.rounds.ListRounds, request, "rounds", limit), COLUMNS)


@app.command(epilog=example("ebbflow round show 5c1e -o json"))
def show(context: typer.Context, name: str, output: Output = Format.TABLE) -> None:
    """Shows one round, with its plan and what came of it; the bins' texts only with -o json."""
    from ebbflow.api.v1.round_pb2 import GetRoundRequest

    request = GetRoundRequest(name=values.full_name("rounds", name))
    with connect(context) as client:
        found = client.rounds.GetRound(request).round
    if output is Format.TABLE:
        for bin_ in found.plan.bins:
            del bin_.texts[:]
    print_one(output, found)


def _print(output: Format, round_: Any) -> None:
    # The plan carries every bin's texts; a person who opens or closes a round wants one line.
    if output is Format.JSON:
        print_one(output, round_)
    else:
        print_list(output, [round_], COLUMNS)
