"""`ebbflow cloud init`: makes a cloud's folder with everything that `ebbflow cloud serve` needs."""

import sys

from ebbflow.client.context import FILE_NAME, AdminContext, write_context
from ebbflow.cloud.identity import admins
from ebbflow.cloud.identity.authority import Authority
from ebbflow.cloud.processes import database
from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import clock
from ebbflow.cloud.registry.engine import Registry
from ebbflow.cloud.release import keys, repository
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import write_atomic
from ebbflow.common.identity.keys import generate_key, key_to_pem, make_csr

OWNER = "owner"

SUMMARY = """\
Ebbflow's cloud is ready in {home}.

  start it            ebbflow cloud serve --home {home}
  speak with it       export EBBFLOW_CONTEXT={context}
  let a device in     ebbflow token create

{advice}

Also keep a copy of {authority} offline: without its key no device can renew its certificate.
"""


def run(settings: CloudSettings) -> None:
    """Makes the folder and tells what is in it."""
    sys.stdout.write(initialise(settings))


def initialise(settings: CloudSettings) -> str:
    """Makes registry, certificate authority, signing keys, trust metadata and the first owner.

    A run that was cut short is taken up where it stopped; nothing that exists is overwritten.

    Returns:
        What to do next, and which keys to move where before production.

    Raises:
        EbbflowError: ALREADY_EXISTS if the folder is ready already; what opening the database or writing files raises.
    """
    paths = settings.paths
    context = paths.admin / FILE_NAME
    if context.exists():
        message = f"{settings.home} is initialised already; remove it to begin anew"
        raise EbbflowError(Reason.ALREADY_EXISTS, message, home=settings.home)
    for folder in (settings.home, paths.log, paths.work):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _keep_hosts(settings)
    settings.blob_store()  # first, so that a store that is down leaves nothing half made
    database.upgrade(settings)
    authority = _authority(settings)
    if not (paths.keys / f"{keys.NAMES[0]}.pem").exists():
        keys.create(paths.keys)
    registry = Registry.open(settings.database_url)
    try:
        with registry.transaction() as session:
            repository.initialise(session, paths.keys, clock.now())
            database.pin_root(settings, repository.trust_root(session))
        _create_owner(registry, authority, settings)
    finally:
        registry.close()
    return SUMMARY.format(
        home=settings.home, context=context, advice=keys.advice(paths.keys), authority=paths.authority
    )


def renew_owner(settings: CloudSettings) -> str:
    """Gives the first owner a new key and certificate, after the old one has expired or was lost, and revokes the old.

    Returns:
        The new context's path.

    Raises:
        EbbflowError: NOT_INITIALISED, SCHEMA_OUTDATED, DATABASE_UNAVAILABLE.
    """
    authority = Authority.load(settings.paths.authority)
    registry = Registry.open(settings.database_url)
    try:
        _create_owner(registry, authority, settings)
    finally:
        registry.close()
    return str(settings.paths.admin / FILE_NAME)


def _authority(settings: CloudSettings) -> Authority:
    try:
        return Authority.load(settings.paths.authority)
    except EbbflowError as error:
        if error.reason is not Reason.NOT_INITIALISED:
            raise
        return Authority.create(settings.paths.authority)


def _create_owner(registry: Registry, authority: Authority, settings: CloudSettings) -> None:
    key = generate_key()
    context = settings.paths.admin / FILE_NAME
    address = AdminContext.load(context).address if context.exists() else settings.listen
    with registry.transaction() as session:
        issued = admins.create(session, authority, OWNER, "owner", make_csr(key), clock.now())
    write_context(settings.paths.admin, address, authority.certificate_pem, issued.certificate_pem, key_to_pem(key))


def _keep_hosts(settings: CloudSettings) -> None:
    """Writes the names that were given on the command line down, so that `serve` finds them."""
    if not settings.paths.config.exists() and settings.hosts != CloudSettings.model_fields["hosts"].default:
        names = ", ".join(f'"{host}"' for host in settings.hosts)
        write_atomic(settings.paths.config, f"hosts = [{names}]\n".encode(), 0o644)
