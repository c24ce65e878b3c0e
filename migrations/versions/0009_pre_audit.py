"""Make the audit log: a table that only grows.

Revises: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations.tenancy import DEFAULT_PROJECT, OWN, confine

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The API may read and add; nobody, its owner neither, changes or removes an entry by a statement on its rows."""
    spoken_for = f"coalesce(nullif(current_setting('p2d.project', true), ''), '{DEFAULT_PROJECT}')"
    op.create_table(
        "audit",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), server_default=sa.text(spoken_for), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("facts", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_audit_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_project_id_id"), "audit", ["project_id", "id"])
    op.create_index(op.f("ix_audit_object_id"), "audit", ["object_id"])
    confine("audit", OWN, rights="select, insert")
    op.execute(
        "create function refuse_change() returns trigger language plpgsql as "
        "$$ begin raise exception 'the audit log only grows'; end $$"
    )
    for kind, each in (("update or delete", "row"), ("truncate", "statement")):
        name = f"only_grows_{each}"
        op.execute(f"create trigger {name} before {kind} on audit for each {each} execute function refuse_change()")


def downgrade() -> None:
    """The log is lost."""
    op.drop_table("audit")
    op.execute("drop function refuse_change()")
