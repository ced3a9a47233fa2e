"""`ebbflow token`: what lets devices in."""

from typing import Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.options import Limit, Output, connect, example, group, request_id
from ebbflow.cli.output import Column, Format, as_json, pairs, print_json, print_list, print_one, say, when

app = group("Enrolment tokens.", "ebbflow token create --uses 10 --lifetime 1d --label site=berlin")

COLLECTION = "enrolmentTokens"
COLUMNS: list[Column] = [
    ("NAME", lambda token: token.name),
    ("USES LEFT", lambda token: token.uses_left),
    ("EXPIRES (UTC)", lambda token: when(token.expire_time)),
    ("REVOKED", lambda token: "yes" if token.revoked else "no"),
    ("LABELS", lambda token: pairs(token.labels)),
]


@app.command(epilog=example("ebbflow token create --uses 10 --lifetime 1d --label site=berlin"))
def create(
    context: typer.Context,
    uses: Annotated[int, typer.Option(min=1, help="Devices that may use it.")] = 1,
    lifetime: Annotated[str, typer.Option(help="How long it works, such as 90s, 15m or 7d.")] = "1h",
    label: Annotated[list[str] | None, typer.Option(help="Label that its agents get; repeatable.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """Makes a token and prints its secret, which is shown this once and pins the cloud's certificate authority."""
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.fleet_pb2 import CreateEnrolmentTokenRequest

    request = CreateEnrolmentTokenRequest(
        labels=values.labels(label or []),
        uses=uses,
        lifetime=Duration(seconds=int(values.seconds(lifetime))),
        request_id=request_id(),
    )
    with connect(context) as client:
        answer = client.fleet.CreateEnrolmentToken(request)
    if output is Format.JSON:
        print_json(as_json(answer))
        return
    made = answer.enrolment_token
    say(f"{made.name}: {made.uses_left} uses until {when(made.expire_time)} UTC. Use it with `ebbflow-edge enrol`:")
    print(answer.secret)


@app.command("list", epilog=example("ebbflow token list -o json"))
def list_(context: typer.Context, limit: Limit = 0, output: Output = Format.TABLE) -> None:
    """Lists tokens, without their secrets, newest first."""
    from ebbflow.api.v1.fleet_pb2 import ListEnrolmentTokensRequest
    from ebbflow.client.admin import listed

    with connect(context) as client:
        items = listed(client.fleet.ListEnrolmentTokens, ListEnrolmentTokensRequest(), "enrolment_tokens", limit)
        print_list(output, items, COLUMNS)


@app.command(epilog=example("ebbflow token revoke 3kq7abcd"))
def revoke(context: typer.Context, name: str, output: Output = Format.TABLE) -> None:
    """Makes a token useless; agents that came in by it stay."""
    from ebbflow.api.v1.fleet_pb2 import RevokeEnrolmentTokenRequest

    request = RevokeEnrolmentTokenRequest(name=values.full_name(COLLECTION, name))
    with connect(context) as client:
        print_one(output, client.fleet.RevokeEnrolmentToken(request).enrolment_token)
