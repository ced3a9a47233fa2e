"""`ebbflow rollout start`, `back` and `advise`: what begins a rollout, and what helps to plan one."""

import math
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import phases, values, windows
from ebbflow.cli.options import Output, Yes, confirm, connect, example, request_id
from ebbflow.cli.output import Column, Format, print_json, print_list, print_one, say, table
from ebbflow.cli.quantities import percent
from ebbflow.cli.rollout_print import print_row
from ebbflow.cli.rollout_watch import check, follow
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient

app = typer.Typer(rich_markup_mode=None)

FAILURE_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
CONFIDENCE = 0.95


class OnHalt(Enum):
    """What happens to the devices of a rollout that halts."""

    HOLD = "hold"
    ROLL_BACK = "roll-back"

    @property
    def number(self) -> Any:
        """The value of the contract."""
        from ebbflow.api.v1 import rollout_pb2

        return rollout_pb2.OnHalt.Value(f"ON_HALT_{self.name}")


Share = Annotated[float | None, typer.Option(min=0, max=1, help="Of those that answered, in every phase.")]
Time = Annotated[str | None, typer.Option(help="In every phase, such as 10m.")]
Phases = Annotated[
    list[str] | None,
    typer.Option(
        "--phase",
        metavar="PHASE",
        help='Whom a phase brings in, and its own gates: 0.1, "5% soak=10m", "count=5 selector=ring=canary". Keys:'
        f" {', '.join(phases.KEYS)}. Repeatable; a last phase for the rest is added.",
    ),
]
Windows = Annotated[
    list[str] | None,
    typer.Option(
        "--window",
        metavar="WINDOW",
        help='Devices are told only then, such as "mon-fri 22:00 8h Europe/Berlin" or "always"; repeatable.',
    ),
]
Spread = Annotated[str | None, typer.Option(help="Devices start at random times within this, such as 30m.")]
Halting = Annotated[OnHalt | None, typer.Option("--on-halt", help="What happens to its devices when it halts.")]


@app.command(
    epilog=example(
        "ebbflow rollout start faq/3 --wait",
        "ebbflow rollout start faq/3 --phase 0.05 --phase 0.5 --phase 1 --soak 10m --failure-share 0.1",
        'ebbflow rollout start faq/3 --phase "count=29 soak=1h" --phase 50% --spread 30m --preview',
        'ebbflow rollout start faq/3 --window "mon-fri 22:00 8h Europe/Berlin" --on-halt roll-back',
    )
)
def start(
    context: typer.Context,
    release: Annotated[str, typer.Argument(help='Release to bring, such as "faq/3".')],
    phase: Phases = None,
    success_share: Share = None,
    failure_share: Share = None,
    min_answers: Annotated[int | None, typer.Option(min=1, help="Answers before a share counts.")] = None,
    soak: Time = None,
    silence_limit: Time = None,
    window: Windows = None,
    spread: Spread = None,
    on_halt: Halting = None,
    preview: Annotated[bool, typer.Option("--preview", help="Say what it would do; start nothing.")] = False,
    failure_rate: Annotated[float, typer.Option(help="With --preview: rate that the canaries should see.")] = 0.05,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until it has ended; fail if it halts.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Starts a rollout; it supersedes an unfinished one of the same student.

    What is not said comes from the student's policy (`ebbflow student policy`).
    """
    from ebbflow.api.v1.rollout_pb2 import CreateRolloutRequest

    gates = {
        "success_share": success_share,
        "failure_share": failure_share,
        "min_answers": min_answers,
        "soak_s": _seconds(soak),
        "silence_s": _seconds(silence_limit),
    }
    name = values.release_name(release)
    with connect(context) as client:
        default = [] if phase or not any(_given(gates)) else _policy_phases(client, name)
        rollout = _rollout(name, phases.plan(phase or [], gates, default), window or [], spread, on_halt)
        if preview:
            _preview(client, rollout, failure_rate, output)
            return
        made = client.rollouts.CreateRollout(CreateRolloutRequest(rollout=rollout, request_id=request_id())).rollout
        _finish(client, made, wait=wait, output=output)


@app.command(epilog=example("ebbflow rollout back faq --yes --wait", "ebbflow rollout back faq --to 2"))
def back(
    context: typer.Context,
    student: Annotated[str, typer.Argument(help='Such as "faq".')],
    to: Annotated[str, typer.Option("--to", help='Release, such as "2" or "faq/2"; default the one before.')] = "",
    yes: Yes = False,
    wait: Annotated[bool, typer.Option("--wait", help="Watch until it has ended; fail if it halts.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Brings every device of a student back to an earlier release at once; ends its unfinished rollout."""
    from ebbflow.api.v1.rollout_pb2 import RollBackRequest

    name = values.full_name("students", student)
    release = values.release_of(name, to) if to else ""
    confirm(f"Bring every device of {name} back to {release or 'the release before'}?", yes)
    with connect(context) as client:
        request = RollBackRequest(student=name, release=release, request_id=request_id())
        _finish(client, client.rollouts.RollBack(request).rollout, wait=wait, output=output)


@app.command(epilog=example("ebbflow rollout advise --failure-rate 0.05", "ebbflow rollout advise --agents 40 -o json"))
def advise(
    failure_rate: Annotated[
        list[float] | None, typer.Option(help="Share of agents that would fail; repeatable; default a few.")
    ] = None,
    agents: Annotated[int | None, typer.Option(min=1, help="Canaries: what is the lowest rate that they see?")] = None,
    confidence: Annotated[float, typer.Option(help="Probability of seeing at least one failure.")] = CONFIDENCE,
    output: Output = Format.TABLE,
) -> None:
    """Says how many canaries it takes to see a failure; asks no cloud.

    Of n agents at least one fails with probability 1 - (1 - rate)^n.
    """
    rates = list(failure_rate or ([] if agents else FAILURE_RATES))
    for name, value in (("confidence", confidence), *(("failure rate", rate) for rate in rates)):
        if not 0 < value < 1:
            raise EbbflowError(Reason.INVALID_REQUEST, f"a {name} is above 0 and below 1, not {value:g}", field=name)
    rows = [(rate, agents_needed(rate, confidence)) for rate in rates]
    if agents:
        rows.append((detectable_rate(agents, confidence), agents))
    if output is Format.JSON:
        keys = ("failureRate", "agents", "confidence")
        print_json([dict(zip(keys, (*row, confidence), strict=True)) for row in rows])
        return
    heads = ["FAILURE RATE", f"AGENTS TO SEE IT ({percent(confidence)})"]
    for line in table(heads, [[percent(rate), str(count)] for rate, count in rows]):
        print(line)


def agents_needed(rate: float, confidence: float = CONFIDENCE) -> int:
    """Fewest agents of which at least one fails with this confidence, if each fails with this rate."""
    return max(1, math.ceil(math.log1p(-confidence) / math.log1p(-rate) - 1e-9))


def detectable_rate(agents: int, confidence: float = CONFIDENCE) -> float:
    """Lowest failure rate that so many agents show at least once with this confidence."""
    return -math.expm1(math.log1p(-confidence) / agents)


def _seconds(text: str | None) -> float | None:
    return values.seconds(text) if text else None


def _given(gates: dict[str, Any]) -> list[bool]:
    return [value is not None for value in gates.values()]


def _policy_phases(client: "AdminClient", release: str) -> list[phases.PhaseSpec]:
    """The phases that the student's policy names; gates alone change these."""
    from ebbflow.api.v1.student_pb2 import GetStudentRequest

    student = client.students.GetStudent(GetStudentRequest(name=release.rpartition("/releases/")[0])).student
    return [phases.of_proto(phase) for phase in student.rollout_policy.phases]


def _rollout(
    release: str, plan: list[phases.PhaseSpec], window: list[str], spread: str | None, on_halt: OnHalt | None
) -> Any:
    from ebbflow.api.v1.rollout_pb2 import Rollout

    rollout = Rollout(
        release=release,
        phases=[phases.to_proto(spec) for spec in plan],
        windows=[windows.to_proto(windows.read(text)) for text in window],
    )
    if on_halt is not None:
        rollout.on_halt = on_halt.number
    if spread is not None:
        rollout.spread.FromMilliseconds(round(values.seconds(spread) * 1000))
    return rollout


def _finish(client: "AdminClient", made: Any, *, wait: bool, output: Format) -> None:
    last = follow(client, made.name) if wait else made
    print_row(output, last)
    if wait:
        check(last)


def _preview(client: "AdminClient", rollout: Any, failure_rate: float, output: Format) -> None:
    from ebbflow.api.v1.rollout_pb2 import PreviewRolloutRequest

    answer = client.rollouts.PreviewRollout(PreviewRolloutRequest(rollout=rollout, failure_rate=failure_rate))
    if output is Format.JSON:
        print_one(output, answer)
        return
    specs = [phases.of_proto(phase) for phase in answer.rollout.phases]
    rows = list(enumerate(zip(specs, answer.outlooks, strict=False)))
    columns: list[Column] = [
        ("PHASE", lambda row: row[0] + 1),
        ("BRINGS IN", lambda row: phases.who(row[1][0], last=row[0] == len(specs) - 1)),
        ("AGENTS", lambda row: row[1][1].agents),
        ("CONNECTED", lambda row: row[1][1].connected),
        (f"SEES FAILURE RATES FROM ({percent(CONFIDENCE)})", lambda row: _outlook(row[1][1])),
        ("GATES", lambda row: _gates(row[1][0])),
    ]
    print_list(output, rows, columns)
    say(f"open: {windows.listed(answer.rollout.windows)}; nothing was started")
    first = answer.outlooks[0].connected if answer.outlooks else 0
    advice = f"to see a failure rate of {percent(failure_rate)} with {percent(CONFIDENCE)} probability takes"
    enough = "" if first >= answer.advised_canaries else f"; the first phase has {first} connected"
    say(f"advice: {advice} {answer.advised_canaries} canaries{enough}")


def _outlook(outlook: Any) -> str:
    return percent(outlook.detectable_failure_rate) if outlook.agents else "-"


def _gates(spec: phases.PhaseSpec) -> str:
    from dataclasses import replace

    return phases.write(replace(spec, share=None, count=None, selector=None))
