"""The agent's settings: a TOML file, and EBBFLOW_EDGE_* variables, which win over it."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ebbflow.common import names
from ebbflow.common.codes.artefact import Precision
from ebbflow.common.errors import EbbflowError, Reason
from ebbflow.edge.agent.state import StateFolder
from ebbflow.edge.delivery.limit import parse_rate
from ebbflow.edge.delivery.windows import Window, Windows, parse_windows, parse_zone
from ebbflow.edge.feedback.consent import Consent

Rate = Annotated[int, BeforeValidator(lambda value: parse_rate(str(value)))]
"""Bytes a second; written with a unit."""
_MOST_PORT = 65_535
DEFAULT_STATE = Path("/var/lib/ebbflow-edge")


class AgentSettings(BaseSettings):
    """What an operator can set."""

    model_config = SettingsConfigDict(env_prefix="EBBFLOW_EDGE_", extra="forbid", frozen=True)

    state: Path = Field(default=DEFAULT_STATE, description="Folder with everything that the agent keeps.")
    http_listen: str = Field(
        default="127.0.0.1:8080", description="host:port of the OpenAI-compatible API; port 0 for any."
    )
    grpc_listen: str = Field(default="127.0.0.1:8081", description="host:port of InferenceService; port 0 for any.")
    grpc_certificate: Path | None = Field(
        default=None,
        description="Certificate chain (PEM) for InferenceService; plain text without it.",
    )
    grpc_key: Path | None = Field(default=None, description="Private key (PEM) that goes with grpc_certificate.")
    api_key: SecretStr | None = Field(default=None, description="What HTTP clients must send as a bearer token.")
    memory_mib: int = Field(default=0, ge=0, description="Memory that a student may take; 0 for half of the device's.")
    cores: int = Field(default=0, ge=0, description="Cores to compute with; 0 means those that this process may use.")
    precisions: tuple[Precision, ...] = Field(
        default=("int8", "int4", "bf16"), min_length=1, description="Precisions in order of preference."
    )
    engine: Literal["auto", "torch"] = Field(default="auto", description="Engine to insist on.")
    swap: Literal["auto", "beside", "in_place"] = Field(
        default="auto",
        description="How a new release takes over: loaded beside the old one, or in its place once running requests are"
        ' answered; "auto" takes its place only where memory for both is short.',
    )
    context_tokens: int = Field(default=0, ge=0, description="Longest context; 0 means the student's own.")
    precision_pin: Literal["auto", "bf16", "int8", "int4"] = Field(
        default="auto",
        description='Precision to compute in, one of precisions, whatever the load; "auto" lets the governor choose.',
    )
    latency_goal_ms: int = Field(
        default=0,
        ge=0,
        description="Milliseconds within which 95 of 100 answers should begin; 0 sets no goal: then only requests that"
        " wait, heat, an empty battery or a lack of memory bring the precision down.",
    )
    governor_dwell_s: float = Field(
        default=30.0, ge=1.0, le=3600.0, description="Seconds that a precision stays at least before it changes again."
    )
    running: int = Field(default=8, ge=1, le=256, description="Requests that are answered at a time, for each student.")
    queued: int = Field(default=64, ge=1, le=10_000, description="Requests that may wait, for each student.")
    bandwidth_limit: Rate = Field(
        default=0, description='Most bytes of weights to fetch, such as "2MB/s" or "500kbit/s"; 0 means no limit.'
    )
    transfer_windows: tuple[str, ...] = Field(
        default=(),
        description='When to fetch weights, such as ["mon-fri 22:00-06:00", "sun 00:00-24:00"]; empty means always.',
    )
    time_zone: str = Field(default="UTC", description='Time zone of transfer_windows, such as "Europe/Berlin".')
    escalate: tuple[str, ...] = Field(
        default=(),
        description='Students whose hard questions teacher may answer if the user agrees, such as ["faq"].',
    )
    teacher: str = Field(default="", description="host:port of the cloud's teacher, for questions that are escalated.")
    escalate_below: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Answers are hard if less than this share of their least sure tokens can be expected to be right.",
    )
    escalate_most: int = Field(
        default=20, ge=1, le=10_000, description="Most questions that leave the device in escalate_window_s."
    )
    escalate_window_s: float = Field(default=3600.0, gt=0, description="Seconds in which escalate_most holds.")
    escalate_timeout_s: float = Field(
        default=10.0,
        gt=0,
        le=600,
        description="Seconds that the teacher has to answer; then the student's answer is it.",
    )
    retention_days: int = Field(default=30, ge=1, le=365, description="Days that interactions stay on the device.")
    epsilon: float = Field(default=4.0, gt=0, description="Most epsilon to spend for each user and window.")
    delta: float = Field(default=1e-6, gt=0, lt=1, description="Delta that goes with it.")
    window_days: int = Field(default=30, ge=1, description="Days of a window.")
    lifetime_epsilon: float = Field(
        default=0.0,
        ge=0,
        description="Most epsilon to spend for each user over all windows together; 0 sets no limit.",
    )
    consent: Consent = Field(
        default=Consent.ASSUMED,
        description='Whether users who have not said anything take part in feedback, "assumed", or not, "required".',
    )
    adapters: bool = Field(
        default=False,
        description="Whether rounds may ask for adapter updates; they need the extra edge-torch.",
    )
    grace_s: float = Field(default=20.0, ge=0, description="Seconds that running requests have to finish on SIGTERM.")
    log_format: Literal["console", "json"] = Field(default="console", description="How log lines look.")

    @property
    def folder(self) -> StateFolder:
        """The state folder with its parts."""
        return StateFolder(self.state)

    @property
    def windows(self) -> Windows:
        """When weights may be fetched."""
        return parse_windows(self.transfer_windows, self.time_zone)

    @field_validator("time_zone")
    @classmethod
    def _zone_is_known(cls, name: str) -> str:
        parse_zone(name)
        return name

    @field_validator("transfer_windows")
    @classmethod
    def _windows_are_windows(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            Window.parse(text)
        return texts

    @field_validator("escalate")
    @classmethod
    def _escalate_names_students(cls, student_ids: tuple[str, ...]) -> tuple[str, ...]:
        for student_id in student_ids:
            try:
                names.check_id(student_id, "escalate")
            except EbbflowError as error:
                raise ValueError("must hold ids of students") from error
        return student_ids

    @field_validator("teacher")
    @classmethod
    def _teacher_is_an_address(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if address and not (host and port.isdecimal() and 0 < int(port) <= _MOST_PORT):
            raise ValueError("must be host:port")
        return address

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over what the file says."""
        return env_settings, init_settings

    @classmethod
    def load(cls, config: Path | None, state: Path | None = None) -> Self:
        """Reads the settings.

        Args:
            config: a TOML file; None for the environment and the defaults alone.
            state: wins over every other word on the state folder.

        Raises:
            EbbflowError: CONFIG_INVALID naming the fields, never their values.
        """
        values = _read(config) if config else {}
        try:
            settings = cls(**values)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)]
            message = f"{config or 'the environment'}: {'; '.join(faults)}"
            raise EbbflowError(Reason.CONFIG_INVALID, message, path=config) from None
        if settings.precision_pin not in {"auto", *settings.precisions}:
            raise EbbflowError(Reason.CONFIG_INVALID, "precision_pin is not one of precisions", field="precision_pin")
        if settings.escalate and not settings.teacher:
            raise EbbflowError(Reason.CONFIG_INVALID, "escalate needs teacher, its host:port", field="teacher")
        if (settings.grpc_certificate is None) != (settings.grpc_key is None):
            raise EbbflowError(Reason.CONFIG_INVALID, "grpc_certificate and grpc_key go together", field="grpc_key")
        return settings.model_copy(update={"state": state}) if state else settings


def _read(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text())
    except OSError as error:
        message = f"{config} cannot be read: {error.strerror}"
        raise EbbflowError(Reason.CONFIG_INVALID, message, path=config) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EbbflowError(Reason.CONFIG_INVALID, f"{config} is no TOML: {error}", path=config) from error
