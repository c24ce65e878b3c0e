"""Let a job be paused: when that was asked for, and how long its clock stood still.

Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; code that does not know them goes on as before."""
    op.add_column("jobs", sa.Column("pause_requested_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("paused_s", sa.Double(), server_default=sa.text("0"), nullable=False))


def downgrade() -> None:
    """Drop the columns; a paused job stays without a claimable step."""
    for column in ("paused_s", "paused_at", "pause_requested_at"):
        op.drop_column("jobs", column)
