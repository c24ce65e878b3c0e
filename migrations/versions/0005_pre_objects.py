"""Know every object of the store, so that those to which nothing refers can be removed.

Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """The table, with what is referred to now; what nothing refers to already stays unknown, and in the store."""
    op.create_table(
        "objects",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("stored_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("collected_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_objects")),
    )
    op.execute(
        """
        insert into objects (sha256, size_bytes, stored_at)
        select sha256, size_bytes, now() from artifacts union select sha256, stored_bytes, now() from datasets
        on conflict do nothing
        """
    )
    op.execute(
        """
        insert into objects (sha256, size_bytes, stored_at)
        select distinct file.value, 0, now() from steps, jsonb_each_text(steps.checkpoint -> 'files') as file
        where jsonb_typeof(steps.checkpoint) = 'object'
        on conflict do nothing
        """
    )
    op.create_index(
        op.f("ix_objects_used_at"), "objects", ["used_at"], postgresql_where=sa.text("collected_at is null")
    )
    op.create_index(op.f("ix_artifacts_sha256"), "artifacts", ["sha256"])
    op.create_index(op.f("ix_datasets_sha256"), "datasets", ["sha256"])


def downgrade() -> None:
    """Forget the objects; they stay in the store."""
    op.drop_index(op.f("ix_datasets_sha256"), "datasets")
    op.drop_index(op.f("ix_artifacts_sha256"), "artifacts")
    op.drop_table("objects")
