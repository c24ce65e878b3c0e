"""Let a job be an export of an adapter.

Revises: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Which artifact an export is of."""
    op.add_column("jobs", sa.Column("adapter_id", sa.Text(), nullable=True))
    op.create_foreign_key(op.f("fk_jobs_adapter_id"), "jobs", "artifacts", ["adapter_id"], ["id"], ondelete="SET NULL")
    open_exports = sa.text("adapter_id is not null and finished_at is null")
    op.create_index("ix_jobs_open_exports", "jobs", ["adapter_id"], postgresql_where=open_exports)


def downgrade() -> None:
    """Exports stay as jobs that nobody can run any more."""
    op.drop_column("jobs", "adapter_id")
