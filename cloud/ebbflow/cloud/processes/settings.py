"""Settings of the cloud's processes: `<home>/config.toml`, overridden by EBBFLOW_* in the environment."""

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from ebbflow.cloud.blobs.base import BlobStore
from ebbflow.cloud.blobs.local import LocalBlobStore
from ebbflow.cloud.processes.home import Home
from ebbflow.common.errors import EbbflowError, Reason

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


class CloudSettings(BaseSettings):
    """Everything that an operator can set. Frozen after start."""

    model_config = SettingsConfigDict(env_prefix="EBBFLOW_", frozen=True, extra="forbid")

    home: Path = Field(description="The cloud's folder.")
    registry_url: str = Field(
        default="", description="SQLAlchemy URL of the registry; empty means SQLite in the folder."
    )
    blobs: str = Field(
        default="",
        description="Folder of the blob store, or s3://bucket/prefix; empty means inside the cloud's folder.",
    )
    s3_endpoint: str = Field(default="", description="URL of an S3-compatible service; empty means Amazon's.")

    distiller_key: str = Field(
        default="",
        description="URI of the key that `cloud work` signs with (file2:, awskms:, gcpkms:, azurekms:, hsm:); empty"
        " means keys/distiller.pem in the folder.",
    )
    gate_key: str = Field(default="", description="The same for `cloud gate`; empty means keys/gate.pem.")
    online_key: str = Field(
        default="", description="The same for snapshot and timestamp, in `cloud serve`; empty means keys/online.pem."
    )
    feedback_key: str = Field(
        default="", description="The same for the plans of rounds, in `cloud serve`; empty means keys/feedback.pem."
    )
    key_secret: SecretStr = Field(
        default=SecretStr(""), description="Passphrase of this process's encrypted key files, or PIN of its HSM."
    )
    key_secret_file: str = Field(
        default="", description="File that holds `key_secret`, such as a mounted secret; used if that is empty."
    )

    listen: str = Field(default="127.0.0.1:8443", description="Address of the mutually authenticated listener.")
    enrol_listen: str = Field(default="127.0.0.1:8444", description="Address of the listener for enrolment.")
    advertise: str = Field(default="", description="host:port that agents are told; empty means the bound one.")
    hosts: list[str] = Field(
        default=["localhost", "127.0.0.1"], description="Names and addresses in the server certificate."
    )
    teacher: str = Field(default="", description="Folder or hub name of the teacher that `cloud teach` serves.")
    teacher_listen: str = Field(default="127.0.0.1:8445", description="Address of the teacher service.")
    teacher_tokens_per_minute: int = Field(default=200_000, ge=1, description="Quota of one caller of the teacher.")
    escalation_tokens_per_minute: int = Field(
        default=20_000, ge=1, description="Quota of one agent that escalates questions to the teacher."
    )
    escalation_tokens_per_minute_of_all: int = Field(
        default=200_000, ge=1, description="Quota of all agents together that escalate."
    )
    teacher_max_batch: int = Field(default=16, ge=1, description="Most sequences that the teacher computes at once.")

    heartbeat_interval_s: int = Field(default=30, ge=1, description="Seconds between an agent's heartbeats.")
    poll_interval_s: int = Field(default=300, ge=1, description="Seconds after which an agent looks without a hint.")
    hint_spread_ms: int = Field(default=2000, ge=0, description="Time over which hinted agents spread their answers.")
    tick_interval_s: float = Field(default=1.0, gt=0, description="Seconds between the reconciler's ticks.")
    agent_certificate_days: float = Field(default=7.0, gt=0, description="Lifetime of an agent's certificate.")
    server_certificate_days: float = Field(default=30.0, gt=0, description="Lifetime of the listeners' certificate.")

    lease_s: float = Field(default=60.0, gt=0, description="Seconds after which a silent worker's job is taken over.")
    checkpoint_interval_s: float = Field(
        default=60.0, gt=0, description="Seconds between a distillation's checkpoints."
    )
    private_texts_days: float = Field(
        default=1.0,
        ge=0,
        description="Days that private texts stay in the blob store after the last distillation on them has ended.",
    )
    threads: int = Field(default=0, ge=0, description="Threads of one torch process; 0 means as many as cores.")
    gate_max_regression: float = Field(
        default=0.25, ge=0, description="Share by which a release may be worse than its base in bits per byte."
    )
    gate_max_precision_loss: float = Field(
        default=0.25, ge=0, description="Share by which int8 and int4 may be worse than bf16 in bits per byte."
    )
    log_level: str = Field(default="info", description="debug, info, warning or error.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment before file; the file is the one in the home that the caller names."""
        home = Path(init_settings()["home"])
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, Home(home).config)

    @classmethod
    def load(cls, home: Path, **overrides: Any) -> "CloudSettings":
        """Reads the settings of a cloud folder.

        Raises:
            EbbflowError: CONFIG_INVALID with every problem in one message.
        """
        try:
            return cls(home=home.resolve(), **overrides)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            message = f"settings in {Home(home).config} or the environment are wrong: {problems}"
            raise EbbflowError(Reason.CONFIG_INVALID, message) from None
        except tomllib.TOMLDecodeError as error:
            raise EbbflowError(Reason.CONFIG_INVALID, f"{Home(home).config} is not TOML: {error}") from None

    @property
    def paths(self) -> Home:
        """The cloud's folder."""
        return Home(self.home)

    @property
    def database_url(self) -> str:
        """URL of the registry."""
        return self.registry_url or self.paths.registry_url

    def signer(self, name: str) -> "Signer":
        """Opens one of the keys "distiller", "gate", "online" and "feedback".

        Raises:
            EbbflowError: NOT_INITIALISED, KEY_UNUSABLE; CONFIG_INVALID if `key_secret_file` cannot be read.
        """
        from ebbflow.cloud.release import keys

        return keys.open_key(getattr(self, f"{name}_key"), self.paths.keys, name, self._secret())

    def _secret(self) -> str:
        if self.key_secret.get_secret_value() or not self.key_secret_file:
            return self.key_secret.get_secret_value()
        try:
            return Path(self.key_secret_file).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            message = f"key_secret_file {self.key_secret_file} cannot be read"
            raise EbbflowError(Reason.CONFIG_INVALID, message) from error

    def blob_store(self) -> BlobStore:
        """Opens the blob store.

        Raises:
            EbbflowError: CONFIG_INVALID, SERVER_UNAVAILABLE; EXTRA_MISSING if S3's client is not installed.
        """
        if not self.blobs.startswith("s3://"):
            return LocalBlobStore(Path(self.blobs) if self.blobs else self.paths.blobs)
        try:
            from ebbflow.cloud.blobs.s3 import S3BlobStore
        except ModuleNotFoundError as error:
            message = "a bucket needs the extra `s3`: pip install 'ebbflow[s3]'"
            raise EbbflowError(Reason.EXTRA_MISSING, message) from error
        bucket, _, prefix = self.blobs.removeprefix("s3://").partition("/")
        return S3BlobStore(bucket, f"{prefix.rstrip('/')}/" if prefix else "", self.s3_endpoint or None)
