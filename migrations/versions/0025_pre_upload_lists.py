"""Let the uploads of a project be listed.

Revises: 0024
"""

from __future__ import annotations

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """An index as every list has one; the table holds some days of uploads."""
    op.create_index(op.f("ix_uploads_project_id_id"), "uploads", ["project_id", "id"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f("ix_uploads_project_id_id"), table_name="uploads")
