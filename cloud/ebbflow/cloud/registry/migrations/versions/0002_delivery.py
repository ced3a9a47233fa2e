"""Delivery: deltas, pins, approvals, windows, revoked releases."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_RELEASES = ["packed", "proposed", "published", "rejected"]
_ROLLOUTS = ["running", "paused", "halted", "succeeded", "aborted", "superseded"]


def upgrade() -> None:
    """Adds tables and columns; rows that exist get the defaults of tables.py."""
    op.create_table(
        "deltas",
        sa.Column("base_sha256", sa.String(length=64), nullable=False),
        sa.Column("target_sha256", sa.String(length=64), nullable=False),
        sa.Column("format", sa.String(length=32), nullable=False),
        sa.Column("blob_sha256", sa.String(length=64), nullable=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("statistics", sa.JSON(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("base_sha256", "target_sha256", "format", name=op.f("pk_deltas")),
    )
    op.create_table(
        "pins",
        sa.Column("agent_id", sa.String(length=63), nullable=False),
        sa.Column("student_id", sa.String(length=63), nullable=False),
        sa.Column("release_number", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=1024), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_pins_agent_id_agents")),
        sa.ForeignKeyConstraint(
            ["student_id", "release_number"],
            ["releases.student_id", "releases.number"],
            name=op.f("fk_pins_student_id_release_number_releases"),
        ),
        sa.PrimaryKeyConstraint("agent_id", "student_id", name=op.f("pk_pins")),
    )
    with op.batch_alter_table("releases", schema=None) as batch_op:
        batch_op.add_column(sa.Column("revoke_time", sa.DateTime(timezone=True), nullable=True))
    _states("releases", [*_RELEASES, "revoked", "retired"])
    _add(
        "rollout_devices",
        sa.Column("not_before_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("probe_loss", sa.Double(), nullable=True),
        sa.Column("probe_rise", sa.Double(), nullable=True),
        sa.Column("fetched_bytes", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("full_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    )
    _add(
        "rollouts",
        sa.Column("windows", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("spread_s", sa.Double(), nullable=False, server_default="0"),
        sa.Column("on_halt", sa.String(length=32), nullable=False, server_default="hold"),
        sa.Column("creator", sa.String(length=128), nullable=False, server_default=""),
        sa.Column("approver", sa.String(length=128), nullable=False, server_default=""),
        sa.Column("phase_begin_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rolls_back", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("ordinal", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("due_time", sa.DateTime(timezone=True), nullable=True),
    )
    op.execute(
        "UPDATE rollouts SET phase_begin_time = create_time, due_time = create_time, ordinal = (SELECT count(*)"
        " FROM rollouts AS other WHERE other.student_id = rollouts.student_id AND (other.create_time <"
        " rollouts.create_time OR (other.create_time = rollouts.create_time AND other.id <= rollouts.id)))"
    )
    with op.batch_alter_table("rollouts", schema=None) as batch_op:
        batch_op.create_check_constraint("on_halt", "on_halt IN ('hold', 'roll_back')")
        batch_op.create_index(batch_op.f("ix_rollouts_due_time"), ["due_time"], unique=False)
    _states("rollouts", ["waiting_for_approval", *_ROLLOUTS])
    _add(
        "students",
        sa.Column("rollout_policy", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("min_release", sa.BigInteger(), nullable=False, server_default="0"),
    )


def downgrade() -> None:
    """Drops what `upgrade` added."""
    with op.batch_alter_table("students", schema=None) as batch_op:
        batch_op.drop_column("min_release")
        batch_op.drop_column("rollout_policy")
    op.execute("UPDATE rollouts SET state = 'aborted' WHERE state = 'waiting_for_approval'")
    _states("rollouts", _ROLLOUTS)
    with op.batch_alter_table("rollouts", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_rollouts_due_time"))
        batch_op.drop_constraint(op.f("ck_rollouts_on_halt"), type_="check")
        for column in ("approver", "creator", "on_halt", "spread_s", "windows"):
            batch_op.drop_column(column)
        for column in ("due_time", "ordinal", "rolls_back", "phase_begin_time"):
            batch_op.drop_column(column)
    with op.batch_alter_table("rollout_devices", schema=None) as batch_op:
        for column in ("full_bytes", "fetched_bytes", "probe_rise", "probe_loss", "not_before_time"):
            batch_op.drop_column(column)
    op.execute("UPDATE releases SET state = 'rejected' WHERE state IN ('revoked', 'retired')")
    _states("releases", _RELEASES)
    with op.batch_alter_table("releases", schema=None) as batch_op:
        batch_op.drop_column("revoke_time")
    op.drop_table("pins")
    op.drop_table("deltas")


def _add(table: str, *columns: sa.Column[Any]) -> None:
    """Adds columns; a default that rows need once does not stay in the schema."""
    with op.batch_alter_table(table, schema=None) as batch_op:
        for column in columns:
            batch_op.add_column(column)
    with op.batch_alter_table(table, schema=None) as batch_op:
        for column in columns:
            if column.server_default is not None:
                batch_op.alter_column(column.name, server_default=None)


def _states(table: str, allowed: list[str]) -> None:
    """Replaces the CHECK of a table's column `state`."""
    listed = ", ".join(f"'{state}'" for state in allowed)
    with op.batch_alter_table(table, schema=None) as batch_op:
        batch_op.drop_constraint(op.f(f"ck_{table}_state"), type_="check")
        batch_op.create_check_constraint("state", f"state IN ({listed})")
