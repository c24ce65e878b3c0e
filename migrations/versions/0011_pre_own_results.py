"""Let head maps and selections be listed by project and deleted, and a head map come without a job.

Revises: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.tenancy import DEFAULT_PROJECT, OWN, OWN_JOB, OWN_JOB_EACH

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

TABLES = ("head_maps", "selections")

# A worker of the release before writes the default project: the job's own says no, so nobody else sees such a row.
RULES = {
    "head_maps": f"{OWN} and (job_id is null or {OWN_JOB_EACH})",
    "selections": f"{OWN} and {OWN_JOB_EACH}",
}


def upgrade() -> None:
    """The project of the job; for an imported head map its object."""
    spoken_for = f"coalesce(nullif(current_setting('p2d.project', true), ''), '{DEFAULT_PROJECT}')"
    for table in TABLES:
        op.execute(f"alter table {table} add column project_id text not null default '{DEFAULT_PROJECT}'")
        op.execute(f"alter table {table} alter column project_id set default {spoken_for}")
        op.execute(f"update {table} set project_id = jobs.project_id from jobs where jobs.id = {table}.job_id")  # noqa: S608
        op.create_foreign_key(op.f(f"fk_{table}_project_id"), table, "projects", ["project_id"], ["id"])
        op.create_index(op.f(f"ix_{table}_project_id_id"), table, ["project_id", "id"])
        op.execute(f"alter policy own on {table} using ({RULES[table]}) with check ({RULES[table]})")
    for column in ("job_id", "artifact_id", "dataset_id"):
        op.alter_column("head_maps", column, nullable=True)
    op.add_column("head_maps", sa.Column("sha256", sa.Text(), nullable=True))
    op.add_column("head_maps", sa.Column("size_bytes", sa.BigInteger(), nullable=True))
    op.create_index(op.f("ix_head_maps_sha256"), "head_maps", ["sha256"])
    op.add_column("artifacts", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    """Imported head maps are lost, and what is left of deleted artifacts."""
    op.execute("delete from artifacts where deleted_at is not null")
    op.drop_column("artifacts", "deleted_at")
    op.execute("delete from head_maps where job_id is null")
    for table in TABLES:
        op.execute(f"alter policy own on {table} using ({OWN_JOB}) with check ({OWN_JOB})")
        op.drop_column(table, "project_id")
    for column in ("sha256", "size_bytes"):
        op.drop_column("head_maps", column)
    for column in ("job_id", "artifact_id", "dataset_id"):
        op.alter_column("head_maps", column, nullable=False)
