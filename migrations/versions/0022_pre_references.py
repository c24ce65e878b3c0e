"""Let what refers to a deleted step or artifact be found by an index: deleting a job looked through whole tables for each.

Revises: 0018
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0018"
branch_labels = None
depends_on = None

REFERENCES = (("artifacts", "step_id"), ("head_maps", "artifact_id"), ("selections", "artifact_id"))


def upgrade() -> None:
    """Four indexes; the one of all exports takes the place of the one of open ones."""
    for table, column in REFERENCES:
        op.create_index(op.f(f"ix_{table}_{column}"), table, [column])
    exports = sa.text("adapter_id is not null")
    op.create_index(op.f("ix_jobs_adapter_id"), "jobs", ["adapter_id"], postgresql_where=exports)
    op.drop_index("ix_jobs_open_exports", table_name="jobs")


def downgrade() -> None:
    """Deleting is slow again."""
    open_ones = sa.text("adapter_id is not null and finished_at is null")
    op.create_index("ix_jobs_open_exports", "jobs", ["adapter_id"], postgresql_where=open_ones)
    op.drop_index(op.f("ix_jobs_adapter_id"), table_name="jobs")
    for table, column in reversed(REFERENCES):
        op.drop_index(op.f(f"ix_{table}_{column}"), table_name=table)
