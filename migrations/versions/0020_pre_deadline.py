"""Let a job have a time by which it must have ended.

Revises: 0022
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One column; jobs that are there have no deadline."""
    op.add_column("jobs", sa.Column("deadline_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Deadlines are forgotten."""
    op.drop_column("jobs", "deadline_at")
