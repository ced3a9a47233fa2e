"""`ebbflow student policy`: what every rollout of a student keeps to."""

from typing import Annotated, Any

import typer

from ebbflow.cli import phases, values, windows
from ebbflow.cli.commands.rollout_start import Halting, OnHalt, Spread
from ebbflow.cli.options import Output, connect, example
from ebbflow.cli.output import Format, print_one, printable, word
from ebbflow.cli.quantities import duration

app = typer.Typer(rich_markup_mode=None)

BUILT_IN = "default"
KEPT_RELEASES = 10
"""What the cloud takes for 0."""


@app.command(
    epilog=example(
        "ebbflow student policy faq",
        'ebbflow student policy faq --approval --window "mon-fri 22:00 8h Europe/Berlin" --spread 30m',
        'ebbflow student policy faq --phase "count=29 soak=1h" --phase 50% --on-halt roll-back --kept-releases 20',
        f"ebbflow student policy faq --no-approval --window {windows.ALWAYS} --phase {BUILT_IN}",
    )
)
def policy(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="STUDENT", help='Such as "faq".')],
    approval: Annotated[
        bool | None, typer.Option("--approval/--no-approval", help="Must a second person approve a rollout?")
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(help=f'As in `ebbflow rollout start`; "{BUILT_IN}" for the built-in ones; repeatable.'),
    ] = None,
    window: Annotated[
        list[str] | None, typer.Option(help=f'As in `ebbflow rollout start`; "{windows.ALWAYS}" for none; repeatable.')
    ] = None,
    spread: Spread = None,
    on_halt: Halting = None,
    kept_releases: Annotated[
        int | None, typer.Option(min=0, help=f"Releases to keep installable; 0 means {KEPT_RELEASES}.")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Shows what every rollout of a student keeps to; options change it. Only owners may change it.

    What no option names stays as it is.
    """
    from ebbflow.api.v1.student_pb2 import GetStudentRequest, UpdateRolloutPolicyRequest

    student = values.full_name("students", name)
    wanted = (approval, phase, window, spread, on_halt, kept_releases)
    with connect(context) as client:
        now = client.students.GetStudent(GetStudentRequest(name=student)).student.rollout_policy
        if any(value is not None for value in wanted):
            _change(now, approval, kept_releases)
            _change_rollout(now, phase, window, spread, on_halt)
            request = UpdateRolloutPolicyRequest(name=student, rollout_policy=now)
            now = client.students.UpdateRolloutPolicy(request).student.rollout_policy
    if output is Format.JSON:
        print_one(output, now)
        return
    for line in lines(now):
        print(line)


def lines(policy_: Any) -> list[str]:
    """Returns a policy for people."""
    from ebbflow.api.v1.rollout_pb2 import OnHalt as Halts

    specs = [phases.write(phases.of_proto(phase)) for phase in policy_.phases]
    spread_s = policy_.spread.ToMilliseconds() / 1000
    known = [
        ("approval", "by a second person" if policy_.approval_required else "not needed"),
        *(("phases" if index == 0 else "", spec) for index, spec in enumerate(specs or ["built-in: 10 %, then all"])),
        ("windows", windows.listed(policy_.windows)),
        ("spread", duration(spread_s) if spread_s else "none"),
        ("on halt", word(Halts, policy_.on_halt or OnHalt.HOLD.number).replace("_", " ")),
        ("kept releases", str(policy_.kept_releases or KEPT_RELEASES)),
    ]
    width = max(len(name) for name, _ in known)
    return [f"{name.ljust(width)}  {printable(text)}" for name, text in known]


def _change(policy_: Any, approval: bool | None, kept_releases: int | None) -> None:
    if approval is not None:
        policy_.approval_required = approval
    if kept_releases is not None:
        policy_.kept_releases = kept_releases


def _change_rollout(
    policy_: Any, phase: list[str] | None, window: list[str] | None, spread: str | None, on_halt: OnHalt | None
) -> None:
    if phase is not None:
        del policy_.phases[:]
        specs = [] if phase == [BUILT_IN] else phases.plan(phase, {})
        policy_.phases.extend(phases.to_proto(spec) for spec in specs)
    if window is not None:
        del policy_.windows[:]
        wanted = [] if window == [windows.ALWAYS] else [windows.read(text) for text in window]
        policy_.windows.extend(windows.to_proto(one) for one in wanted)
    if spread is not None:
        policy_.spread.FromMilliseconds(round(values.seconds(spread) * 1000))
    if on_halt is not None:
        policy_.on_halt = on_halt.number
