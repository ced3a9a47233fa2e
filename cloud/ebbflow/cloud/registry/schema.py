"""The version of the tables: checks it, and brings it up to date with the migrations in this package."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from ebbflow.common.errors import EbbflowError, Reason

MIGRATIONS = Path(__file__).parent / "migrations"
UPGRADING = 0x0EBBF10
"""The advisory lock of whoever upgrades."""


def config(connection: sa.Connection | None = None) -> Config:
    """Alembic's configuration, with the connection that the migrations are to use."""
    settings = Config()
    settings.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    settings.attributes["connection"] = connection
    return settings


def newest() -> str:
    """The version that this software needs."""
    head = ScriptDirectory.from_config(config()).get_current_head()
    if head is None:
        raise EbbflowError(Reason.FILE_CORRUPT, f"no migrations in {MIGRATIONS}: install Ebbflow again")
    return head


def current(connection: sa.Connection) -> str | None:
    """The version that the database has; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def check(connection: sa.Connection) -> None:
    """Returns if the database has the version that this software needs.

    Raises:
        EbbflowError: SCHEMA_OUTDATED or SCHEMA_NEWER.
    """
    have, need = current(connection), newest()
    if have == need:
        return
    known = {script.revision for script in ScriptDirectory.from_config(config()).walk_revisions()}
    if have is None or have in known:
        message = f"the registry's schema is {have or 'empty'}, this version needs {need}"
        raise EbbflowError(Reason.SCHEMA_OUTDATED, message, have=have, need=need)
    message = f"the registry's schema is {have}, which this version does not know"
    raise EbbflowError(Reason.SCHEMA_NEWER, message, have=have, need=need)


def upgrade(engine: sa.Engine) -> str:
    """Brings the database to the newest version, once even if two replicas try at the same time.

    Returns:
        The version that it has now.
    """
    from ebbflow.cloud.registry.engine import _named_failures

    with _named_failures(engine), engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            # Somebody watches, and a large table may take its time: the limits of serving are not for this.
            for limit in ("lock_timeout", "idle_in_transaction_session_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = 0")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(UPGRADING)))
        command.upgrade(config(connection), "head")
    return newest()
