"""Every table of the registry, as typed SQLAlchemy models.

Rules that hold for all of them: times are aware UTC; enumerations are text with a CHECK; JSON columns hold the proto
JSON of the message that their comment names; weights are files in the blob store and appear here as SHA-256 only.
"""

import datetime as dt
import enum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

Json = dict[str, Any]


class UtcDateTime(sa.types.TypeDecorator[dt.datetime]):
    """An aware UTC time on every database; refuses naive ones."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        """Turns an aware time into UTC."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a naive datetime reached the registry")
        return value and value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, dialect: sa.Dialect) -> dt.datetime | None:
        """Gives SQLite's naive times their zone back."""
        return value if value is None or value.tzinfo else value.replace(tzinfo=dt.UTC)


def _enum(values: type[enum.StrEnum], name: str) -> sa.Enum:
    return sa.Enum(
        values,
        name=name,
        native_enum=False,
        create_constraint=True,
        length=32,
        values_callable=lambda members: [member.value for member in members],
    )


class Base(MappedAsDataclass, DeclarativeBase, kw_only=True):
    """The models' common base."""

    metadata = sa.MetaData(naming_convention=NAMING)
    type_annotation_map = {dt.datetime: UtcDateTime, Json: sa.JSON, bytes: sa.LargeBinary, int: sa.BigInteger}  # noqa: RUF012


class AgentState(enum.StrEnum):
    """Where an agent stands."""

    ACTIVE = "active"
    QUARANTINED = "quarantined"
    REVOKED = "revoked"


class DistillationState(enum.StrEnum):
    """Where a distillation stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ReleaseState(enum.StrEnum):
    """Where a release stands."""

    PACKED = "packed"
    PROPOSED = "proposed"
    PUBLISHED = "published"
    REJECTED = "rejected"
    REVOKED = "revoked"
    RETIRED = "retired"


class RolloutState(enum.StrEnum):
    """Where a rollout stands."""

    WAITING_FOR_APPROVAL = "waiting_for_approval"
    RUNNING = "running"
    PAUSED = "paused"
    HALTED = "halted"
    SUCCEEDED = "succeeded"
    ABORTED = "aborted"
    SUPERSEDED = "superseded"


class DeviceState(enum.StrEnum):
    """Where one device of a rollout stands."""

    WAITING = "waiting"
    ASSIGNED = "assigned"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class OnHalt(enum.StrEnum):
    """What happens to the devices of a rollout when it halts."""

    HOLD = "hold"
    ROLL_BACK = "roll_back"


class RoundState(enum.StrEnum):
    """Where a round stands."""

    OPEN = "open"
    CLOSED = "closed"


class PopulationState(enum.StrEnum):
    """Where a generation of a population stands."""

    QUEUED = "queued"
    RUNNING = "running"
    READY = "ready"
    FAILED = "failed"


class Student(Base):
    """A named line of small models."""

    __tablename__ = "students"
    id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    teacher: Mapped[str] = mapped_column(sa.String(1024))
    architecture: Mapped[Json]
    """Architecture."""
    corpus_sha256: Mapped[str] = mapped_column(sa.String(64))
    topics: Mapped[list[str]] = mapped_column(sa.JSON)
    """Topics of the corpus, in the order of their bins."""
    privacy_policy: Mapped[Json]
    """PrivacyPolicy, as its newest version says."""
    selector: Mapped[str] = mapped_column(sa.String(1024))
    create_time: Mapped[dt.datetime]
    rollout_policy: Mapped[Json] = mapped_column(default_factory=dict)
    """RolloutPolicy."""
    min_release: Mapped[int] = mapped_column(default=0)
    """Lowest release that an owner asked the signers to allow; 0 if nobody did."""
    escalation_policy: Mapped[Json] = mapped_column(default_factory=dict)
    """EscalationPolicy."""


class Distillation(Base):
    """One run that makes one release; also the work queue of the workers."""

    __tablename__ = "distillations"
    __table_args__ = (
        sa.Index(None, "state", "leased_until"),
        sa.Index(None, "student_id", "create_time"),
        sa.Index(None, "private_corpus_sha256"),
    )
    id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"))
    state: Mapped[DistillationState] = mapped_column(_enum(DistillationState, "state"))
    recipe: Mapped[Json]
    """Recipe."""
    mixture: Mapped[dict[str, float]] = mapped_column(sa.JSON)
    """Share of training texts by topic, resolved when queued; empty leaves the corpus' own proportions."""
    base_release: Mapped[int | None]
    """Number of the release to begin from."""
    round_id: Mapped[str | None] = mapped_column(sa.String(63))
    create_time: Mapped[dt.datetime]
    update_time: Mapped[dt.datetime]
    feedback_epsilon: Mapped[float] = mapped_column(default=0.0)
    """Epsilon of the round that gave the mixture, per user and window."""
    step: Mapped[int] = mapped_column(default=0)
    loss: Mapped[float] = mapped_column(default=0.0)
    tokens_per_second: Mapped[float] = mapped_column(default=0.0)
    eta_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    leased_by: Mapped[str | None] = mapped_column(sa.String(128), default=None)
    leased_until: Mapped[dt.datetime | None] = mapped_column(default=None)
    attempt: Mapped[int] = mapped_column(default=0)
    """Counts claims; fences what a worker may write."""
    release_number: Mapped[int | None] = mapped_column(default=None)
    error: Mapped[str] = mapped_column(sa.Text, default="")
    population: Mapped[int] = mapped_column(default=0)
    """Generation of the student's population whose prompts join the training texts; 0 for none."""
    population_share: Mapped[float] = mapped_column(default=0.0)
    adapter_round_id: Mapped[str | None] = mapped_column(sa.String(63), default=None)
    """Closed round whose average adapter is added to the base release's weights first."""
    private_corpus_sha256: Mapped[str] = mapped_column(sa.String(64), default="")
    """Private texts to train on last, by DP-SGD; empty for none."""
    private_training: Mapped[Json] = mapped_column(default_factory=dict)
    """PrivateTraining."""
    private_corpus_delete_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    """When the private texts were deleted. Their hash stays, to tell what training on them again adds up to."""


class Release(Base):
    """An immutable numbered result of a distillation."""

    __tablename__ = "releases"
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    distillation_id: Mapped[str] = mapped_column(sa.ForeignKey("distillations.id"), unique=True)
    state: Mapped[ReleaseState] = mapped_column(_enum(ReleaseState, "state"))
    targets: Mapped[Json]
    """File of the release by target path: {"sha256": hex, "size_bytes": int, "kind": "manifest" | "tokenizer" | a
    precision}."""
    create_time: Mapped[dt.datetime]
    card: Mapped[Json] = mapped_column(default_factory=dict)
    """EvaluationCard."""
    reason: Mapped[str] = mapped_column(sa.String(1024), default="")
    revoke_time: Mapped[dt.datetime | None] = mapped_column(default=None)


class TrustMetadata(Base):
    """One version of one TUF role. `timestamp` keeps only its newest."""

    __tablename__ = "trust_metadata"
    role: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[bytes]
    published: Mapped[bool]
    """False while a signature is missing."""
    create_time: Mapped[dt.datetime]


class Agent(Base):
    """A registered device."""

    __tablename__ = "agents"
    id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    state: Mapped[AgentState] = mapped_column(_enum(AgentState, "state"))
    labels: Mapped[dict[str, str]] = mapped_column(sa.JSON)
    profile: Mapped[Json]
    """DeviceProfile."""
    create_time: Mapped[dt.datetime]
    reason: Mapped[str] = mapped_column(sa.String(1024), default="")
    instance_id: Mapped[str | None] = mapped_column(sa.String(63), default=None)
    """Process that holds the live line; another one that beats is a copy."""
    last_seen_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    connected: Mapped[bool] = mapped_column(default=False)
    telemetry: Mapped[Json] = mapped_column(default_factory=dict)
    """Telemetry, as last heard."""
    new_device: Mapped[bool] = mapped_column(default=False)
    """The operator's word that nobody used the device under another identity: its users need not wait a window."""


class Certificate(Base):
    """A certificate that the embedded authority has signed."""

    __tablename__ = "certificates"
    __table_args__ = (sa.Index(None, "subject"),)
    serial: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    """Hexadecimal."""
    subject: Mapped[str] = mapped_column(sa.String(128))
    """Resource name such as "agents/kiosk-7" or "admins/ada"."""
    role: Mapped[str] = mapped_column(sa.String(16))
    """"agent", "viewer", "operator", "owner" or "server"."""
    public_key_sha256: Mapped[str] = mapped_column(sa.String(64))
    expire_time: Mapped[dt.datetime]
    create_time: Mapped[dt.datetime]
    revoke_time: Mapped[dt.datetime | None] = mapped_column(default=None)


class EnrolmentToken(Base):
    """What lets devices in. The secret itself is never kept."""

    __tablename__ = "enrolment_tokens"
    id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    secret_sha256: Mapped[str] = mapped_column(sa.String(64))
    labels: Mapped[dict[str, str]] = mapped_column(sa.JSON)
    uses_left: Mapped[int]
    expire_time: Mapped[dt.datetime]
    create_time: Mapped[dt.datetime]
    revoke_time: Mapped[dt.datetime | None] = mapped_column(default=None)


class Assignment(Base):
    """What one agent should serve of one student, and what it last said of it."""

    __tablename__ = "assignments"
    __table_args__ = (sa.Index(None, "student_id"),)
    agent_id: Mapped[str] = mapped_column(sa.ForeignKey("agents.id"), primary_key=True)
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"), primary_key=True)
    desired_number: Mapped[int | None] = mapped_column(default=None)
    """Release to serve; none until a rollout reaches the agent."""
    rollout_id: Mapped[str | None] = mapped_column(sa.String(63), default=None)
    serving_number: Mapped[int | None] = mapped_column(default=None)
    """Release that the agent says it serves."""
    installation: Mapped[Json] = mapped_column(default_factory=dict)
    """Installation, as last reported."""
    update_time: Mapped[dt.datetime | None] = mapped_column(default=None)


class Pin(Base):
    """Holds one agent on one release of a student, whatever rollouts do."""

    __tablename__ = "pins"
    __table_args__ = (
        sa.ForeignKeyConstraint(["student_id", "release_number"], ["releases.student_id", "releases.number"]),
    )
    agent_id: Mapped[str] = mapped_column(sa.ForeignKey("agents.id"), primary_key=True)
    student_id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    release_number: Mapped[int]
    reason: Mapped[str] = mapped_column(sa.String(1024))
    create_time: Mapped[dt.datetime]


class Delta(Base):
    """The difference between two files of weights: a saving that can be built again at any time."""

    __tablename__ = "deltas"
    base_sha256: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    target_sha256: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    format: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    blob_sha256: Mapped[str | None] = mapped_column(sa.String(64))
    """None if the full file is as short."""
    size_bytes: Mapped[int]
    statistics: Mapped[Json]
    """What changed, by tensor."""
    create_time: Mapped[dt.datetime]


class Rollout(Base):
    """The staged assignment of one release."""

    __tablename__ = "rollouts"
    __table_args__ = (
        sa.ForeignKeyConstraint(["student_id", "release_number"], ["releases.student_id", "releases.number"]),
        sa.Index(None, "state"),
        sa.Index(None, "due_time"),
    )
    id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    student_id: Mapped[str] = mapped_column(sa.String(63))
    release_number: Mapped[int]
    state: Mapped[RolloutState] = mapped_column(_enum(RolloutState, "state"))
    phases: Mapped[list[Json]] = mapped_column(sa.JSON)
    """Phases, in order."""
    create_time: Mapped[dt.datetime]
    update_time: Mapped[dt.datetime]
    phase_index: Mapped[int] = mapped_column(default=0)
    phase_passed_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    """When the current phase met its success share; its soak time runs from here."""
    phase_begin_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    """When the current phase began; none while it waits for approval."""
    rolls_back: Mapped[bool] = mapped_column(default=False)
    """Whether it takes every device away from a release: none is ever sent back to what it had."""
    ordinal: Mapped[int] = mapped_column(default=0)
    """How many rollouts of the student had begun when this one did, itself included; 0 before."""
    due_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    """When the reconciler is to look again; none if another rollout of the student has taken over."""
    reason: Mapped[str] = mapped_column(sa.String(1024), default="")
    windows: Mapped[list[Json]] = mapped_column(sa.JSON, default_factory=list)
    """MaintenanceWindows."""
    spread_s: Mapped[float] = mapped_column(default=0.0)
    on_halt: Mapped[OnHalt] = mapped_column(_enum(OnHalt, "on_halt"), default=OnHalt.HOLD)
    creator: Mapped[str] = mapped_column(sa.String(128), default="")
    """Resource name, such as "admins/ada"."""
    approver: Mapped[str] = mapped_column(sa.String(128), default="")


class RolloutDevice(Base):
    """One device of a rollout."""

    __tablename__ = "rollout_devices"
    __table_args__ = (sa.Index(None, "rollout_id", "state"),)
    rollout_id: Mapped[str] = mapped_column(sa.ForeignKey("rollouts.id"), primary_key=True)
    agent_id: Mapped[str] = mapped_column(sa.ForeignKey("agents.id"), primary_key=True)
    phase: Mapped[int]
    state: Mapped[DeviceState] = mapped_column(_enum(DeviceState, "state"))
    previous_number: Mapped[int | None]
    """Release to go back to when the rollout is aborted."""
    assign_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    answer_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    reason: Mapped[str] = mapped_column(sa.String(255), default="")
    not_before_time: Mapped[dt.datetime | None] = mapped_column(default=None)
    """When its turn within the spread of its phase comes."""
    probe_loss: Mapped[float | None] = mapped_column(default=None)
    """What it measured, in nats per token."""
    probe_rise: Mapped[float | None] = mapped_column(default=None)
    """The same above the loss that its precision was published with."""
    fetched_bytes: Mapped[int] = mapped_column(default=0)
    full_bytes: Mapped[int] = mapped_column(default=0)
    """What the full files of its variant would have been; 0 until it has answered."""


class PolicyVersion(Base):
    """One version of a student's privacy policy, as it was signed. Append only."""

    __tablename__ = "policy_versions"
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    document: Mapped[bytes]
    """Serialised PolicyDocument, as signed."""
    signature: Mapped[bytes]
    key_id: Mapped[str] = mapped_column(sa.String(64))
    create_time: Mapped[dt.datetime]


class Population(Base):
    """One generation of a student's prompts; also the work queue of the workers that make them."""

    __tablename__ = "populations"
    __table_args__ = (sa.Index(None, "state", "leased_until"),)
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"), primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[PopulationState] = mapped_column(_enum(PopulationState, "state"))
    settings: Mapped[Json]
    """EvolvePopulationRequest without its request_id."""
    round_id: Mapped[str | None] = mapped_column(sa.String(63))
    """Round whose votes choose the parents; none in a generation from public texts."""
    create_time: Mapped[dt.datetime]
    prompts: Mapped[list[Json]] = mapped_column(sa.JSON, default_factory=list)
    """Prompt, each; public or synthetic texts."""
    method: Mapped[str] = mapped_column(sa.String(32), default="")
    reason: Mapped[str] = mapped_column(sa.Text, default="")
    parents: Mapped[Json] = mapped_column(default_factory=dict)
    """Quality of the generation before; empty in the first."""
    leased_by: Mapped[str | None] = mapped_column(sa.String(128), default=None)
    leased_until: Mapped[dt.datetime | None] = mapped_column(default=None)
    attempt: Mapped[int] = mapped_column(default=0)
    """Counts claims; fences what a worker may write."""


class Round(Base):
    """One collection of feedback."""

    __tablename__ = "rounds"
    __table_args__ = (sa.Index(None, "student_id", "state"),)
    id: Mapped[str] = mapped_column(sa.String(63), primary_key=True)
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"))
    state: Mapped[RoundState] = mapped_column(_enum(RoundState, "state"))
    plan: Mapped[bytes]
    """Serialised RoundPlan, as signed."""
    signature: Mapped[bytes]
    key_id: Mapped[str] = mapped_column(sa.String(64))
    window: Mapped[str] = mapped_column(sa.String(16))
    end_time: Mapped[dt.datetime]
    create_time: Mapped[dt.datetime]
    aggregate: Mapped[Json] = mapped_column(default_factory=dict)
    """Aggregate; empty until closed."""


class RoundMember(Base):
    """One agent of a round's cohort, frozen when the round opened."""

    __tablename__ = "round_members"
    round_id: Mapped[str] = mapped_column(sa.ForeignKey("rounds.id"), primary_key=True)
    agent_id: Mapped[str] = mapped_column(sa.ForeignKey("agents.id"), primary_key=True)


class FeedbackBatch(Base):
    """One privatised report that was kept."""

    __tablename__ = "feedback_batches"
    __table_args__ = (sa.UniqueConstraint("round_id", "agent_id"),)
    id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    round_id: Mapped[str] = mapped_column(sa.ForeignKey("rounds.id"))
    agent_id: Mapped[str] = mapped_column(sa.ForeignKey("agents.id"))
    batch_sha256: Mapped[str] = mapped_column(sa.String(64))
    noisy: Mapped[list[int]] = mapped_column(sa.JSON)
    """The values; of an adapter update the null bins alone, and everything after the retention of its policy: empty."""
    signature: Mapped[bytes]
    create_time: Mapped[dt.datetime]
    payload_sha256: Mapped[str] = mapped_column(sa.String(64), default="")
    """Blob with the values of an adapter update; empty for votes."""
    base_release: Mapped[int] = mapped_column(default=0)
    """Release that an adapter update belongs to; 0 for votes, and for an update of noise alone."""


class FeedbackRefusal(Base):
    """A batch that was refused. Its payload is not kept: an under-noised batch is raw user data."""

    __tablename__ = "feedback_refusals"
    __table_args__ = (sa.Index(None, "round_id"), sa.Index(None, "agent_id"))
    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True, init=False
    )
    round_id: Mapped[str] = mapped_column(sa.String(63))
    agent_id: Mapped[str] = mapped_column(sa.String(63))
    reason: Mapped[str] = mapped_column(sa.String(64))
    create_time: Mapped[dt.datetime]


class PrivacyAccount(Base):
    """The mirror of one agent's account for one student and window."""

    __tablename__ = "privacy_accounts"
    __table_args__ = (sa.CheckConstraint("rho_spent_nano >= 0 AND rho_spent_nano <= rho_cap_nano", name="within_cap"),)
    agent_id: Mapped[str] = mapped_column(sa.ForeignKey("agents.id"), primary_key=True)
    student_id: Mapped[str] = mapped_column(sa.ForeignKey("students.id"), primary_key=True)
    window: Mapped[str] = mapped_column(sa.String(16), primary_key=True)
    rho_cap_nano: Mapped[int]
    rho_spent_nano: Mapped[int]
    delta: Mapped[float]


class PrivacyEntry(Base):
    """One charge. Append only."""

    __tablename__ = "privacy_entries"
    __table_args__ = (
        sa.ForeignKeyConstraint(
            ["agent_id", "student_id", "window"],
            ["privacy_accounts.agent_id", "privacy_accounts.student_id", "privacy_accounts.window"],
        ),
        sa.UniqueConstraint("agent_id", "round_id"),
    )
    batch_id: Mapped[str] = mapped_column(sa.String(36), primary_key=True)
    agent_id: Mapped[str] = mapped_column(sa.String(63))
    student_id: Mapped[str] = mapped_column(sa.String(63))
    window: Mapped[str] = mapped_column(sa.String(16))
    round_id: Mapped[str] = mapped_column(sa.String(63))
    rho_nano: Mapped[int]
    create_time: Mapped[dt.datetime]


class AuditEntry(Base):
    """One thing that somebody did or tried to do. Append only."""

    __tablename__ = "audit_entries"
    __table_args__ = (sa.Index(None, "actor", "id"),)
    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True, init=False
    )
    create_time: Mapped[dt.datetime]
    actor: Mapped[str] = mapped_column(sa.String(128))
    method: Mapped[str] = mapped_column(sa.String(128))
    resource: Mapped[str] = mapped_column(sa.String(256))
    code: Mapped[str] = mapped_column(sa.String(32))
    request_id: Mapped[str] = mapped_column(sa.String(64), default="")


class SavedAnswer(Base):
    """The first answer to a request with a request_id, for retries (AIP-155)."""

    __tablename__ = "saved_answers"
    actor: Mapped[str] = mapped_column(sa.String(128), primary_key=True)
    request_id: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(sa.String(64))
    answer: Mapped[bytes]
    create_time: Mapped[dt.datetime]


class Change(Base):
    """A counter per subject that moves when agents should look again; every replica watches it."""

    __tablename__ = "changes"
    subject: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    """"desired_state" or "plan"."""
    revision: Mapped[int]
