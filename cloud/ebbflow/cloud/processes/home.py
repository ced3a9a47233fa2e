"""The cloud's folder: where everything is that the embedded default keeps."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Home:
    """Paths inside one cloud folder. Nothing is made by looking."""

    path: Path

    @property
    def config(self) -> Path:
        """Settings, as TOML."""
        return self.path / "config.toml"

    @property
    def registry_url(self) -> str:
        """URL of the embedded registry."""
        return f"sqlite:///{self.path / 'registry.db'}"

    @property
    def blobs(self) -> Path:
        """The embedded blob store."""
        return self.path / "blobs"

    @property
    def authority(self) -> Path:
        """Key and certificate of the embedded certificate authority."""
        return self.path / "authority"

    @property
    def keys(self) -> Path:
        """Signing keys of The Update Framework, one PEM file for each."""
        return self.path / "keys"

    @property
    def trust_root(self) -> Path:
        """The root that worker and gate begin to trust with, written by `ebbflow cloud init`."""
        return self.path / "trust" / "root.json"

    def anchor(self, process: str) -> Path:
        """What worker or gate has verified last."""
        return self.path / "trust" / process

    @property
    def admin(self) -> Path:
        """The first owner's certificate and the context file of the admin CLI."""
        return self.path / "admin"

    @property
    def work(self) -> Path:
        """Checkpoints of running distillations."""
        return self.path / "work"

    @property
    def log(self) -> Path:
        """Logs of the embedded processes."""
        return self.path / "log"

    @property
    def endpoints(self) -> Path:
        """Addresses that the listeners are bound to, written when they are."""
        return self.path / "endpoints.toml"
