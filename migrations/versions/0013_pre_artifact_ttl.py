"""Let artifacts expire, some time after their job has ended.

Revises: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """When an artifact expires, and how long a job's artifacts live after its end."""
    op.add_column("artifacts", sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("artifact_ttl", sa.Integer(), nullable=True))


def downgrade() -> None:
    """What has not been collected stays."""
    op.drop_column("jobs", "artifact_ttl")
    op.drop_column("artifacts", "expires_at")
