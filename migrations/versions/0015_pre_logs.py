"""Keep the last lines that a worker noted of each attempt, and let jobs be listed by dataset and status without a look at all.

Revises: 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Two columns and two indexes; attempts of before have no lines."""
    op.add_column("attempts", sa.Column("log", postgresql.JSONB(astext_type=sa.Text()), nullable=True))
    op.add_column("attempts", sa.Column("log_dropped", sa.Integer(), server_default=sa.text("0"), nullable=False))
    op.create_index(op.f("ix_jobs_dataset_id"), "jobs", ["dataset_id"])
    op.create_index(op.f("ix_jobs_project_id_status_id"), "jobs", ["project_id", "status", "id"])


def downgrade() -> None:
    """The lines are lost."""
    op.drop_index(op.f("ix_jobs_project_id_status_id"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_dataset_id"), table_name="jobs")
    op.drop_column("attempts", "log_dropped")
    op.drop_column("attempts", "log")
