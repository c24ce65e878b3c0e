"""Note when each project was served last, so that one worker alone serves them in turns.

Revises: 0016
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One column; a project that was never served comes first."""
    op.add_column("projects", sa.Column("served_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Whose turn it is is forgotten."""
    op.drop_column("projects", "served_at")
