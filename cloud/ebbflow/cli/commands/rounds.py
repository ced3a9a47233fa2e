"""`ebbflow round`: collections of feedback."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, print_list, print_one, when, word
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.api.v1.feedback_pb2 import Metric, RoundPlan

app = group("Rounds: collections of private feedback.", "ebbflow round open faq --duration 1d")


class Measure(Enum):
    """Ways to liken texts to bins."""

    LEXICAL = "lexical"
    STUDENT = "student"

    @property
    def number(self) -> "RoundPlan.Measure.ValueType":
        """Its number in the contract."""
        from ebbflow.api.v1.feedback_pb2 import RoundPlan

        return RoundPlan.Measure.Value(f"MEASURE_{self.name}")


def read_metric(text: str) -> "Metric":
    """Reads a counter such as "accepted=3"; without a number one user adds at most 1.

    Raises:
        EbbflowError: INVALID_REQUEST.
    """
    from ebbflow.api.v1.feedback_pb2 import Metric

    kinds = {
        "accepted": Metric.KIND_ACCEPTED,
        "failed": Metric.KIND_FAILED,
        "near": Metric.KIND_NEAR,
    }
    kind, _, cap = text.partition("=")
    if kind not in kinds or not (cap or "1").isdecimal():
        message = f"{text!r} is no counter such as accepted=3, failed=3 or near"
        raise EbbflowError(Reason.INVALID_REQUEST, message, field="metrics")
    return Metric(kind=kinds[kind], cap=int(cap or "1"))


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


@app.command(
    "open",
    epilog=example(
        "ebbflow round open faq --duration 1d --lookback 7d",
        "ebbflow round open faq --population 3 --measure student --metric near --near 0.4",
        "ebbflow round open faq --adapter --rank 2 --module q_proj --users-per-agent 50",
    ),
)
def open_(
    context: typer.Context,
    student: str,
    duration: Annotated[str, typer.Option(help="How long batches are taken.")] = "1d",
    lookback: Annotated[str, typer.Option(help="How old the interactions may be.")] = "7d",
    population: Annotated[
        int, typer.Option(min=0, help="Generation of prompts to vote on; 0 takes the corpus' topics.")
    ] = 0,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Counter such as accepted=3, failed=3 or near; each costs noise. Repeatable."),
    ] = None,
    measure: Annotated[Measure, typer.Option(help="How texts are likened to bins.")] = Measure.LEXICAL,
    near: Annotated[float, typer.Option(min=0.0, max=1.0, help="Least cosine that the metric `near` counts.")] = 0.3,
    max_users: Annotated[int, typer.Option(min=0, help="Largest count of one cell; 0 means 1000.")] = 0,
    adapter: Annotated[bool, typer.Option("--adapter", help="Ask for adapter updates and not for votes.")] = False,
    users_per_agent: Annotated[int, typer.Option(min=0, help="Users expected on each agent; 0 means 1.")] = 0,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the adapter; 0 takes what the fleet can bear.")] = 0,
    module: Annotated[
        list[str] | None, typer.Option(help="Layer to change, such as q_proj; repeatable. Default: o_proj, down_proj.")
    ] = None,
    clip_norm: Annotated[float, typer.Option(min=0.0, help="Most that one user may change; 0 means 1.")] = 0.0,
    steps: Annotated[int, typer.Option(min=0, help="Steps of training for each user; 0 means 8.")] = 0,
    max_staleness: Annotated[int, typer.Option(min=0, help="How many releases behind an agent may be.")] = 0,
    output: Output = Format.TABLE,
) -> None:
    """Signs a plan and asks every agent of a student for a batch."""
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.round_pb2 import AdapterSettings, OpenRoundRequest

    asks = AdapterSettings(
        rank=rank,
        modules=module or [],
        clip_norm=clip_norm,
        steps=steps,
        max_staleness=max_staleness,
        users_per_agent=users_per_agent,
    )
    if not adapter and asks != AdapterSettings():
        raise EbbflowError(Reason.INVALID_REQUEST, "what an adapter is like makes sense with --adapter only")
    request = OpenRoundRequest(
        student=values.full_name("students", student),
        duration=Duration(seconds=int(values.seconds(duration))),
        lookback=Duration(seconds=int(values.seconds(lookback))),
        request_id=request_id(),
        metrics=[read_metric(text) for text in metric or []],
        population=population,
        max_users=max_users,
        adapter=asks if adapter else None,
    )
    if not adapter:
        request.measure, request.near_micro = measure.number, round(near * 1_000_000)
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
