"""Let a job name the webhooks that are to hear of it, and a webhook hear of no other.

Revises: 0025
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Two columns; webhooks that are there go on hearing of all jobs."""
    names = postgresql.ARRAY(sa.Text())
    op.add_column("jobs", sa.Column("webhooks", names, server_default=sa.text("'{}'::text[]"), nullable=False))
    op.add_column("webhooks", sa.Column("jobs", sa.Text(), server_default="all", nullable=False))


def downgrade() -> None:
    """All webhooks hear of all jobs."""
    op.drop_column("webhooks", "jobs")
    op.drop_column("jobs", "webhooks")
