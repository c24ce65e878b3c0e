"""Remember which jobs are compared.

Revises: 0015
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.tenancy import DEFAULT_PROJECT, OWN, confine, release

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Ids of jobs without foreign keys: a job may go, the comparison says so."""
    spoken_for = f"coalesce(nullif(current_setting('p2d.project', true), ''), '{DEFAULT_PROJECT}')"
    op.create_table(
        "comparisons",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), server_default=sa.text(spoken_for), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("job_ids", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_comparisons_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_comparisons")),
    )
    op.create_index(op.f("ix_comparisons_project_id_id"), "comparisons", ["project_id", "id"])
    confine("comparisons", OWN, rights="select, insert, delete")


def downgrade() -> None:
    """They are lost; the jobs stay."""
    release("comparisons")
    op.drop_table("comparisons")
