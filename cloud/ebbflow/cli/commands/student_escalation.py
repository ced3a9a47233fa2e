"""`ebbflow student escalation`: whether agents may send the teacher questions of users who agree."""

from typing import Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Output, connect, example
from ebbflow.cli.output import Format, print_one

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog=example("ebbflow student escalation faq", "ebbflow student escalation faq --allow"))
def escalation(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="STUDENT", help='Such as "faq".')],
    allow: Annotated[
        bool | None, typer.Option("--allow/--forbid", help="May agents escalate? Says so at once.")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Shows whether agents may send hard questions to the teacher; an option changes it. Only owners may change it.

    A prompt then leaves a device if its operator allows that too, the user has agreed and the student is unsure.
    """
    from ebbflow.api.v1.student_pb2 import EscalationPolicy, GetStudentRequest, UpdateEscalationPolicyRequest

    student = values.full_name("students", name)
    with connect(context) as client:
        if allow is None:
            now = client.students.GetStudent(GetStudentRequest(name=student)).student
        else:
            policy = EscalationPolicy(allowed=allow)
            request = UpdateEscalationPolicyRequest(name=student, escalation_policy=policy)
            now = client.students.UpdateEscalationPolicy(request).student
    if output is Format.JSON:
        print_one(output, now.escalation_policy)
    else:
        print("allowed" if now.escalation_policy.allowed else "forbidden")
