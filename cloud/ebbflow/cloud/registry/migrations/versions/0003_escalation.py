"""Escalation: whether agents of a student may ask the teacher."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the policy; students that exist forbid it."""
    with op.batch_alter_table("students", schema=None) as batch_op:
        batch_op.add_column(sa.Column("escalation_policy", sa.JSON(), nullable=False, server_default="{}"))
    with op.batch_alter_table("students", schema=None) as batch_op:
        batch_op.alter_column("escalation_policy", server_default=None)


def downgrade() -> None:
    """Drops what `upgrade` added."""
    with op.batch_alter_table("students", schema=None) as batch_op:
        batch_op.drop_column("escalation_policy")
