"""The registry's schema, from the command line."""

from sqlalchemy.orm import Session

from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import schema
from ebbflow.cloud.registry.engine import Registry, create_engine
from ebbflow.cloud.registry.tables import TrustMetadata
from ebbflow.common.files import write_atomic
from ebbflow.common.trust import roles


def upgrade(settings: CloudSettings) -> str:
    """Brings the registry to this software's schema; returns its version.

    Raises:
        EbbflowError: CONFIG_INVALID, EXTRA_MISSING or DATABASE_UNAVAILABLE.
    """
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(settings.database_url)
    try:
        version = schema.upgrade(engine)
        with Session(engine) as session:
            if first := session.get(TrustMetadata, (roles.ROOT, 1)):
                pin_root(settings, first.content)
        return version
    finally:
        engine.dispose()


def pin_root(settings: CloudSettings, root: bytes) -> None:
    """Writes down the root that worker and gate begin with, unless there is one; homes of before that lack it."""
    path = settings.paths.trust_root
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, root, 0o644)


def check(settings: CloudSettings) -> str:
    """Returns the schema's version if it is this software's.

    Raises:
        EbbflowError: SCHEMA_OUTDATED, SCHEMA_NEWER or DATABASE_UNAVAILABLE.
    """
    Registry.open(settings.database_url).close()
    return schema.newest()
