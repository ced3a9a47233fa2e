"""`ebbflow privacy policy`: what agents may be asked, and what that means over time."""

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Output, Yes, confirm, connect, example, group
from ebbflow.cli.output import Format, print_list, print_one, printable, say, table, when

app = group("The signed privacy policy of a student.", "ebbflow privacy policy show faq")

Student = Annotated[str, typer.Argument(metavar="STUDENT", help='Such as "faq".')]

_HISTORY = [
    ("VERSION", lambda document: document.version),
    ("SIGNED (UTC)", lambda document: when(document.create_time)),
    ("EPSILON", lambda document: f"{document.policy.epsilon:g}"),
    ("DELTA", lambda document: f"{document.policy.delta:g}"),
    ("DAYS", lambda document: document.policy.window_days),
    ("ROUNDS", lambda document: document.policy.rounds_per_window),
    ("NOTE", lambda document: document.note),
]


@app.command(epilog=example("ebbflow privacy policy show faq", "ebbflow privacy policy show faq --history"))
def show(
    context: typer.Context,
    name: Student,
    history: Annotated[bool, typer.Option("--history", help="List every version that was signed.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Shows what agents may be asked, and which epsilon that is over a round, a window and a year."""
    from ebbflow.api.v1.student_pb2 import ListPrivacyPoliciesRequest

    student = values.full_name("students", name)
    with connect(context) as client:
        documents = client.students.ListPrivacyPolicies(ListPrivacyPoliciesRequest(name=student)).documents
        newest = documents[0] if documents else _unsigned(client, student)
    if history:
        print_list(output, documents, _HISTORY)
    elif output is Format.JSON:
        print_one(output, newest)
    else:
        for line in lines(newest):
            print(line)


@app.command(
    "set",
    epilog=example(
        'ebbflow privacy policy set faq --epsilon 2 --note "as agreed with the works council"',
        'ebbflow privacy policy set faq --lifetime-epsilon 12 --retention-days 30 --note "for good"',
        'ebbflow privacy policy set faq --allow-adapters --note "adapters on trial"',
    ),
)
def set_(
    context: typer.Context,
    name: Student,
    note: Annotated[str, typer.Option(help="Why it changes; every agent's operator can read it.")],
    epsilon: Annotated[float | None, typer.Option(help="Of a window, for each user of an agent.")] = None,
    delta: Annotated[float | None, typer.Option(help="At which epsilon holds.")] = None,
    window_days: Annotated[int | None, typer.Option(min=1, help="Length of a window in days.")] = None,
    rounds_per_window: Annotated[int | None, typer.Option(min=1, help="Rounds that share a window's budget.")] = None,
    lifetime_epsilon: Annotated[float | None, typer.Option(help="Of all windows together; 0 sets no limit.")] = None,
    retention_days: Annotated[int | None, typer.Option(min=1, help="How long the cloud keeps batches.")] = None,
    allow_adapters: Annotated[
        bool | None, typer.Option("--allow-adapters/--no-adapters", help="May rounds ask for adapter updates?")
    ] = None,
    yes: Yes = False,
    output: Output = Format.TABLE,
) -> None:
    """Signs a new version. Only owners may. Rounds that are open keep to the version that they began with.

    What no option names stays as it is. Agents refuse what is above their own ceiling.
    """
    from ebbflow.api.v1.student_pb2 import GetStudentRequest, UpdatePrivacyPolicyRequest
    from ebbflow.common.privacy.calibration import with_lifetime

    student = values.full_name("students", name)
    changes = {
        "epsilon": epsilon,
        "delta": delta,
        "window_days": window_days,
        "rounds_per_window": rounds_per_window,
        "retention_days": retention_days,
        "allow_adapters": allow_adapters,
        "lifetime_rho_cap_nano": None if lifetime_epsilon is None else 0,
    }
    with connect(context) as client:
        policy = client.students.GetStudent(GetStudentRequest(name=student)).student.privacy_policy
        for field, value in changes.items():
            if value is not None:
                setattr(policy, field, value)
        for line in spending(with_lifetime(policy, lifetime_epsilon or 0.0)):
            say(line)
        confirm(f"Sign this as the privacy policy of {student}?", yes)
        request = UpdatePrivacyPolicyRequest(
            name=student, privacy_policy=policy, note=note, lifetime_epsilon=lifetime_epsilon or 0.0
        )
        document = client.students.UpdatePrivacyPolicy(request).document
    if output is Format.JSON:
        print_one(output, document)
    else:
        print(f"version {document.version} of the privacy policy of {student} is signed")


def lines(document: Any) -> list[str]:
    """Returns a policy for people."""
    policy = document.policy
    signed = f"version {document.version}, {when(document.create_time)} UTC" if document.version else "not yet"
    known = [
        ("signed", signed),
        ("note", document.note),
        ("epsilon", f"{policy.epsilon:g} at delta {policy.delta:g}, for each user of an agent and window"),
        ("window", f"{policy.window_days} days, {policy.rounds_per_window} rounds"),
        ("batches are kept", f"{policy.retention_days} days"),
        ("adapter updates", "allowed" if policy.allow_adapters else "not allowed"),
    ]
    width = max(len(name) for name, _ in known)
    return [f"{name.ljust(width)}  {printable(text) or '-'}" for name, text in known] + ["", *spending(policy)]


def spending(policy: Any) -> list[str]:
    """Returns what a user gives away who is present all the time, by three laws beside each other."""
    from ebbflow.common.privacy.accounting import WINDOWS_PER_YEAR, epsilon_of

    rounds = policy.rounds_per_window
    cost_nano = policy.rho_cap_nano // rounds
    spans = [("1 round", 1), (f"1 window, {rounds} rounds", rounds)]
    spans.append((f"{WINDOWS_PER_YEAR} windows, {WINDOWS_PER_YEAR * rounds} rounds", WINDOWS_PER_YEAR * rounds))
    if policy.lifetime_rho_cap_nano:
        most = policy.lifetime_rho_cap_nano // cost_nano
        spans.append((f"for good, {most} rounds", most))
        limit = f"all windows together: at most epsilon {epsilon_of(policy.lifetime_rho_cap_nano, policy.delta):.4g}"
    else:
        limit = "all windows together: no limit, the budget renews with every window"
    rows = [[what, *laws(cost_nano, times, policy.delta)] for what, times in spans]
    return [
        f"A user who votes in every round has spent, in epsilon at delta {policy.delta:g}:",
        *table(["AFTER", "QUOTED", "LOSS DISTRIBUTION", "GAUSSIAN", "ZCDP"], rows),
        limit,
    ]


def laws(cost_nano: int, times: int, delta: float) -> Iterable[str]:
    """Yields the epsilon of several equal charges: the one to quote, and by every law; "-" where it is not known."""
    from ebbflow.common.errors import EbbflowError, Reason
    from ebbflow.common.privacy import accounting
    from ebbflow.common.privacy.loss_distribution import epsilons

    rho = cost_nano * times / accounting.NANO
    gaussian, zcdp = accounting.gaussian_epsilon(rho, delta), accounting.zcdp_epsilon(rho, delta)
    try:
        exact = epsilons([cost_nano] * times, delta).loss_distribution
    except EbbflowError as error:
        if error.reason is not Reason.EXTRA_MISSING:
            raise
        exact = None
    known = (max(gaussian, exact or 0.0), exact, gaussian, zcdp)
    return ("-" if value is None else f"{value:.4g}" for value in known)


def _unsigned(client: Any, student: str) -> Any:
    """The policy of a student that an older version made: it is signed when it is first needed."""
    from ebbflow.api.v1.feedback_pb2 import PolicyDocument
    from ebbflow.api.v1.student_pb2 import GetStudentRequest

    policy = client.students.GetStudent(GetStudentRequest(name=student)).student.privacy_policy
    return PolicyDocument(student=student, policy=policy)
