"""Write a migration for what changed in tables.py. Run as `make migration NAME="add x"`; read the result before use."""

import sys
import tempfile
from pathlib import Path

from alembic import command

from ebbflow.cloud.registry import schema
from ebbflow.cloud.registry.engine import create_engine


def main(message: str) -> None:
    """Compares the tables with a database made by the migrations so far."""
    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine(f"sqlite:///{Path(folder) / 'registry.db'}")
        with engine.begin() as connection:
            settings = schema.config(connection)
            command.upgrade(settings, "head")
        with engine.begin() as connection:
            number = len(list((schema.MIGRATIONS / "versions").glob("*.py"))) + 1
            settings = schema.config(connection)
            settings.set_main_option("file_template", "%%(rev)s_%%(slug)s")
            command.revision(settings, message, autogenerate=True, rev_id=f"{number:04d}")


if __name__ == "__main__":
    main(sys.argv[1])
