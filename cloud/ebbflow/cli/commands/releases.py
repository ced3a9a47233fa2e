"""`ebbflow release`: what distillations made."""

from typing import Annotated, Any

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, connect, example, group
from ebbflow.cli.output import Column, Format, print_list, print_one, when, word

app = group("Releases: immutable results of distillations.", "ebbflow release list faq")


def _state(release: Any) -> str:
    from ebbflow.api.v1.release_pb2 import Release

    return word(Release.State, release.state)


def _bits(release: Any) -> str:
    from ebbflow.api.v1.resources_pb2 import Precision

    by_variant = zip(release.variants, release.card.bits_per_byte, strict=False)
    return " ".join(f"{word(Precision, variant.precision)} {bits:.3f}" for variant, bits in by_variant)


COLUMNS: list[Column] = [
    ("NAME", lambda release: release.name),
    ("STATE", _state),
    ("BITS PER BYTE", _bits),
    ("FEEDBACK EPSILON", lambda release: f"{release.card.feedback_epsilon:g}"),
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
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="RELEASE", help='Such as "faq/3".')],
    output: Output = Format.TABLE,
) -> None:
    """Shows one release with its evaluation card."""
    from ebbflow.api.v1.release_pb2 import GetReleaseRequest

    request = GetReleaseRequest(name=values.release_name(name))
    with connect(context) as client:
        print_one(output, client.releases.GetRelease(request).release)
