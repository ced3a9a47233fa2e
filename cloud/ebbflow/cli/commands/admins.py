"""`ebbflow admin`: people and programs that administer the fleet."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ebbflow.cli import values
from ebbflow.cli.options import connect, example, group
from ebbflow.cli.output import say
from ebbflow.common.errors import EbbflowError, Reason

app = group("Admins and their certificates.", "ebbflow admin create ada --role operator")


class Role(Enum):
    """What an admin may do."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    OWNER = "owner"


@app.command(epilog=example("ebbflow admin create ada --role operator --lifetime 90d --out ./ada"))
def create(
    context: typer.Context,
    admin_id: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and hyphens.")],
    role: Annotated[Role, typer.Option(help="viewer reads, operator also acts, owner also makes admins.")],
    lifetime: Annotated[str, typer.Option(help="How long the certificate works, such as 30d.")] = "90d",
    out: Annotated[Path | None, typer.Option(help="Folder for the new context; NAME by default.")] = None,
) -> None:
    """Makes an admin: a key and a certificate in a folder of its own, ready for --context.

    Run again for the same name, it replaces the certificates that the admin had. Owners only.
    """
    from google.protobuf.duration_pb2 import Duration

    from ebbflow.api.v1.fleet_pb2 import AdminRole, CreateAdminRequest
    from ebbflow.client.context import FILE_NAME, AdminContext, find_context, write_context
    from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr

    folder = out or Path(admin_id)
    if (folder / FILE_NAME).exists():
        raise EbbflowError(Reason.ALREADY_EXISTS, f"{folder} already holds a context", path=folder)
    key = generate_key()
    request = CreateAdminRequest(
        admin_id=admin_id,
        role=AdminRole.Value(f"ADMIN_ROLE_{role.name}"),
        csr_der=make_csr(key),
        lifetime=Duration(seconds=int(values.seconds(lifetime))),
    )
    with connect(context) as client:
        answer = client.fleet.CreateAdmin(request)
    address = AdminContext.load(find_context(context.find_root().params.get("context"))).address
    path = write_context(folder, address, answer.authority_pem, answer.certificate_pem, key_to_pem(key))
    say(f"admins/{admin_id} may act as {role.value}; the folder holds its private key. Its context:")
    print(path)
