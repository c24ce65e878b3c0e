"""Let the newest runs of each step be found without reading all that ever ran.

Revises: 0027
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """An index of the steps whose estimates are judged."""
    judged = sa.text("status = 'done' and token = 1 and weight >= 0.5")
    op.create_index(op.f("ix_steps_judged"), "steps", ["step", "finished_at"], postgresql_where=judged)


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f("ix_steps_judged"), table_name="steps")
