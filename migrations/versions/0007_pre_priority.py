"""Let a job have a priority, and its time left an interval; keep the counts of deleted jobs.

Revises: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.tenancy import share

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Columns with constant defaults, so no row is rewritten; and one table."""
    for table in ("jobs", "steps"):
        op.add_column(table, sa.Column("priority", sa.Integer(), server_default=sa.text("0"), nullable=False))
    for name in ("eta_p10_at", "eta_p90_at"):
        op.add_column("jobs", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "tallies",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("bucket", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", "step", "outcome", "code", "bucket", name=op.f("pk_tallies")),
    )
    share("tallies", rights="select, insert, update")


def downgrade() -> None:
    """Forget them."""
    op.drop_table("tallies")
    for name in ("eta_p90_at", "eta_p10_at"):
        op.drop_column("jobs", name)
    for table in ("steps", "jobs"):
        op.drop_column(table, "priority")
