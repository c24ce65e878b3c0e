"""Give every dataset, upload and job a project, and show the API the rows of one project at a time.

Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from migrations.tenancy import DEFAULT_PROJECT, OWN, OWN_JOB, ROLE, confine, make_role, release, share

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

OF_A_PROJECT = ("datasets", "uploads", "jobs", "steps", "idempotency_keys")
OF_A_JOB = ("attempts", "artifacts", "head_maps", "selections", "events")
OWN_UPLOAD = "exists (select from uploads where uploads.id = upload_id)"


def upgrade() -> None:
    """Projects and their keys; then the column, the role and the policies."""
    make_role()
    op.execute(f"grant usage on schema public to {ROLE}")
    op.create_table(
        "projects",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("name", name=op.f("uq_projects_name")),
    )
    op.execute(f"insert into projects (id, name) values ('{DEFAULT_PROJECT}', 'default')")  # noqa: S608 - a constant
    confine("projects", "id = current_setting('p2d.project', true)", rights="select")
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("project_id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, server_default=""),
        sa.Column("secret_hmac", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_index(op.f("ix_api_keys_project_id"), "api_keys", ["project_id"])
    confine("api_keys", OWN, rights="select, insert, update")
    for table in OF_A_PROJECT:
        _add_project(table)
        confine(table, OWN)
    op.drop_constraint("pk_idempotency_keys", "idempotency_keys")
    op.create_primary_key("pk_idempotency_keys", "idempotency_keys", ["project_id", "route", "key"])
    op.create_index(op.f("ix_jobs_project_id_id"), "jobs", ["project_id", "id"])
    op.create_index(op.f("ix_datasets_project_id_id"), "datasets", ["project_id", "id"])
    for table in OF_A_JOB:
        confine(table, OWN_JOB)
    confine("upload_parts", OWN_UPLOAD)
    share("objects", rights="select, update")


def _add_project(table: str) -> None:
    """What was there belongs to the default project, and so does what API processes of the release before still write."""
    op.execute(f"alter table {table} add column project_id text not null default '{DEFAULT_PROJECT}'")
    spoken_for = "coalesce(nullif(current_setting('p2d.project', true), ''), '" + DEFAULT_PROJECT + "')"
    op.execute(f"alter table {table} alter column project_id set default {spoken_for}")
    op.create_foreign_key(op.f(f"fk_{table}_project_id"), table, "projects", ["project_id"], ["id"])


def downgrade() -> None:
    """All projects become one; keys are lost. The role stays: other databases of the server may use it."""
    op.drop_constraint("pk_idempotency_keys", "idempotency_keys")
    op.create_primary_key("pk_idempotency_keys", "idempotency_keys", ["route", "key"])
    op.execute(f"revoke all on objects from {ROLE}")
    for table in ("upload_parts", *OF_A_JOB, *OF_A_PROJECT):
        release(table)
    for table in OF_A_PROJECT:
        op.drop_column(table, "project_id")
    op.drop_table("api_keys")
    op.drop_table("projects")
