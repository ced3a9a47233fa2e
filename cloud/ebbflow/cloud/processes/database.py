"""The registry's schema, from the command line."""

from ebbflow.cloud.processes.settings import CloudSettings
from ebbflow.cloud.registry import schema
from ebbflow.cloud.registry.engine import Registry, create_engine


def upgrade(settings: CloudSettings) -> str:
    """Brings the registry to this software's schema; returns its version.

    Raises:
        EbbflowError: CONFIG_INVALID, EXTRA_MISSING or DATABASE_UNAVAILABLE.
    """
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(settings.database_url)
    try:
        return schema.upgrade(engine)
    finally:
        engine.dispose()


def check(settings: CloudSettings) -> str:
    """Returns the schema's version if it is this software's.

    Raises:
        EbbflowError: SCHEMA_OUTDATED, SCHEMA_NEWER or DATABASE_UNAVAILABLE.
    """
    Registry.open(settings.database_url).close()
    return schema.newest()
