"""Let the base model of a job be one that an export has merged.

Revises: 0026
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Which artifact is the base of a job."""
    op.add_column("jobs", sa.Column("base_artifact_id", sa.Text(), nullable=True))
    op.create_foreign_key(
        op.f("fk_jobs_base_artifact_id"), "jobs", "artifacts", ["base_artifact_id"], ["id"], ondelete="SET NULL"
    )
    own = sa.text("base_artifact_id is not null")
    op.create_index(op.f("ix_jobs_base_artifact_id"), "jobs", ["base_artifact_id"], postgresql_where=own)


def downgrade() -> None:
    """Such jobs stay, and cannot be run any more."""
    op.drop_column("jobs", "base_artifact_id")
