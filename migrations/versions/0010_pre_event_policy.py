"""Let the API read a job's events and attempts without a look at all other jobs.

Revises: 0009
"""

from __future__ import annotations

from alembic import op

from migrations.tenancy import OWN_JOB, OWN_JOB_EACH

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLES = ("events", "attempts")


def upgrade() -> None:
    """The same rule, asked for each row that is read."""
    for table in TABLES:
        op.execute(f"alter policy own on {table} using ({OWN_JOB_EACH}) with check ({OWN_JOB_EACH})")


def downgrade() -> None:
    """The rule as it was."""
    for table in TABLES:
        op.execute(f"alter policy own on {table} using ({OWN_JOB}) with check ({OWN_JOB})")
