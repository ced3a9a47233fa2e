"""Private feedback: signed policies, populations, adapter updates, private training."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_STATES = ("queued", "running", "ready", "failed")


def _add(table: str, *columns: tuple[str, "sa.types.TypeEngine[Any]", str]) -> None:
    """Adds columns that may not be null; rows that exist get a value, later ones must bring their own."""
    with op.batch_alter_table(table, schema=None) as batch_op:
        for name, kind, value in columns:
            batch_op.add_column(sa.Column(name, kind, nullable=False, server_default=sa.text(value)))
    with op.batch_alter_table(table, schema=None) as batch_op:
        for name, _, _ in columns:
            batch_op.alter_column(name, server_default=None)


def upgrade() -> None:
    """Adds tables and columns; agents that exist have reported before and need not wait a window."""
    op.create_table(
        "policy_versions",
        sa.Column("student_id", sa.String(length=63), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.LargeBinary(), nullable=False),
        sa.Column("signature", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["student_id"], ["students.id"], name=op.f("fk_policy_versions_student_id_students")),
        sa.PrimaryKeyConstraint("student_id", "version", name=op.f("pk_policy_versions")),
    )
    op.create_table(
        "populations",
        sa.Column("student_id", sa.String(length=63), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column(
            "state",
            sa.Enum(*_STATES, name="state", native_enum=False, create_constraint=True, length=32),
            nullable=False,
        ),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("round_id", sa.String(length=63), nullable=True),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("prompts", sa.JSON(), nullable=False),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("parents", sa.JSON(), nullable=False),
        sa.Column("leased_by", sa.String(length=128), nullable=True),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempt", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["student_id"], ["students.id"], name=op.f("fk_populations_student_id_students")),
        sa.PrimaryKeyConstraint("student_id", "generation", name=op.f("pk_populations")),
    )
    with op.batch_alter_table("populations", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_populations_state_leased_until"), ["state", "leased_until"], unique=False)
    _add("agents", ("new_device", sa.Boolean(), "true"))
    with op.batch_alter_table("distillations", schema=None) as batch_op:
        batch_op.add_column(sa.Column("adapter_round_id", sa.String(length=63), nullable=True))
    _add(
        "distillations",
        ("population", sa.BigInteger(), "0"),
        ("population_share", sa.Double(), "0"),
        ("private_corpus_sha256", sa.String(length=64), "''"),
        ("private_training", sa.JSON(), "'{}'"),
    )
    with op.batch_alter_table("feedback_refusals", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_feedback_refusals_agent_id"), ["agent_id"], unique=False)
    _add("feedback_batches", ("payload_sha256", sa.String(length=64), "''"), ("base_release", sa.BigInteger(), "0"))


def downgrade() -> None:
    """Drops what `upgrade` added."""
    with op.batch_alter_table("feedback_batches", schema=None) as batch_op:
        batch_op.drop_column("base_release")
        batch_op.drop_column("payload_sha256")
    with op.batch_alter_table("feedback_refusals", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_feedback_refusals_agent_id"))
    with op.batch_alter_table("distillations", schema=None) as batch_op:
        batch_op.drop_column("private_training")
        batch_op.drop_column("private_corpus_sha256")
        batch_op.drop_column("adapter_round_id")
        batch_op.drop_column("population_share")
        batch_op.drop_column("population")
    with op.batch_alter_table("agents", schema=None) as batch_op:
        batch_op.drop_column("new_device")
    with op.batch_alter_table("populations", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_populations_state_leased_until"))
    op.drop_table("populations")
    op.drop_table("policy_versions")
