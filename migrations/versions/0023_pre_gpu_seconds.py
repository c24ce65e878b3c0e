"""Let a job have a limit of what its workers spend on it.

Revises: 0020
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One column; jobs that are there have no such limit."""
    op.add_column("jobs", sa.Column("max_gpu_seconds", sa.Integer(), nullable=True))


def downgrade() -> None:
    """These limits are forgotten."""
    op.drop_column("jobs", "max_gpu_seconds")
