"""Private texts are deleted, and the registry says when."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds the time; nothing was deleted before."""
    with op.batch_alter_table("distillations", schema=None) as batch_op:
        batch_op.add_column(sa.Column("private_corpus_delete_time", sa.DateTime(timezone=True), nullable=True))
        batch_op.create_index(
            batch_op.f("ix_distillations_private_corpus_sha256"), ["private_corpus_sha256"], unique=False
        )


def downgrade() -> None:
    """Drops what `upgrade` added."""
    with op.batch_alter_table("distillations", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_distillations_private_corpus_sha256"))
        batch_op.drop_column("private_corpus_delete_time")
