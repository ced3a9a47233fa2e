"""`ebbflow release`: what distillations made."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebbflow.cli import release_diff, values
from ebbflow.cli.commands import release_export
from ebbflow.cli.options import Limit, Output, Yes, confirm, connect, example, group
from ebbflow.cli.output import Column, Format, print_list, print_one, say, when, word
from ebbflow.cli.release_state import check, state_of
from ebbflow.cli.watching import Reading, follow

if TYPE_CHECKING:
    from ebbflow.client.admin import AdminClient

app = group("Releases: immutable results of distillations.", "ebbflow release list faq")
app.add_typer(release_export.app)

POLL_S = 1.0
COMPARE_S = 600.0
"""Deadline of a comparison: it may build deltas of three precisions."""
UNDECIDED = frozenset({"packed", "proposed"})
"""States in which the gate has not decided."""
Name = Annotated[str, typer.Argument(metavar="RELEASE", help='Such as "faq/3".')]


def _bits(release: Any) -> str:
    from ebbflow.api.v1.resources_pb2 import Precision

    by_variant = zip(release.variants, release.card.bits_per_byte, strict=False)
    return " ".join(f"{word(Precision, variant.precision)} {bits:.3f}" for variant, bits in by_variant)


COLUMNS: list[Column] = [
    ("NAME", lambda release: release.name),
    ("STATE", state_of),
    ("BITS PER BYTE", _bits),
    ("FEEDBACK EPSILON", lambda release: f"{release.card.feedback_epsilon:g}"),
    ("TRAINING EPSILON", lambda release: f"{release.card.training_epsilon:.3g}"),
    ("CREATED (UTC)", lambda release: when(release.create_time)),
    ("REASON", lambda release: release.reason),
]


@app.command("list", epilog=example("ebbflow release list faq", "ebbflow release list -o json"))
def list_(
    context: typer.Context,
    student: Annotated[str, typer.Argument(help="Whose; all students' by default.")] = "-",
    limit: Limit = 0,
    output: Output = Format.TABLE,
) -> None:
    """Lists releases, newest first."""
    from ebbflow.api.v1.release_pb2 import ListReleasesRequest
    from ebbflow.client.admin import listed

    parent = "students/-" if student == "-" else values.full_name("students", student)
    with connect(context) as client:
        items = listed(client.releases.ListReleases, ListReleasesRequest(parent=parent), "releases", limit)
        print_list(output, items, COLUMNS)


@app.command(epilog=example("ebbflow release show faq/3"))
def show(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Shows one release with its evaluation card."""
    from ebbflow.api.v1.release_pb2 import GetReleaseRequest

    request = GetReleaseRequest(name=values.release_name(name))
    with connect(context) as client:
        print_one(output, client.releases.GetRelease(request).release)


@app.command(epilog=example("ebbflow release watch faq/3"))
def watch(context: typer.Context, name: Name, output: Output = Format.TABLE) -> None:
    """Waits until the gate has decided on a release. Exit code 0 if it is published, 5 if not."""
    with connect(context) as client:
        last = await_gate(client, values.release_name(name))
        if output is Format.JSON:
            print_one(output, last)
        else:
            print_list(output, [last], COLUMNS)
    check(last)


@app.command(epilog=example("ebbflow release diff faq/2 faq/3", "ebbflow release diff faq/2 3 -o json"))
def diff(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help='Release to begin from, such as "faq/2".')],
    target: Annotated[str, typer.Argument(help='Release to move to, such as "faq/3" or "3".')],
    tensors: Annotated[int, typer.Option(min=0, help="Most tensors to show.")] = release_diff.TENSORS,
    output: Output = Format.TABLE,
) -> None:
    """Says what changed between two releases of a student, and what it costs a device to move.

    A device fetches the delta if it has the first release, else the full file. The first comparison of two releases
    builds their deltas, which may take a while.
    """
    from ebbflow.api.v1.release_pb2 import CompareReleasesRequest, GetReleaseRequest

    old = values.release_name(base)
    new = values.release_of(old.split("/")[1], target)
    with connect(context) as client:
        request = CompareReleasesRequest(base=old, target=new)
        answer = client.releases.CompareReleases(request, timeout=COMPARE_S)
        if output is Format.JSON:
            print_one(output, answer)
            return
        first, second = (client.releases.GetRelease(GetReleaseRequest(name=name)).release for name in (old, new))
    for line in release_diff.lines(answer, first, second, tensors):
        print(line)


@app.command(epilog=example('ebbflow release revoke faq/3 --reason "gives wrong dosages"'))
def revoke(
    context: typer.Context,
    name: Name,
    reason: Annotated[str, typer.Option(help="Why, for the release and the audit log.")],
    yes: Yes = False,
    output: Output = Format.TABLE,
) -> None:
    """Takes a release back for ever: its rollouts are aborted, no device installs it again. Owners only."""
    from ebbflow.api.v1.release_pb2 import RevokeReleaseRequest

    request = RevokeReleaseRequest(name=values.release_name(name), reason=reason)
    confirm(f"Take {request.name} back for ever? Devices that serve it move to another release.", yes)
    with connect(context) as client:
        revoked = client.releases.RevokeRelease(request).release
    print_one(output, revoked)
    say(f"{revoked.name} is revoked; the signed list follows when distiller and gate have signed it")


@app.command("min", epilog=example("ebbflow release min faq/3"))
def raise_minimum(context: typer.Context, name: Name, yes: Yes = False, output: Output = Format.TABLE) -> None:
    """Forbids every release of the student below this one, for ever. Owners only."""
    from ebbflow.api.v1.release_pb2 import RaiseMinReleaseRequest

    request = RaiseMinReleaseRequest(name=values.release_name(name))
    confirm(f"Forbid every release below {request.name} for ever? Nobody can roll back to one again.", yes)
    with connect(context) as client:
        answer = client.releases.RaiseMinRelease(request)
    print_one(output, answer)
    say(f"the lowest release will be {answer.name}, when distiller and gate have signed it")


def await_gate(client: "AdminClient", name: str) -> Any:
    """Shows a release until the gate has decided, and returns it.

    Raises:
        EbbflowError: the server's, or SERVER_UNAVAILABLE when it stayed away.
    """
    import time

    from ebbflow.api.v1.release_pb2 import GetReleaseRequest

    def stream() -> Iterator[Any]:
        while True:
            yield client.releases.GetRelease(GetReleaseRequest(name=name)).release
            time.sleep(POLL_S)

    return follow(name, stream, _reading, lambda release: state_of(release) not in UNDECIDED)


def _reading(release: Any) -> Reading:
    """Two signatures are wanted: the distiller's and the gate's."""
    state = state_of(release)
    signed = {"packed": 0, "proposed": 1, "published": 2}.get(state, 1)
    note = {
        "packed": "waits for the distiller's signature",
        "proposed": "waits for the gate",
        "published": _bits(release) and f"bits per byte: {_bits(release)}",
    }.get(state, release.reason)
    return Reading(state, signed, 2, note)
