"""`ebbflow rollout`: staged assignments of releases to agents."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, Yes, confirm, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, print_list, print_one, when, word
from ebbflow.cli.watching import WATCH_S, Reading, follow
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient

app = group("Rollouts: staged assignments of releases.", "ebbflow rollout start faq/3 --phase 0.1 --phase 1 --wait")

Name = Annotated[str, typer.Argument(metavar="ROLLOUT", help='Such as "9f2c".')]
Share = Annotated[float | None, typer.Option(min=0, max=1, help="Of those that answered, in every phase.")]
Time = Annotated[str | None, typer.Option(help="In every phase, such as 10m.")]


def _state(rollout: Any) -> str:
    from ebbflow.api.v1.rollout_pb2 import Rollout

    return word(Rollout.State, rollout.state)


COLUMNS: list[Column] = [
    ("NAME", lambda rollout: rollout.name),
    ("RELEASE", lambda rollout: rollout.release),
    ("STATE", _state),
    ("PHASE", lambda rollout: f"{rollout.phase_index + 1}/{len(rollout.phases)}"),
    ("SUCCEEDED", lambda rollout: rollout.counts.succeeded),
    ("FAILED", lambda rollout: rollout.counts.failed),
    ("ASSIGNED", lambda rollout: rollout.counts.assigned),
    ("WAITING", lambda rollout: rollout.counts.waiting),
    ("CREATED (UTC)", lambda rollout: when(rollout.create_time)),
    ("REASON", lambda rollout: rollout.reason),
]


@app.command(
    epilog=example(
        "ebbflow rollout start faq/3 --wait",
        "ebbflow rollout start faq/3 --phase 0.05 --phase 0.5 --phase 1 --soak 10m --failure-share 0.1",
    )
)
def start(
    context: typer.Context,
    release: Annotated[str, typer.Argument(help='Release to bring, such as "faq/3".')],
    phase: Annotated[
        list[float] | None, typer.Option(help="Share of the agents up to this phase; repeatable; default 0.1 and 1.")
    ] = None,
    success_share: Share = None,
    failure_share: Share = None,
    min_answers: Annotated[int | None, typer.Option(min=1, help="Answers before a share counts.")] = None,
    soak: Time = None,
    silence_limit: Time = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until it has ended; fail if it halts.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Starts a rollout; it supersedes an unfinished one of the same student."""
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.rollout_pb2 import CreateRolloutRequest, Phase, Rollout

    def duration(text: str | None) -> Duration | None:
        return Duration(seconds=int(values.seconds(text))) if text else None

    gates = {
        "success_share": success_share,
        "failure_share": failure_share,
        "min_answers": min_answers,
        "soak": duration(soak),
        "silence_limit": duration(silence_limit),
    }
    phases = [Phase(**fields) for fields in values.phases(phase or [], gates)]
    rollout = Rollout(release=values.release_name(release), phases=phases)
    with connect(context) as client:
        made = client.rollouts.CreateRollout(CreateRolloutRequest(rollout=rollout, request_id=request_id())).rollout
        if wait:
            made = _follow(client, made.name)
        _print(output, made)
    if wait:
        _check(made)


@app.command(epilog=example("ebbflow rollout watch 9f2c"))
def watch(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows progress until a rollout has ended or halted; fails if it did not succeed."""
    with connect(context) as client:
        last = _follow(client, values.full_name("rollouts", name))
        _print(output, last)
    _check(last)


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


@app.command(epilog=example("ebbflow rollout show 9f2c"))
def show(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows one rollout with its phases."""
    from ebbflow.api.v1.rollout_pb2 import GetRolloutRequest

    request = GetRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        print_one(output, client.rollouts.GetRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout pause 9f2c"))
def pause(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Stops assigning further devices."""
    from ebbflow.api.v1.rollout_pb2 import PauseRolloutRequest

    request = PauseRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        _print(output, client.rollouts.PauseRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout resume 9f2c"))
def resume(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Goes on after a pause or a halt."""
    from ebbflow.api.v1.rollout_pb2 import ResumeRolloutRequest

    request = ResumeRolloutRequest(name=values.full_name("rollouts", name))
    with connect(context) as client:
        _print(output, client.rollouts.ResumeRollout(request).rollout)


@app.command(epilog=example("ebbflow rollout abort 9f2c --yes"))
def abort(context: typer.Context, name: Name, yes: Yes = False, output: Output = Format.TABLE) -> None:
    """Ends a rollout; its devices go back to what they had."""
    from ebbflow.api.v1.rollout_pb2 import AbortRolloutRequest

    request = AbortRolloutRequest(name=values.full_name("rollouts", name))
    confirm(f"End {request.name} and take its devices back?", yes)
    with connect(context) as client:
        _print(output, client.rollouts.AbortRollout(request).rollout)


def reading(rollout: Any) -> Reading:
    """Says what to show of a rollout."""
    counts = rollout.counts
    total = counts.waiting + counts.assigned + counts.succeeded + counts.failed
    note = f"phase {rollout.phase_index + 1}/{len(rollout.phases)}, {counts.assigned} assigned, {counts.failed} failed"
    return Reading(_state(rollout), counts.succeeded, total, note + (f": {rollout.reason}" if rollout.reason else ""))


def _follow(client: "AdminClient", name: str) -> Any:
    from ebbflow.api.v1.rollout_pb2 import WatchRolloutRequest

    def stream() -> Iterator[Any]:
        for answer in client.rollouts.WatchRollout(WatchRolloutRequest(name=name), timeout=WATCH_S):
            yield answer.rollout

    # A halted rollout stays so until somebody acts: nobody should wait for that.
    over = {"succeeded", "aborted", "superseded", "halted"}
    return follow(name, stream, reading, lambda rollout: _state(rollout) in over)


def _check(rollout: Any) -> None:
    if (state := _state(rollout)) != "succeeded":
        message = f"{rollout.name} {state}" + (f": {rollout.reason}" if rollout.reason else "")
        raise EbbflowError(Reason.STATE_CONFLICT, message, name=rollout.name)


def _print(output: Format, rollout: Any) -> None:
    if output is Format.JSON:
        print_one(output, rollout)
    else:
        print_list(output, [rollout], COLUMNS)
