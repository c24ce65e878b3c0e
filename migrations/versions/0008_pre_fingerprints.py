"""Remember what decided a step's outputs, and whose they were, so that an equal step need not be computed again.

Revises: 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Two columns and an index; steps of before have no fingerprint and are never used again."""
    op.add_column("steps", sa.Column("fingerprint", sa.Text(), nullable=True))
    op.add_column("steps", sa.Column("reused", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    known = sa.text("fingerprint IS NOT NULL")
    op.create_index(op.f("ix_steps_fingerprint"), "steps", ["fingerprint"], postgresql_where=known)


def downgrade() -> None:
    """Forget both; the outputs stay where they are."""
    op.drop_index(op.f("ix_steps_fingerprint"), table_name="steps")
    op.drop_column("steps", "reused")
    op.drop_column("steps", "fingerprint")
