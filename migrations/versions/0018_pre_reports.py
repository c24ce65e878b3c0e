"""Make the table of reports on files that were refused.

Revises: 0017
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.tenancy import DEFAULT_PROJECT, OWN, confine, release

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Counts and places; the faults are objects of the store."""
    spoken_for = f"coalesce(nullif(current_setting('p2d.project', true), ''), '{DEFAULT_PROJECT}')"
    op.create_table(
        "reports",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), server_default=sa.text(spoken_for), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("report", postgresql.JSONB(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_reports_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reports")),
    )
    op.create_index(op.f("ix_reports_project_id_id"), "reports", ["project_id", "id"])
    op.create_index(op.f("ix_reports_sha256"), "reports", ["sha256"])
    op.create_index(op.f("ix_reports_expires_at"), "reports", ["expires_at"])
    confine("reports", OWN, rights="select, insert, delete")


def downgrade() -> None:
    """They are lost; their objects are collected."""
    release("reports")
    op.drop_table("reports")
