"""What an agent keeps on its disk, and where."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.common.files import full_disk_named


@dataclass(frozen=True)
class StateFolder:
    """The folder of one agent. Everything in it is readable by its owner only."""

    path: Path

    @property
    def identity(self) -> Path:
        """Key, certificate, authority, names and times, and the pinned TUF root."""
        return self.path / "identity"

    @property
    def pending_identity(self) -> Path:
        """An enrolment under way."""
        return self.path / "identity.pending"

    @property
    def trust(self) -> Path:
        """Verified TUF metadata."""
        return self.path / "trust"

    @property
    def releases(self) -> Path:
        """The two slots of each student."""
        return self.path / "releases"

    @property
    def database(self) -> Path:
        """Interactions, privacy accounts and the outbox."""
        return self.path / "agent.db"

    @property
    def endpoints(self) -> Path:
        """Where a running agent listens."""
        return self.path / "endpoints.toml"

    @property
    def purged(self) -> Path:
        """Touched by every purge from the command line, for the agent that runs."""
        return self.path / "purged"

    def prepare(self) -> None:
        """Makes the folder.

        Raises:
            EbbflowError: CONFIG_INVALID if it cannot be made or written; DISK_FULL.
        """
        try:
            with full_disk_named(self.path):
                self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
                (self.path / "lock").touch(mode=0o600)
        except OSError as error:
            message = f"{self.path} cannot be written: {error.strerror}"
            raise EbbflowError(Reason.CONFIG_INVALID, message, field="state", path=self.path) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process; two agents on one identity would shut each other out.

        Raises:
            EbbflowError: AGENT_RUNNING if another process holds it.
        """
        self.prepare()
        with (self.path / "lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"another ebbflow-edge works in {self.path}"
                raise EbbflowError(Reason.AGENT_RUNNING, message, path=self.path) from error
            yield
